"""LoRA on every family: what is loaded acts, is saved exactly, and leaves no trace when it is taken off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoPipelineForText2Image, ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from kandinsky_diffusers import KandinskyV22CombinedPipeline, KandinskyV22PriorPipeline
from tests.support import tiny22


KINDS = ["2.0", "2.1", "2.2", "3.1"]
SAME = 1e-5  # of the largest output: where weights moved in memory, sums are made in another order
BLOCKS = r".*(down_blocks\.[12]|transformer_blocks\.0)\..*"  # not all of them: peft takes its time for each layer
TARGETS = BLOCKS + r"(to_q|to_out\.0)"
OTHER_TARGETS = BLOCKS + "to_[qv]"
WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass
class Subject:
    """A pipeline, and how each model that takes LoRA was called first while it drew."""

    pipe: Any
    calls: dict[str, tuple[Any, Any]]

    @property
    def models(self) -> dict[str, Any]:
        return {name: getattr(self.pipe, name) for name in self.calls}

    @torch.no_grad()
    def outputs(self) -> dict[str, torch.Tensor]:
        """What the models make of those calls."""
        made = {name: getattr(self.pipe, name)(*args, **kwargs) for name, (args, kwargs) in self.calls.items()}
        return {name: output[0].clone() for name, output in made.items()}

    def off_by(self, expected: dict[str, torch.Tensor]) -> float:
        """The largest difference from `expected`, relative to it."""
        now = self.outputs()
        return max(float((now[name] - out).abs().max() / out.abs().max()) for name, out in expected.items())

    def make_lora(self, folder: Path, seed: int = 0, targets: str = TARGETS, **config: Any) -> Any:
        """Save a random LoRA of rank 2 as a training does, and return what the models make with it."""
        torch.manual_seed(seed)
        arguments: dict[str, Any] = {}
        for name, model in self.models.items():
            settings = {"r": 2, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **config}
            model.add_adapter(LoraConfig(**settings), "made")
            model.eval()
            part = name.removeprefix("prior_")
            layers = get_peft_model_state_dict(model, adapter_name="made")
            arguments[f"{part}_lora_layers"] = {key: tensor.clone() for key, tensor in layers.items()}
            arguments[f"{part}_lora_adapter_metadata"] = model.peft_config["made"].to_dict()
        outputs = self.outputs()
        type(self.pipe).save_lora_weights(folder, **arguments)
        self.pipe.unload_lora_weights()
        for model in self.models.values():
            model.requires_grad_(True)  # the training has frozen it
        return outputs


@pytest.fixture(scope="module")
def build(converted_20: Path, converted_21: Path, converted_31: Path) -> Callable[[str], Subject]:
    """A subject of its own of a version; those of 2.1 and 2.2 have a prior and a decoder."""
    repos = {
        "2.0": converted_20 / "kandinsky-2-0",
        "2.1": converted_21 / "kandinsky-2-1",
        "3.1": converted_31 / "kandinsky-3-1",
    }

    def make(kind: str) -> Subject:
        if kind == "2.2 prior":
            pipe: Any = KandinskyV22PriorPipeline(**tiny22.prior_components())
        elif kind == "2.2":
            pipe = KandinskyV22CombinedPipeline(**tiny22.tiny_components())
        else:
            pipe = AutoPipelineForText2Image.from_pretrained(repos[kind])
        pipe.set_progress_bar_config(disable=True)
        names = [
            name for name in ("unet", "prior_prior", "prior") if isinstance(getattr(pipe, name, None), ModelMixin)
        ]
        calls: dict[str, tuple[Any, Any]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                if not kwargs.get("project"):
                    calls.setdefault(name, (args, kwargs))

            return hook

        hooks = [getattr(pipe, name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
        decoded = {"height": 64, "width": 64, "output_type": "latent"} if "unet" in names else {}
        steps = {"prior_num_inference_steps": 2} if len(names) == 2 else {}
        pipe.exact_reference()("a cat", num_inference_steps=2, **decoded, **steps)
        for hook in hooks:
            hook.remove()
        return Subject(pipe, calls)

    return make


@pytest.fixture(scope="module")
def subjects(build: Callable[[str], Subject]) -> Callable[[str], Subject]:
    """The same subject for all tests of a version."""
    return cache(build)


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Iterator[Subject]:
    made = subjects(request.param)
    yield made
    made.pipe.remove_all_hooks()
    made.pipe.unfuse_lora()
    made.pipe.unload_lora_weights()


def state_of(subject: Subject) -> dict[str, Any]:
    return {
        name: (
            repr(model),
            {key: tensor.clone() for key, tensor in model.state_dict().items()},
            set(vars(model)),
            [key for key, tensor in model.named_parameters() if tensor.requires_grad],
        )
        for name, model in subject.models.items()
    }


def test_what_is_loaded_acts_is_saved_exactly_and_leaves_no_trace(subject: Subject, tmp_path: Path) -> None:
    outputs, before = subject.outputs(), state_of(subject)
    made = subject.make_lora(tmp_path / "made")
    subject.pipe.load_lora_weights(tmp_path / "made")
    assert subject.off_by(outputs) > 1e-2
    assert subject.off_by(made) <= SAME

    subject.pipe.save_lora_weights(tmp_path / "again")
    first, again = (load_file(tmp_path / name / WEIGHTS) for name in ("made", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    configs = []
    for name in ("made", "again"):
        with safe_open(tmp_path / name / WEIGHTS, "pt") as file:
            configs.append(json.loads(file.metadata()["lora_adapter_metadata"]))
    assert configs[0] == configs[1]
    assert configs[1]["unet.lora_alpha"] == 6

    subject.pipe.unload_lora_weights()
    for name, (text, tensors, attributes, trainable) in state_of(subject).items():
        assert text == before[name][0]
        assert list(tensors) == list(before[name][1])
        assert all(torch.equal(tensor, before[name][1][key]) for key, tensor in tensors.items())
        assert attributes <= before[name][2]
        assert trainable == before[name][3]
    assert subject.off_by(outputs) <= SAME
    assert subject.pipe.get_list_adapters() == {}


def test_two_adapters_in_any_order_with_weights(subject: Subject, tmp_path: Path) -> None:
    before = subject.outputs()
    made = {"a": subject.make_lora(tmp_path / "a"), "b": subject.make_lora(tmp_path / "b", 1, OTHER_TARGETS)}
    seen = []
    for names in ("ab", "ba"):
        for name in names:
            subject.pipe.load_lora_weights(tmp_path / name, adapter_name=name)
            assert subject.pipe.get_active_adapters() == [name]
        subject.pipe.set_adapters(["a", "b"], [0.5, 0.25])
        seen.append(subject.outputs())
        if names == "ab":
            subject.pipe.unload_lora_weights()
    assert all(torch.allclose(seen[0][name], seen[1][name], atol=1e-4) for name in before)
    subject.pipe.set_adapters("a", 0.0)
    assert subject.off_by(before) <= SAME
    subject.pipe.set_adapters(["a", "b"])
    subject.pipe.delete_adapters("b")
    assert subject.off_by(made["a"]) <= SAME
    subject.pipe.disable_lora()
    assert subject.off_by(before) <= SAME
    subject.pipe.delete_adapters("a")
    assert not any("lora" in key for model in subject.models.values() for key in model.state_dict())


def test_fusing_and_back(subject: Subject, tmp_path: Path) -> None:
    made = subject.make_lora(tmp_path)
    subject.pipe.load_lora_weights(tmp_path)
    subject.pipe.set_adapters("default_0", 0.5)
    half = subject.outputs()
    subject.pipe.set_adapters("default_0")
    subject.pipe.fuse_lora(lora_scale=0.5)
    assert subject.pipe.num_fused_loras == 1
    assert subject.off_by(half) <= SAME
    with pytest.raises(ValueError, match="default_0 is fused into the weights"):
        subject.pipe.load_lora_weights(tmp_path)
    subject.pipe.unfuse_lora()
    assert subject.pipe.num_fused_loras == 0
    assert subject.off_by(made) <= SAME


# ------------------------------------------------------------------------------------------------ how it runs
@pytest.fixture
def prior(build: Callable[[str], Subject]) -> Subject:
    """The smallest subject, its own for each test."""
    return build("2.2 prior")


def test_with_model_offload(prior: Subject, tmp_path: Path) -> None:
    before, made = prior.outputs(), prior.make_lora(tmp_path)
    prior.pipe.enable_model_cpu_offload(device="cpu")
    prior.pipe.load_lora_weights(tmp_path)
    assert prior.off_by(made) <= SAME
    assert len(prior.pipe._all_hooks) == 3  # still text encoder, image encoder and prior
    prior.pipe.unload_lora_weights()
    assert prior.off_by(before) <= SAME


def test_with_sequential_offload(prior: Subject, tmp_path: Path) -> None:
    """Up to the call: the name "cpu:0", which diffusers gives the device, is one that accelerate does not take."""
    before, made = prior.outputs(), prior.make_lora(tmp_path / "made")
    prior.pipe.enable_sequential_cpu_offload(device="cpu")
    prior.pipe.load_lora_weights(tmp_path / "made")
    assert {tensor.device.type for tensor in prior.pipe.prior.parameters()} == {"meta"}
    prior.pipe.save_lora_weights(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(again[key], tensor) for key, tensor in load_file(tmp_path / "made" / WEIGHTS).items())
    prior.pipe.remove_all_hooks()
    assert prior.off_by(made) <= SAME
    prior.pipe.enable_sequential_cpu_offload(device="cpu")
    prior.pipe.unload_lora_weights()
    prior.pipe.remove_all_hooks()
    assert prior.off_by(before) <= SAME


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.compile(model)", "model.compile()"])
def test_with_compilation(prior: Subject, tmp_path: Path, wrapped: bool) -> None:
    before, made = prior.outputs(), prior.make_lora(tmp_path)
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
    if wrapped:
        prior.pipe.prior = torch.compile(prior.pipe.prior, **options)
    else:
        prior.pipe.prior.compile(**options)
    assert prior.off_by(before) <= SAME
    prior.pipe.load_lora_weights(tmp_path)
    assert prior.off_by(made) <= SAME
    prior.pipe.set_adapters("default_0", 0.0)
    assert prior.off_by(before) <= SAME
    prior.pipe.unload_lora_weights()
    assert prior.off_by(before) <= SAME


def test_with_group_offload(build: Callable[[str], Subject], tmp_path: Path) -> None:
    subject = build("3.1")
    before, made = subject.outputs(), subject.make_lora(tmp_path / "lora")
    subject.pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", exclude_modules="movq")
    subject.pipe.load_lora_weights(tmp_path / "lora")
    assert subject.off_by(made) <= SAME
    subject.pipe.fuse_lora()
    assert subject.off_by(made) <= SAME
    subject.pipe.unfuse_lora()
    subject.pipe.unload_lora_weights()
    assert subject.off_by(before) <= SAME


def test_a_pipeline_is_saved_with_adapters_in_its_weights_or_not_at_all(prior: Subject, tmp_path: Path) -> None:
    made = prior.make_lora(tmp_path / "lora")
    prior.pipe.load_lora_weights(tmp_path / "lora")
    with pytest.raises(ValueError, match="with which a model cannot be saved"):
        prior.pipe.save_pretrained(tmp_path / "saved")
    prior.pipe.fuse_lora()
    prior.pipe.unload_lora_weights()
    prior.pipe.save_pretrained(tmp_path / "saved")
    prior.pipe.prior = type(prior.pipe).from_pretrained(tmp_path / "saved").prior
    assert prior.off_by(made) <= SAME


def test_what_cannot_be_fused_safely_is_left_as_it_was(prior: Subject, tmp_path: Path) -> None:
    made = prior.make_lora(tmp_path)
    prior.pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="NaN"):
        prior.pipe.fuse_lora(lora_scale=float("nan"), safe_fusing=True)
    assert prior.pipe.num_fused_loras == 0
    assert prior.off_by(made) <= SAME


def test_loading_draws_no_random_numbers_and_keeps_nothing_of_a_dict(prior: Subject, tmp_path: Path) -> None:
    made = prior.make_lora(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    state = torch.get_rng_state()
    prior.pipe.load_lora_weights(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    prior.pipe.unload_lora_weights()
    prior.pipe.load_lora_weights(tensors)
    prior.pipe.set_adapters("default_0", 3.0)  # a dict tells no alpha
    for tensor in tensors.values():
        tensor.zero_()
    assert prior.off_by(made) <= SAME


def test_with_offload_to_disk_it_is_refused(prior: Subject, tmp_path: Path) -> None:
    prior.make_lora(tmp_path / "lora")
    prior.pipe.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=tmp_path / "offloaded"
    )
    with pytest.raises(ValueError, match="`prior` is offloaded to disk"):
        prior.pipe.load_lora_weights(tmp_path / "lora")


def test_hooks_that_cannot_be_put_back_are_refused(prior: Subject, tmp_path: Path) -> None:
    prior.make_lora(tmp_path)
    cpu_offload(prior.pipe.prior, torch.device("cpu"))
    with pytest.raises(ValueError, match="enable_sequential_cpu_offload"):
        prior.pipe.load_lora_weights(tmp_path)


def test_dropout_is_only_for_training(prior: Subject, tmp_path: Path) -> None:
    made = prior.make_lora(tmp_path, lora_dropout=0.5)
    prior.pipe.load_lora_weights(tmp_path)
    assert prior.off_by(made) <= SAME


def test_another_lora_can_take_the_place_of_one(prior: Subject, tmp_path: Path) -> None:
    prior.make_lora(tmp_path / "a")
    made = prior.make_lora(tmp_path / "b", seed=1)
    prior.pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
    prior.pipe.load_lora_weights(tmp_path / "b", adapter_name="a", hotswap=True)
    assert prior.off_by(made) <= SAME


def test_a_model_in_half_precision_gets_a_lora_that_can_be_taken_off(prior: Subject, tmp_path: Path) -> None:
    prior.make_lora(tmp_path)
    prior.pipe.prior.half()
    prior.pipe.load_lora_weights(tmp_path)
    assert {tensor.dtype for tensor in prior.pipe.prior.parameters()} == {torch.float16}
    prior.pipe.unload_lora_weights()
    assert {tensor.dtype for tensor in prior.pipe.prior.parameters()} == {torch.float16}
