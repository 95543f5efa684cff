"""`pipe.optimize(...)`: the same pictures with less work, every part taken back to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from kandinsky_diffusers.k22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline
from kandinsky_diffusers.optimization import Optimization, optimizable, take_back
from tests.support.tiny22 import tiny_components
from tests.test_cuda_graphs import StandIn


NOTHING = {
    "channels_last": False,
    "fuse_projections": False,
    "compile": False,
    "packed_weights": False,
    "cuda_graph": False,
    "attention_backend": None,
}
MODELS = ("unet", "movq", "prior_prior")


@pytest.fixture(scope="module")
def shared_pipe() -> KandinskyV22CombinedPipeline:
    pipe = KandinskyV22CombinedPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared_pipe: KandinskyV22CombinedPipeline) -> Iterator[KandinskyV22CombinedPipeline]:
    yield shared_pipe
    shared_pipe.remove_all_hooks()
    shared_pipe.optimize(False)


def draw(pipe: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    arguments = {
        "prompt": "a cat",
        "num_inference_steps": 2,
        "prior_num_inference_steps": 2,
        "height": 64,
        "width": 64,
        "output_type": "pt",
    }
    return pipe(**arguments | options, generator=torch.Generator().manual_seed(seed)).images


def everything(pipe: Any) -> dict[str, Any]:
    """All there is to see of the models, their modules and weights."""
    models = {name: getattr(pipe, name) for name in MODELS}
    modules = {f"{name}.{path}": module for name, model in models.items() for path, module in model.named_modules()}
    return {
        "shown": {name: repr(model) for name, model in models.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "fused": {name: getattr(module, "fused_projections", None) for name, module in modules.items()},
        "weights": {
            f"{name}.{key}": (tensor.stride(), tensor.untyped_storage().nbytes(), tensor.sum().item())
            for name, model in models.items()
            for key, tensor in model.state_dict().items()
        },
    }


def test_pictures_stay_and_everything_is_taken_back(pipe: Any) -> None:
    before, picture = everything(pipe), draw(pipe)
    rng = torch.get_rng_state()
    assert pipe.optimize() is pipe
    assert torch.equal(torch.get_rng_state(), rng)
    during = everything(pipe)
    assert (during["shown"], list(during["weights"])) == (before["shown"], list(before["weights"]))
    assert during["fused"] != before["fused"]
    torch.testing.assert_close(draw(pipe), picture, rtol=0, atol=5e-4)

    pipe.optimize(False)
    assert everything(pipe) == before
    assert torch.equal(draw(pipe), picture)


def test_twice_is_once_and_another_choice_replaces_the_first(pipe: Any) -> None:
    before = everything(pipe)
    pipe.optimize(fuse_projections=False)
    once = everything(pipe)
    pipe.optimize(fuse_projections=False)
    assert everything(pipe) == once
    pipe.optimize(channels_last=False)
    pipe.optimize(fuse_projections=False)
    assert everything(pipe) == once != before


def test_convolutions_are_in_channels_last(pipe: Any) -> None:
    pipe.optimize(fuse_projections=False)
    for name in ("unet", "movq"):
        weights = [weight for weight in getattr(pipe, name).parameters() if weight.ndim == 4]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


class _CountedLinears(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def linears(function: Callable[[], Any]) -> int:
    with _CountedLinears() as counted:
        function()
    return counted.count


def unet_step(pipe: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    added = {"image_embeds": torch.randn(1, 32, generator=rng)}
    return pipe.unet(torch.randn(1, 4, 8, 8, generator=rng), 500, None, added_cond_kwargs=added).sample


def prior_step(pipe: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    prior = pipe.prior_prior
    states, sample = (torch.randn(shape, generator=rng) for shape in ((1, 77, 32), (1, 32)))
    return prior(sample, 500, sample, states, torch.ones(1, 77, dtype=torch.bool)).predicted_image_embedding


def fused_layers(model: torch.nn.Module) -> int:
    return sum(getattr(module, "fused_projections", False) for module in model.modules())


def test_queries_keys_and_values_of_one_input_are_one_product(pipe: Any) -> None:
    steps = (unet_step, prior_step)
    before = [linears(lambda step=step: step(pipe)) for step in steps]
    pipe.optimize(channels_last=False)
    saved = [count - linears(lambda step=step: step(pipe)) for step, count in zip(steps, before, strict=True)]
    layers = fused_layers(pipe.unet), fused_layers(pipe.prior_prior)
    assert saved == [layers[0], 2 * layers[1]]  # queries of the UNet are of another input than keys and values
    assert all(layers)


@torch.no_grad()
def test_fused_weights_are_held_once(pipe: Any) -> None:
    pipe.optimize(channels_last=False)
    attention = pipe.prior_prior.transformer_blocks[0].attn1
    fused = attention.to_qkv.weight
    assert [part.weight.data_ptr() for part in (attention.to_q, attention.to_k, attention.to_v)] == [
        part.data_ptr() for part in fused.chunk(3)
    ]
    attention.to_k.weight.zero_()
    assert not fused.chunk(3)[1].any()
    attention.to_k.weight.copy_(torch.eye(32))


@torch.no_grad()
@pytest.mark.parametrize("change", ["replaced", "moved"])
def test_layers_that_change_meanwhile_count(pipe: Any, change: str) -> None:
    pipe.optimize(channels_last=False)
    attention, before = pipe.prior_prior.transformer_blocks[0].attn1, prior_step(pipe)
    layer, weight = attention.to_k, attention.to_k.weight.data
    if change == "replaced":  # as by LoRA
        attention.to_k = torch.nn.Sequential(layer, torch.nn.Linear(32, 32))
    else:  # as by offloading
        layer.weight.data = weight + 1
    changed = prior_step(pipe)
    attention.to_k, layer.weight.data = layer, weight
    assert not torch.allclose(changed, before)
    assert torch.equal(prior_step(pipe), before)


def test_gradients_reach_the_single_layers(pipe: Any) -> None:
    pipe.optimize()
    prior_step(pipe).sum().backward()
    attention = pipe.prior_prior.transformer_blocks[0].attn1
    assert all(layer.weight.grad is not None for layer in (attention.to_q, attention.to_k, attention.to_v))
    pipe.prior_prior.zero_grad()


def test_weights_are_saved_as_ever(pipe: Any, tmp_path: Path) -> None:
    for folder in ("before", "optimized"):
        for name in MODELS:
            getattr(pipe, name).save_pretrained(tmp_path / folder / name)
        pipe.optimize()
    for path in (tmp_path / "before").rglob("*.safetensors"):
        before, optimized = load_file(path), load_file(tmp_path / "optimized" / path.relative_to(tmp_path / "before"))
        assert before.keys() == optimized.keys()
        assert all(torch.equal(before[key], optimized[key]) for key in before)


def test_what_is_left_out_is_said_once(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe.optimize()
    pipe.to("cpu")
    said = [record.message for record in caplog.records]
    assert sorted(said) == [
        "`compile` is left out for `unet`, `movq`, `prior_prior`: on the CPU only a dict of options, such as"
        " `compile={'backend': 'inductor'}`, compiles.",
        "`cuda_graph` is left out for `unet`, `movq`, `prior_prior`: CUDA graphs need weights on a CUDA device, and"
        " these are on 'cpu'.",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enabled": None}, "`enabled` is None; accepted is True or False"),
        ({"channels_last": "yes"}, "`channels_last` is 'yes'"),
        ({"packed_weights": None}, "`packed_weights` is None; accepted is True or False"),
        ({"compile": "max-autotune"}, "`compile` is 'max-autotune'; accepted is True, False or a dict"),
        ({"compile": {"speed": "high"}}, "`compile` is 'speed'"),
        ({"attention_backend": "fastest"}, "`attention_backend` is 'fastest'"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_changes(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    before = everything(pipe)
    with pytest.raises((TypeError, ValueError), match=message):
        pipe.optimize(**arguments)
    assert everything(pipe) == before


def test_an_attention_backend_goes_to_models_that_can_have_it(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    def backends() -> list[Any]:
        layers = [pipe.unet.mid_block.attentions[0], pipe.prior_prior.transformer_blocks[0].attn1]
        return [layer.processor._attention_backend for layer in layers]

    pipe.optimize(attention_backend="_native_math")
    assert backends() == ["_native_math", "_native_math"]
    pipe.optimize(attention_backend="_native_flash")
    assert backends() == ["_native_flash", None]
    assert "`prior_prior`: '_native_flash' cannot take the masks" in caplog.text
    pipe.optimize(False)
    assert backends() == [None, None]


def test_offloaded_weights_are_not_fused(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    picture = draw(pipe)
    pipe.optimize(channels_last=False)
    fused = pipe.unet.mid_block.attentions[0]
    pipe.enable_model_cpu_offload(device="cpu")
    assert not fused.fused_projections
    assert "`fuse_projections` is left out for `unet`, `prior_prior`: weights are offloaded" in caplog.text
    torch.testing.assert_close(draw(pipe), picture, rtol=0, atol=5e-4)
    pipe.remove_all_hooks()
    assert fused.fused_projections


def test_the_exact_reference_is_not_optimized(pipe: Any) -> None:
    before = everything(pipe)
    pipe.optimize()
    optimized = everything(pipe)
    pipe.exact_reference(True)
    assert everything(pipe) == before
    pipe.exact_reference(False)
    assert everything(pipe) == optimized


def test_a_pipeline_that_shares_models_can_take_back(pipe: Any) -> None:
    before = everything(pipe)
    pipe.optimize()
    KandinskyV22Pipeline.from_pipe(pipe.decoder_pipe).optimize(False)
    assert not hasattr(pipe.unet.mid_block.attentions[0], "to_kv")
    assert hasattr(pipe.prior_prior.transformer_blocks[0].attn1, "to_qkv")
    pipe.optimize(False)
    assert everything(pipe) == before


def test_every_model_of_a_call_is_replayed(pipe: Any) -> None:
    forwards = {"unet": pipe.unet.conv_in, "movq": pipe.movq.decoder.conv_in, "prior": pipe.prior_prior.proj_in}
    counts = dict.fromkeys(forwards, 0)

    def count(name: str) -> None:
        counts[name] += 1

    hooks = [part.register_forward_hook(lambda *_, name=name: count(name)) for name, part in forwards.items()]
    options = {"num_inference_steps": 3, "prior_num_inference_steps": 3}
    picture = draw(pipe, **options)
    recorder, models = _Silent(counts), optimizable(pipe.components)
    Optimization({**NOTHING, "cuda_graph": True}, recorder).apply(models)
    try:
        for seed in (5, 6):
            draw(pipe, seed, **options)
        recorded = recorder.recorded
        counts.update(dict.fromkeys(counts, 0))
        assert torch.equal(draw(pipe, **options), picture)
    finally:
        take_back(models.values())
        for hook in hooks:
            hook.remove()
    assert recorder.recorded == recorded == 4  # of the prior two: a step, and what no step changes
    assert counts == {"unet": 0, "movq": 0, "prior": 0}


class _Silent(StandIn):
    """A replay does not count as a forward, as with a CUDA graph nothing is called."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self._counts = counts

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        replay, output = super().record(run, device)

        def silent() -> None:
            before = dict(self._counts)
            replay()
            self._counts.update(before)

        return silent, output


class Compiler:
    """Counts what is compiled, and how much of it for one size only."""

    def __init__(self) -> None:
        self.compiled = self.static = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sizes = [size for value in inputs for size in getattr(value, "shape", (value,))]
        self.compiled += 1
        self.static += not any(isinstance(size, torch.SymInt) for size in sizes)
        return module.forward


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, sample: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return (sample * self.weight + time[:, :, None, None]).relu()


class Blocks(ModelMixin, ConfigMixin):
    """Blocks of one kind, each at another width and height, as on the levels of a UNet."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.widths = range(2, 6)
        self.blocks = torch.nn.ModuleList(Block(width) for width in self.widths)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for block, width in zip(self.blocks, self.widths, strict=True):
            time = timestep.reshape(1, 1).expand(len(sample), width)
            total = total + block(sample.repeat(1, width, width, 1), time).sum()
        return total


@torch.no_grad()
def test_blocks_compile_once_and_once_more_for_all_other_sizes() -> None:
    model, compiler = Blocks().eval(), Compiler()
    settings = {**NOTHING, "compile": {"backend": compiler}}

    def compiled(height: int, width: int) -> int:
        for timestep in (3.0, 4.0):
            sample = torch.randn(2, 1, height, width)
            output = model(sample, torch.tensor(timestep))
            expected = sum(width**2 * (sample + timestep).relu().sum() for width in model.widths)
            torch.testing.assert_close(output, torch.as_tensor(expected))
        return compiler.compiled

    Optimization(settings).apply({"model": model})
    blocks, sizes = len(model.blocks), [(4, 4), (4, 6), (8, 6), (12, 12), (4, 4)]
    with torch._dynamo.config.patch(recompile_limit=2):
        assert [compiled(*size) for size in sizes] == [blocks, *[2 * blocks] * 4]
    assert compiler.static == blocks  # those of the first size
    take_back([model])
    assert compiled(5, 5) == 2 * blocks
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


class RowsBlock(ModelMixin, ConfigMixin):
    """A block in a model that takes rows of any width, and no picture."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.block(rows[..., None, None], rows)


@torch.no_grad()
def test_without_a_picture_the_batch_is_the_size() -> None:
    model, compiler, counts = RowsBlock().eval(), Compiler(), []
    Optimization({**NOTHING, "compile": {"backend": compiler}}).apply({"model": model})
    for batch in (4, 2, 3, 4):
        for width in (7, 3):
            assert torch.equal(model(torch.ones(batch, width)), torch.full((batch, width, 1, 1), 2.0))
        counts.append(compiler.compiled)
    assert counts == [2, 3, 3, 3]
    assert compiler.static == 2


@torch.no_grad()
def test_what_is_compiled_already_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    model = Blocks()
    model.blocks[0].compile(backend="eager")
    own = model.blocks[0]._compiled_call_impl
    Optimization({**NOTHING, "compile": {"backend": "eager"}}).apply({"unet": model})
    take_back([model])
    assert model.blocks[0]._compiled_call_impl is own
    assert "`compile` is left out for `unet`: compiled already" in caplog.text


@pytest.mark.parametrize("part", ["fuse_projections", "cuda_graph"])
def test_lora_acts_from_when_it_is_loaded(pipe: Any, caplog: pytest.LogCaptureFixture, part: str) -> None:
    rng = torch.Generator().manual_seed(0)
    layer = "unet.mid_block.attentions.0.to_v"
    lora = {f"{layer}.lora_{side}.weight": torch.randn(shape, generator=rng) for side, shape in LORA.items()}

    def drawn() -> list[torch.Tensor]:
        latents = partial(draw, pipe, num_inference_steps=3, output_type="latent")
        of_each = [latents()]
        pipe.load_lora_weights(lora, adapter_name="style")
        of_each.append(latents())
        pipe.set_adapters("style", 0.5)
        of_each.append(latents())
        pipe.unload_lora_weights()
        return [*of_each, latents()]

    plain = drawn()
    pipe._optimization = Optimization({**NOTHING, part: True}, StandIn())
    pipe._reoptimize()
    fused = pipe.unet.mid_block.attentions[0].fused_projections
    torch.testing.assert_close(drawn(), plain, rtol=0, atol=5e-4)
    assert pipe.unet.mid_block.attentions[0].fused_projections == fused == (part == "fuse_projections")
    assert ("`fuse_projections` is left out for `unet`: LoRA is loaded" in caplog.text) == fused
    assert all(not torch.allclose(one, other, atol=5e-3) for one, other in pairwise(plain[:3]))


LORA = {"A": (2, 64), "B": (64, 2)}
