"""Every format of a LoRA loads to the same layers; what does not fit is refused with a reason, before a change."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from kandinsky_diffusers import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    lora_files,
    lora_fit,
)
from kandinsky_diffusers.conversion import ConversionError, inspect
from tests.support import tiny22


Tensors = Mapping[str, torch.Tensor]

UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
PRIOR_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def combined() -> Any:
    return KandinskyV22CombinedPipeline(**tiny22.tiny_components())


@pytest.fixture(scope="module")
def pipes(combined: Any) -> dict[str, Any]:
    """Pipelines on the same models by the model that they have; "both" is the combined one."""
    return {"unet": combined.decoder_pipe, "prior": combined.prior_pipe, "both": combined}


@pytest.fixture(autouse=True)
def unload(combined: Any) -> Any:
    yield
    combined.unload_lora_weights()


def random_lora(model: torch.nn.Module, layers: tuple[str, ...], rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA of the first attentions of a model, under peft's names."""
    tensors = {}
    found: list[tuple[str, Any]] = [(name, module) for name, module in model.named_modules() if name.endswith(layers)]
    for name, module in found[: 2 * len(layers)]:
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features)
        tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank)
    return tensors


@pytest.fixture(scope="module")
def loras(combined: Any) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        "unet": random_lora(combined.unet, UNET_LAYERS),
        "prior": random_lora(combined.prior_prior, PRIOR_LAYERS),
    }


def old_names(tensors: Tensors, prefix: str = "") -> dict[str, torch.Tensor]:
    """As the processors of diffusers had them: `down_blocks.1.attentions.0.processor.to_q_lora.down.weight`."""
    renamed = {}
    for key, tensor in tensors.items():
        layer, matrix = key.replace("to_out.0", "to_out").removesuffix(".weight").rsplit(".", 1)
        attention, _, name = layer.rpartition(".")
        side = {"lora_A": "down", "lora_B": "up"}[matrix]
        renamed[f"{prefix}{attention}.processor.{name}_lora.{side}.weight"] = tensor
    return renamed


def prefixed(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def write_peft(tensors: Tensors, folder: Path, pickled: bool = False) -> Path:
    """As `PeftModel.save_pretrained` does, with an alpha of three times the rank."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"])
    config.save_pretrained(str(folder))
    named = prefixed(tensors, "base_model.model.")
    if pickled:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors")
    return folder


def write_old(tensors: Tensors, folder: Path, prefix: str = "", name: str = WEIGHTS) -> Path:
    named = old_names(tensors, prefix)
    if name.endswith(".bin"):
        torch.save(named, folder / name)
    else:
        save_file(named, folder / name)
    return folder


def write_linear(tensors: Tensors, folder: Path, prefix: str) -> Path:
    names = {"lora_A": "lora.down", "lora_B": "lora.up"}
    named = {
        prefix + key.replace(old, new): t for key, t in tensors.items() for old, new in names.items() if old in key
    }
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    alphas = {f"{prefix}{layer}.alpha": torch.tensor(6.0) for layer in layers[:1]}
    save_file({**named, **alphas}, folder / WEIGHTS)
    return folder


def write_diffusers(tensors: Tensors, folder: Path, prefix: str) -> Path:
    save_file(prefixed(tensors, prefix), folder / WEIGHTS)
    return folder


# format -> how it is written, and the scales of the layers, of the first one and of the others
FORMATS: dict[str, tuple[Callable[[Tensors, Path, str], Path], float, float]] = {
    "peft": (lambda tensors, folder, part: write_peft(tensors, folder), 3.0, 3.0),
    "peft, pickled": (lambda tensors, folder, part: write_peft(tensors, folder, pickled=True), 3.0, 3.0),
    "processors": (lambda tensors, folder, part: write_old(tensors, folder), 1.0, 1.0),
    "processors, pickled": (
        lambda tensors, folder, part: write_old(tensors, folder, name="pytorch_lora_weights.bin"),
        1.0,
        1.0,
    ),
    "processors, prefixed": (lambda tensors, folder, part: write_old(tensors, folder, f"{part}."), 1.0, 1.0),
    "processors, by accelerate": (
        lambda tensors, folder, part: write_old(tensors, folder, name="model.safetensors"),
        1.0,
        1.0,
    ),
    "old diffusers": (lambda tensors, folder, part: write_linear(tensors, folder, f"{part}."), 3.0, 1.0),
    "diffusers": (lambda tensors, folder, part: write_diffusers(tensors, folder, f"{part}."), 1.0, 1.0),
    "diffusers, of a model": (lambda tensors, folder, part: write_diffusers(tensors, folder, ""), 1.0, 1.0),
}


@pytest.mark.parametrize("part", ["unet", "prior"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_makes_the_same_layers(pipes: Any, loras: Any, tmp_path: Path, kind: str, part: str) -> None:
    write, first, others = FORMATS[kind]
    pipe, model = pipes[part], getattr(pipes[part], part)
    pipe.load_lora_weights(write(loras[part], tmp_path, part))
    loaded = get_peft_model_state_dict(model, adapter_name="default_0")
    assert loaded.keys() == loras[part].keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in loras[part].items())
    layers = [key.removesuffix(".lora_A.weight") for key in loras[part] if "lora_A" in key]
    scales = [model.get_submodule(layer).scaling["default_0"] for layer in layers]
    assert scales == [first, *[others] * (len(layers) - 1)]
    assert list(pipes["both"].get_list_adapters()) == ["unet" if part == "unet" else "prior_prior"]


@pytest.mark.parametrize("kind", FORMATS)
def test_inspect_names_format_and_model(loras: Any, tmp_path: Path, kind: str) -> None:
    formats = {"processors": "attention processors", "diffusers, of a model": "diffusers"}
    name = formats.get(kind.split(",")[0] if kind.startswith("processors") else kind, kind.split(",")[0])
    for part, version, title in (("unet", "2.x", "UNet"), ("prior", "2.1 or 2.2", "prior")):
        (folder := tmp_path / part).mkdir()
        (report,) = inspect(FORMATS[kind][0](loras[part], folder, part))
        assert (report.version, report.part) == (version, f"LoRA of the {title} ({name})")


def test_a_dict_with_both_parts_goes_to_both_models(pipes: Any, loras: Any) -> None:
    both = {**prefixed(loras["unet"], "unet."), **prefixed(loras["prior"], "prior.")}
    pipes["both"].load_lora_weights(both)
    assert pipes["both"].get_list_adapters() == {"unet": ["default_0"], "prior_prior": ["default_0"]}


def test_of_both_parts_a_decoder_takes_its_own_and_says_so(
    pipes: Any, loras: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(lora_fit.logger, "warning", said.append)
    both = {**prefixed(loras["unet"], "unet."), **prefixed(loras["prior"], "prior.")}
    pipes["unet"].load_lora_weights(both)
    assert pipes["both"].get_list_adapters() == {"unet": ["default_0"]}
    assert said[0].endswith("KandinskyV22Pipeline takes unet, and leaves prior out.")


def test_stock_diffusers_loads_what_is_saved(pipes: Any, combined: Any, tmp_path: Path) -> None:
    """The scale of 3 included, which is in the file's header."""
    fresh: Any = UNet2DConditionModel.from_config(combined.unet.config)
    model = get_peft_model(
        fresh,
        LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path / "peft"))
    pipes["unet"].load_lora_weights(tmp_path / "peft")
    pipes["unet"].save_lora_weights(tmp_path / "saved")
    stock: Any = UNet2DConditionModel.from_config(combined.unet.config)
    stock.load_lora_adapter(tmp_path / "saved", prefix="unet", weight_name=WEIGHTS, adapter_name="x")
    ours = get_peft_model_state_dict(combined.unet, adapter_name="default_0")
    theirs = get_peft_model_state_dict(stock, adapter_name="x")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())
    assert stock.mid_block.attentions[0].to_q.scaling == {"x": 3.0}


# ------------------------------------------------------------------------------------------------ where files are
def test_files_are_found_by_their_names(pipes: Any, loras: Any, tmp_path: Path) -> None:
    (inside := tmp_path / "deep").mkdir()
    save_file(loras["unet"], inside / "style.safetensors")
    for place, options in (
        (inside / "style.safetensors", {}),
        (inside, {}),
        (tmp_path, {"subfolder": "deep"}),
        (str(tmp_path), {"subfolder": "deep", "weight_name": "style.safetensors"}),
    ):
        pipes["unet"].load_lora_weights(place, **options)
        pipes["unet"].unload_lora_weights()
    save_file(loras["unet"], inside / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there are \['other.safetensors', 'style.safetensors'\]"):
        pipes["unet"].load_lora_weights(inside)
    with pytest.raises(FileNotFoundError, match=r"no missing\.bin"):
        pipes["unet"].load_lora_weights(inside, weight_name="missing.bin")


def test_of_a_hub_repository_only_the_lora_is_fetched(
    pipes: Any, loras: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    write_diffusers(loras["unet"], tmp_path, "unet.")

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(lora_files, "snapshot_download", download)
    pipes["unet"].load_lora_weights("someone/lora", revision="v1")
    assert (asked["repo"], asked["revision"]) == ("someone/lora", "v1")
    assert WEIGHTS in asked["allow_patterns"]
    assert "adapter_config.json" in asked["allow_patterns"]
    assert not any("*" in pattern for pattern in asked["allow_patterns"])


# ------------------------------------------------------------------------------------------------ what is refused
class Code:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_code_in_a_pickled_file_is_not_run(pipes: Any, tmp_path: Path) -> None:
    torch.save({"to_q.lora_A.weight": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="no plain tensor needs"):
        pipes["unet"].load_lora_weights(tmp_path)


def test_without_peft_it_is_said_what_to_install(pipes: Any, loras: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"kandinsky-diffusers\[lora\]"):
        pipes["unet"].load_lora_weights(loras["unet"])


def refused(pipe: Any, tensors: Any, message: str, **options: Any) -> None:
    keys = list(pipe.unet.state_dict()) if hasattr(pipe, "unet") else []
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tensors, **options)
    assert not pipe.get_list_adapters()
    assert not keys or list(pipe.unet.state_dict()) == keys


def test_a_lora_for_another_model_is_refused_and_named(pipes: Any, loras: Any, combined: Any) -> None:
    fork = {
        f"down_samples.1.self_attention_block.attention.processor.to_query_lora.{side}.weight": torch.zeros(4, 4)
        for side in ("down", "up")
    }
    takes = "KandinskyV22Pipeline takes LoRAs for `unet`, the UNet of Kandinsky 2.x"
    refused(pipes["unet"], fork, rf"a LoRA for the UNet of Kandinsky 3.x \(format: fork\).*{takes}")
    refused(pipes["unet"], loras["prior"], f"a LoRA for the prior of Kandinsky 2.1 or 2.2.*{takes}")
    refused(pipes["unet"], prefixed(loras["prior"], "prior."), takes)
    stable = {
        f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{m}.weight": torch.zeros(4, 4) for m in "AB"
    }
    refused(pipes["both"], stable, "an unknown model with the layer down_blocks.0.*and `prior_prior`, the prior")


def changed(tensors: Tensors, **replaced: Any) -> dict[str, Any]:
    """With the first tensor of a matrix, `A` or `B`, replaced, or left out for None; `key` adds one."""
    result: dict[str, Any] = dict(tensors)
    for matrix, new in replaced.items():
        if matrix == "key":
            result[new] = torch.zeros(2, 2)
            continue
        key = next(key for key in result if f"lora_{matrix}" in key)
        result.pop(key)
        result |= {} if new is None else {key: new}
    return result


def test_what_does_not_fit_is_named(pipes: Any, loras: Any, tmp_path: Path) -> None:
    unet, pipe = loras["unet"], pipes["unet"]
    refused(pipe, changed(unet, A=None), "has only one of its two matrices")
    refused(pipe, changed(unet, A=torch.zeros(2, 3)), r"has the matrices \[2, 3\] and .* inputs")
    refused(pipe, changed(unet, A=torch.zeros(7, unet[next(iter(unet))].shape[1])), r"has the matrices \[7, ")
    refused(pipe, changed(unet, key="conv_in.weight"), "1 of its 25 keys are not of one: conv_in.weight")
    refused(pipe, changed(unet, key="conv_in.lora_A.bias"), "conv_in.lora_A.bias")
    refused(pipe, {"model.weight": torch.zeros(1)}, "no LoRA of a known format; its keys are model.weight")
    refused(pipe, {}, "no LoRA of a known format")
    refused(pipe, unet, "accepted is a name without dots", adapter_name="a.b")

    write_peft(unet, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for changes, message in (
        ({"r": 8}, "has rank 2, and its configuration says 8"),
        ({"peft_type": "LOHA"}, "`peft_type` LOHA; accepted is LORA"),
        ({"init_lora_weights": "pissa"}, "a model with other weights"),
        ({"rank_pattern": {"(a+)+b": 2}}, "accepted are up to 2 repetitions"),
        ({"target_modules": ".*.*.*x"}, "accepted are up to 2 repetitions"),
        ({"rank_pattern": 3}, "none that peft takes"),
        ({"rank_pattern": {"[": 2}}, "none that peft takes"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        refused(pipe, tmp_path, message)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(text)
        refused(pipe, tmp_path, "not valid JSON")


def test_a_configuration_does_not_say_what_is_imported(pipes: Any, loras: Any, tmp_path: Path) -> None:
    """As peft does for `megatron_core`, whatever module that names."""
    write_peft(loras["unet"], tmp_path)
    path = tmp_path / "adapter_config.json"
    named = {"megatron_config": {"a": 1}, "megatron_core": "a_module_that_would_be_imported"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    pipes["unet"].load_lora_weights(tmp_path)
    assert pipes["unet"].get_active_adapters()


def test_nothing_is_loaded_where_one_part_does_not_fit(pipes: Any, loras: Any) -> None:
    bad = prefixed(changed(loras["prior"], B=torch.zeros(3, 2)), "prior.")
    refused(pipes["both"], {**prefixed(loras["unet"], "unet."), **bad}, "does not fit")


def test_names_and_weights_are_checked(pipes: Any, loras: Any, tmp_path: Path) -> None:
    pipe = pipes["both"]
    pipe.load_lora_weights(loras["unet"], adapter_name="a")
    for call, message in (
        (lambda: pipe.load_lora_weights(loras["prior"], adapter_name="a"), "`adapter_name` 'a' is taken"),
        (lambda: pipe.load_lora_weights(loras["unet"], adapter_name="b", hotswap=True), r"accepted is one of \['a'\]"),
        (lambda: pipe.set_adapters("b"), r"`adapter_names` has 'b'; loaded are \['a'\]"),
        (lambda: pipe.set_adapters("a", [1.0, 2.0]), "accepted is one for each of 1 adapters"),
        (lambda: pipe.set_adapters("a", {"vae": 1.0}), "`adapter_weights` is 'vae'"),
        (lambda: pipe.delete_adapters("b"), "`adapter_names` has 'b'"),
        (lambda: pipe.fuse_lora(adapter_names=["b"]), "`adapter_names` has 'b'"),
        (lambda: pipe.fuse_lora(components=["movq"]), "`components` is 'movq'"),
        (lambda: pipe.save_lora_weights(tmp_path, adapter_name="b"), "`adapter_names` has 'b'"),
        (lambda: KandinskyV22Pipeline.save_lora_weights(tmp_path), "on the class, accepted is one of them"),
        (lambda: pipe.save_lora_weights(__file__), "a file; accepted is a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    pipe.load_lora_weights(loras["prior"], adapter_name="b")
    with pytest.raises(ValueError, match=r"accepted is one of the loaded adapters: \['a', 'b'\]"):
        pipe.save_lora_weights(tmp_path)
    pipe.set_adapters(["a", "b"], [{"unet": 0.5}, {"prior_prior": 0.25}])
    assert pipe.get_active_adapters() == ["a", "b"]
    layers = [module for model in (pipe.unet, pipe.prior_prior) for module in model.modules()]
    scales = [scale for layer in layers for scale in getattr(layer, "scaling", {}).items()]
    assert set(scales) == {("a", 0.5), ("b", 0.25)}
    pipe.save_lora_weights(tmp_path, adapter_name="b", is_main_process=False)
    assert not list(tmp_path.iterdir())
