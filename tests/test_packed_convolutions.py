"""`pipe.optimize(packed_weights=True)`: convolutions copy their weights for oneDNN once, and never use old ones."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky_diffusers.footprint import Load, running_bytes
from kandinsky_diffusers.k22 import KandinskyV22Pipeline
from kandinsky_diffusers.measuring import flops
from kandinsky_diffusers.optimization import Optimization, take_back
from kandinsky_diffusers.packed_convolutions import PackedConv2d, pack, packable, unpack
from tests.support.tiny22 import EMBEDDING, decoder_components
from tests.test_optimization import NOTHING


PACKED = {**NOTHING, "packed_weights": True}


@pytest.fixture(scope="module")
def shared_pipe() -> KandinskyV22Pipeline:
    pipe = KandinskyV22Pipeline(**decoder_components("text2image"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared_pipe: KandinskyV22Pipeline) -> Iterator[KandinskyV22Pipeline]:
    yield shared_pipe
    shared_pipe.remove_all_hooks()
    shared_pipe.optimize(False)


@pytest.fixture
def layer() -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(8, 16, 3, padding=1)


def draw(pipe: Any, seed: int = 0, side: int = 64, **options: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, EMBEDDING, generator=rng)
    arguments = {"num_inference_steps": 2, "height": side, "width": side, "output_type": "pt"} | options
    return pipe(image_embeds=embeds, negative_image_embeds=-embeds, generator=rng, **arguments).images


def unet_step(pipe: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    added = {"image_embeds": torch.randn(1, EMBEDDING, generator=rng)}
    return pipe.unet(torch.randn(1, 4, 8, 8, generator=rng), 500, None, added_cond_kwargs=added).sample


def picture(batch: int = 2, side: int = 8) -> torch.Tensor:
    return torch.randn(batch, 8, side, side, generator=torch.Generator().manual_seed(batch * side))


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def packings(function: Callable[[], Any]) -> int:
    """How many weights are packed meanwhile."""
    with _Counted() as counted:
        function()
    return counted.counts[torch.ops.mkldnn._reorder_convolution_weight.default]


def convolutions(*models: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for model in models for part in model.modules() if isinstance(part, torch.nn.Conv2d)]


def test_weights_are_packed_once_and_pictures_stay(pipe: Any) -> None:
    pipe.optimize(packed_weights=False)
    plain = draw(pipe)
    pipe.optimize()
    used = convolutions(pipe.unet, pipe.movq.post_quant_conv, pipe.movq.decoder)
    pictures: list[torch.Tensor] = []
    assert packings(lambda: pictures.append(draw(pipe, num_inference_steps=1))) == len(used) > 40
    assert packings(lambda: pictures.append(draw(pipe))) == packings(lambda: draw(pipe, seed=1)) == 0
    torch.testing.assert_close(pictures[1], plain, rtol=0, atol=1e-5)


def test_a_picture_of_another_size_packs_once_more(layer: torch.nn.Conv2d) -> None:
    pack(torch.nn.Sequential(layer))
    sides = (8, 8, 16, 16, 8)
    assert [packings(lambda side=side: layer(picture(side=side))) for side in sides] == [1, 0, 1, 0, 1]
    assert packings(lambda: layer(picture(batch=4))) == 0  # guidance may end meanwhile


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": 2, "bias": False}, {"dilation": 2, "padding": (0, 2)}], ids=str
)
def test_the_layer_computes_what_it_did(dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 16, 3, **options).to(dtype)
    image, expected = picture().to(dtype), layer(picture().to(dtype))
    pack(torch.nn.Sequential(layer))
    assert packings(lambda: layer(image)) == 1
    output = layer(image)
    torch.testing.assert_close(output, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert output.is_contiguous(memory_format=torch.channels_last)


def add_in_place(layer: torch.nn.Conv2d) -> None:
    layer.weight[3, 2, 1, 1] += 1


def add_to_data(layer: torch.nn.Conv2d) -> None:  # as merging LoRAs does, and averaging
    layer.weight.data += torch.rand(layer.weight.shape)


def replace_data(layer: torch.nn.Conv2d) -> None:  # as moving does
    layer.weight.data = layer.weight.data + 1


def replace(layer: torch.nn.Conv2d) -> None:
    layer.weight = torch.nn.Parameter(layer.weight + 1)


def load(layer: torch.nn.Conv2d) -> None:
    layer.load_state_dict({name: tensor + 1 for name, tensor in layer.state_dict().items()})


@torch.no_grad()
@pytest.mark.parametrize("change", [add_in_place, add_to_data, replace_data, replace, load])
def test_old_weights_are_never_used(layer: torch.nn.Conv2d, change: Callable[[torch.nn.Conv2d], None]) -> None:
    pack(torch.nn.Sequential(layer))
    before = layer(picture())
    change(layer)
    after = layer(picture())
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, F.conv2d(picture(), layer.weight, layer.bias, padding=1))
    layer.double()
    torch.testing.assert_close(layer(picture().double()).float(), after)


def test_lora_and_its_fusing_act(pipe: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 4, 3, 3), "B": (pipe.unet.conv_in.out_channels, 2, 1, 1)}
    lora = {f"unet.conv_in.lora_{side}.weight": torch.randn(shape, generator=rng) for side, shape in shapes.items()}
    changes = [
        lambda: pipe.load_lora_weights(lora, adapter_name="style"),
        lambda: pipe.set_adapters("style", 0.5),
        pipe.fuse_lora,
        pipe.unfuse_lora,
        pipe.unload_lora_weights,
    ]

    @torch.no_grad()
    def steps() -> list[torch.Tensor]:
        outputs = [unet_step(pipe)]
        for change in changes:
            change()
            outputs.append(unet_step(pipe))
        return outputs

    plain = steps()
    pipe.optimize(fuse_projections=False)
    packed = steps()
    assert packings(lambda: unet_step(pipe)) == 0
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(one, other, atol=1e-2) for one, other in pairwise(plain[:3]))


def test_everything_is_taken_back(pipe: Any) -> None:
    def everything() -> list[Any]:
        modules = [*pipe.unet.modules(), *pipe.movq.modules()]
        return [(module, type(module), repr(module), sorted(vars(module))) for module in modules]

    before = everything()
    weights = {name: (weight, weight.stride()) for name, weight in pipe.unet.state_dict(keep_vars=True).items()}
    pipe.optimize()
    draw(pipe)
    assert all(type(layer) is PackedConv2d for layer in convolutions(pipe.unet, pipe.movq))
    assert pipe.unet.state_dict().keys() == weights.keys()
    assert [shown for _, _, shown, _ in everything()] == [shown for _, _, shown, _ in before]
    pipe.exact_reference(True)
    assert everything() == before
    pipe.exact_reference(False)
    pipe.optimize(packed_weights=False)
    assert everything() != before
    assert all(type(layer) is torch.nn.Conv2d for layer in convolutions(pipe.unet, pipe.movq))
    pipe.optimize(False)
    assert everything() == before
    for name, weight in pipe.unet.state_dict(keep_vars=True).items():
        assert (weight, weight.stride()) == weights[name]


def test_copies_are_let_go_when_models_move(pipe: Any) -> None:
    pipe.optimize()
    draw(pipe)
    pipe.to("cpu")
    assert all("_packed" not in vars(layer) for layer in convolutions(pipe.unet, pipe.movq))
    assert packings(lambda: unet_step(pipe)) == len(convolutions(pipe.unet))


def test_gradients_flow(layer: torch.nn.Conv2d) -> None:
    expected = torch.autograd.grad(layer(picture()).square().sum(), layer.weight)
    pack(torch.nn.Sequential(layer))
    with torch.no_grad():
        layer(picture())
    torch.testing.assert_close(torch.autograd.grad(layer(picture()).square().sum(), layer.weight), expected)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_packs_its_own(layer: torch.nn.Conv2d, copied: Callable[[torch.nn.Conv2d], torch.nn.Conv2d]) -> None:
    pack(torch.nn.Sequential(layer))
    output = layer(picture())
    twin = copied(layer)
    layer.weight.data += 1
    outputs: list[torch.Tensor] = []
    assert packings(lambda: outputs.append(twin(picture()))) == 1
    assert torch.equal(outputs[0], output)
    unpack(torch.nn.Sequential(twin))
    assert type(twin) is torch.nn.Conv2d


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@torch.no_grad()
def test_calls_that_cannot_use_packed_weights_run_as_ever(layer: torch.nn.Conv2d) -> None:
    plain = copy.deepcopy(layer)
    pack(torch.nn.Sequential(layer))
    layer(picture())

    def both(image: torch.Tensor) -> None:
        outputs: list[torch.Tensor] = []
        assert packings(lambda: outputs.append(layer(image))) == 0
        assert torch.equal(outputs[0], plain(image))

    both(picture()[0])
    with torch.autocast("cpu", torch.bfloat16):
        both(picture())
    assert torch.equal(torch.jit.trace(layer, picture())(picture(4)), plain(picture(4)))
    with pytest.raises(RuntimeError, match="to have 8 channels, but got 7"):
        layer(picture()[:, :7])


def test_only_plain_convolutions_are_packed() -> None:
    others = [
        torch.nn.Conv2d(8, 8, 3, groups=2),
        torch.nn.Conv2d(8, 8, 3, padding="same"),
        torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        torch.nn.Conv2d(8, 8, 3, device="meta"),
        torch.nn.Conv1d(8, 8, 3),
        torch.nn.LazyConv2d(8, 3),
    ]
    assert packable(torch.nn.Sequential(*others)) == []


def test_memory_and_operations_are_counted_as_before(pipe: Any) -> None:
    load = Load(pictures=1, rows=2, pixels=(64, 64), latents=(8, 8))

    @torch.no_grad()
    def counts() -> tuple[int, int]:
        return running_bytes(pipe.unet, lambda _, tensor: tensor.dtype, load), flops(lambda: unet_step(pipe))

    before = counts()
    Optimization(PACKED).apply({"unet": pipe.unet})
    unet_step(pipe)
    assert counts() == before


def test_where_it_is_left_out_a_message_says_why(
    pipe: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**settings: Any) -> str:
        caplog.clear()
        Optimization({**PACKED, **settings}).apply({"unet": pipe.unet})
        take_back([pipe.unet])
        assert not any(isinstance(layer, PackedConv2d) for layer in pipe.unet.modules())
        return caplog.text

    assert "`packed_weights` is left out for `unet`: compiled." in said(compile={"backend": "eager"})
    monkeypatch.setattr(pipe.unet, "is_quantized", True, raising=False)
    assert "`packed_weights` is left out for `unet`: weights are quantized." in said()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "`packed_weights` is left out for `unet`: this PyTorch has no oneDNN" in said()


def test_offloaded_layers_are_left_alone(layer: torch.nn.Conv2d, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(layer)
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")
    Optimization(PACKED).apply({"unet": model})
    assert "`packed_weights` is left out for `unet`: layers are offloaded." in caplog.text
    assert type(layer) is torch.nn.Conv2d
