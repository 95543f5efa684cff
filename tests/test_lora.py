"""LoRA on every family: what is loaded acts, is saved exactly, and leaves no trace when it is taken off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

import kandinsky_diffusers
from tests.support import tiny22


KINDS = ["2.0", "2.1", "2.2", "3.1"]
SAME = 1e-5  # of the largest output: where weights moved in memory, sums are made in another order
TARGETS = ("to_q", "to_out.0")
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

    def make_lora(
        self, seed: int, folder: Path, targets: tuple[str, ...] = ("to_q", "to_out.0"), alpha: int = 6
    ) -> Any:
        """Save a random LoRA of rank 2 in the format of diffusers, as a training does; returns what it does."""
        torch.manual_seed(seed)
        arguments: dict[str, Any] = {}
        for name, model in self.models.items():
            config = LoraConfig(r=2, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False)
            model.add_adapter(config, "made")
            part = name.removeprefix("prior_")
            layers = get_peft_model_state_dict(model, adapter_name="made")
            arguments[f"{part}_lora_layers"] = {key: tensor.clone() for key, tensor in layers.items()}
            arguments[f"{part}_lora_adapter_metadata"] = model.peft_config["made"].to_dict()
        outputs = self.outputs()
        type(self.pipe).save_lora_weights(folder, **arguments)
        self.pipe.unload_lora_weights()
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
        if kind == "2.2":
            pipe = kandinsky_diffusers.KandinskyV22CombinedPipeline(**tiny22.tiny_components())
        else:
            pipe = AutoPipelineForText2Image.from_pretrained(repos[kind])
        pipe.set_progress_bar_config(disable=True)
        calls: dict[str, tuple[Any, Any]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                if not kwargs.get("project") and not kwargs.get("prefill"):
                    calls.setdefault(name, (args, kwargs))

            return hook

        names = ["unet", "prior_prior"] if hasattr(pipe, "prior_prior") else ["unet"]
        hooks = [getattr(pipe, name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
        steps = {"prior_num_inference_steps": 2} if len(names) == 2 else {}
        pipe.exact_reference()("a cat", height=64, width=64, num_inference_steps=2, output_type="latent", **steps)
        for hook in hooks:
            hook.remove()
        return Subject(pipe, calls)

    return make


@pytest.fixture(scope="module")
def subjects(build: Callable[[str], Subject]) -> Callable[[str], Subject]:
    """The same subject for all tests of a version."""
    return cache(build)


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Any:
    made = subjects(request.param)
    yield made
    made.pipe.unfuse_lora()
    made.pipe.unload_lora_weights()


def test_what_is_loaded_acts_as_when_it_was_made_and_is_saved_exactly(subject: Subject, tmp_path: Path) -> None:
    before = subject.outputs()
    made = subject.make_lora(0, tmp_path / "made")
    subject.pipe.load_lora_weights(tmp_path / "made")
    assert subject.off_by(before) > 1e-2
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


def test_unloading_leaves_no_trace(subject: Subject, tmp_path: Path) -> None:
    def state() -> dict[str, Any]:
        return {
            name: (
                repr(model),
                {key: tensor.clone() for key, tensor in model.state_dict().items()},
                vars(model).keys(),
                {key for key, tensor in model.named_parameters() if tensor.requires_grad},
            )
            for name, model in subject.models.items()
        }

    subject.make_lora(0, tmp_path)
    outputs, before = subject.outputs(), state()
    subject.pipe.load_lora_weights(tmp_path)
    assert not subject.off_by(outputs) <= SAME
    subject.pipe.unload_lora_weights()
    for name, (text, tensors, attributes, trainable) in state().items():
        assert text == before[name][0]
        assert list(tensors) == list(before[name][1])
        assert all(torch.equal(tensor, before[name][1][key]) for key, tensor in tensors.items())
        assert attributes == before[name][2]
        assert trainable == before[name][3]
    assert subject.off_by(outputs) <= SAME
    assert subject.pipe.get_list_adapters() == {}


def test_two_adapters_add_up_in_any_order(subject: Subject, tmp_path: Path) -> None:
    subject.make_lora(0, tmp_path / "a")
    subject.make_lora(1, tmp_path / "b", targets=("to_v", "to_q"))
    seen = []
    for names in ("ab", "ba"):
        for name in names:
            subject.pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        assert subject.pipe.get_active_adapters() == [names[1]]
        subject.pipe.set_adapters(["a", "b"], [0.5, 0.25])
        assert subject.pipe.get_active_adapters() == ["a", "b"]
        seen.append(subject.outputs())
        subject.pipe.unload_lora_weights()
    assert all(torch.allclose(seen[0][name], seen[1][name], atol=1e-5) for name in seen[0])


def test_weights_scale_and_deleting_the_other_gives_the_one(subject: Subject, tmp_path: Path) -> None:
    before = subject.outputs()
    for seed, name in enumerate("ab"):
        made = subject.make_lora(seed, tmp_path / name, alpha=3)
        subject.pipe.unload_lora_weights()
    for name in "ab":
        subject.pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    subject.pipe.set_adapters("b", 0.0)
    assert subject.off_by(before) <= SAME
    subject.pipe.set_adapters(["a", "b"], [1.0, 1.0])
    subject.pipe.delete_adapters("a")
    assert subject.off_by(made) <= SAME
    subject.pipe.disable_lora()
    assert subject.off_by(before) <= SAME
    subject.pipe.enable_lora()
    subject.pipe.delete_adapters("b")
    assert not any("lora" in key for model in subject.models.values() for key in model.state_dict())


def test_fusing_and_back(subject: Subject, tmp_path: Path) -> None:
    made = subject.make_lora(0, tmp_path)
    subject.pipe.load_lora_weights(tmp_path)
    subject.pipe.set_adapters("default_0", 0.5)
    half = subject.outputs()
    subject.pipe.set_adapters("default_0")
    subject.pipe.fuse_lora(lora_scale=0.5)
    assert subject.pipe.num_fused_loras == 1
    assert subject.off_by(half) <= SAME
    subject.pipe.unfuse_lora()
    assert subject.pipe.num_fused_loras == 0
    assert subject.off_by(made) <= SAME
