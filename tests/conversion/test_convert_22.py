"""Kandinsky 2.2: the community's repositories, in whatever form, become safetensors with the same pictures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.pipelines import kandinsky2_2
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

import kandinsky_diffusers
from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import ConversionError, convert, inspect, plan
from tests.support.tiny22 import decoder_components


REPOS = {
    "prior": "kandinsky-2-2-prior",
    "text": "kandinsky-2-2-decoder",
    "inpainting": "kandinsky-2-2-decoder-inpaint",
    "depth": "kandinsky-2-2-controlnet-depth",
}
STEPS = {"num_inference_steps": 2, "prior_num_inference_steps": 2}
SIZE = {"height": 64, "width": 64}


@pytest.fixture
def source(community_22: Path, tmp_path: Path) -> Path:
    """A copy of two of the repositories that a test may spoil."""
    for name in ("text", "inpainting"):
        shutil.copytree(community_22 / name, tmp_path / "source" / name)
    return tmp_path / "source"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


# ------------------------------------------------------------------------------------------------ what comes out


def stock_picture(source: Path, decoder: Any, **inputs: Any) -> np.ndarray:
    """What stock's pipelines draw with the source's prior."""
    prior = kandinsky2_2.KandinskyV22PriorPipeline.from_pretrained(source / "prior")
    generator = torch.Generator().manual_seed(3)
    embeds = prior("red cat", num_inference_steps=2, generator=generator)
    steps = {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
    return decoder(**embeds, **inputs, **SIZE, **steps).images


def our_picture(auto: type, repo: Path, **inputs) -> np.ndarray:
    pipe = auto.from_pretrained(repo).exact_reference(True)
    generator = torch.Generator().manual_seed(3)
    return pipe("red cat", **inputs, **SIZE, **STEPS, output_type="np", generator=generator).images


def test_text_to_image_is_bit_equal_to_stock_on_the_source(community_22, converted_22):
    stock = kandinsky2_2.KandinskyV22Pipeline.from_pretrained(community_22 / "text")
    expected = stock_picture(community_22, stock)
    assert np.array_equal(our_picture(AutoPipelineForText2Image, converted_22 / REPOS["text"]), expected)


def test_control_is_bit_equal_to_stock_on_the_source_whose_movq_has_old_names(community_22, converted_22):
    hint = {"hint": torch.rand(1, 3, 64, 64)}
    stock = kandinsky2_2.KandinskyV22ControlnetPipeline.from_pretrained(community_22 / "depth")
    expected = stock_picture(community_22, stock, **hint)
    assert np.array_equal(our_picture(AutoPipelineForText2Image, converted_22 / REPOS["depth"], **hint), expected)


def test_inpainting_is_bit_equal_to_stock_on_the_source(community_22, converted_22):
    # tensors: where numpy puts an array in memory, last bits may hang on it
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, :32] = 1
    inputs = {"image": torch.rand(1, 3, 64, 64) * 2 - 1, "mask_image": mask}
    # stock cannot load pickled shards: the components that were saved stand for them
    stock = kandinsky2_2.KandinskyV22InpaintPipeline(**decoder_components("inpaint"))
    expected = stock_picture(community_22, stock, **inputs)
    assert np.array_equal(
        our_picture(AutoPipelineForInpainting, converted_22 / REPOS["inpainting"], **inputs), expected
    )


def test_weights_in_whole_precision_go_before_a_variant(community_22, converted_22):
    written = weights(converted_22 / REPOS["inpainting"] / "unet")
    shards = sorted((community_22 / "inpainting" / "unet").glob("diffusion_pytorch_model-*.bin"))
    original = {key: t for path in shards for key, t in torch.load(path, weights_only=True).items()}
    assert len(shards) > 1
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in original.items())


def test_small_files_come_along_complete(community_22, converted_22):
    prior = converted_22 / REPOS["prior"]
    names = {path.name for path in (prior / "tokenizer").iterdir()}
    assert names >= {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}
    processor = read(prior / "image_processor" / "preprocessor_config.json")
    assert processor["image_processor_type"] == "CLIPImageProcessor"
    assert read(prior / "model_index.json")["image_processor"] == ["transformers", "CLIPImageProcessor"]
    for name, repo in REPOS.items():
        config = "scheduler/scheduler_config.json"
        assert read(converted_22 / repo / config) == read(community_22 / name / config)


def test_another_scheduler_than_the_published_one_is_kept(source, tmp_path):
    config = source / "text" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("DDPMScheduler", "DDIMScheduler"))
    convert(source / "text", tmp_path / "out")
    assert read(tmp_path / "out" / REPOS["text"] / "model_index.json")["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_every_source_file_is_on_record_shards_and_indices_too(community_22, converted_22):
    for name, repo in REPOS.items():
        facts = read(converted_22 / repo / "conversion.json")
        card = (converted_22 / repo / "README.md").read_text(encoding="utf-8")
        for record in facts["sources"].values():
            digest = hashlib.sha256((community_22 / name / record["file"]).read_bytes()).hexdigest()
            assert (record["sha256"], record["sha256"] in card) == (digest, True)
        assert str(community_22) not in card + json.dumps(facts)
    inpainting = read(converted_22 / REPOS["inpainting"] / "conversion.json")["sources"].values()
    assert sum(".bin" in record["file"] for record in inpainting) == len(inpainting) >= 6


def test_what_old_files_hold_for_nothing_is_dropped_and_said(converted_22):
    facts = read(converted_22 / REPOS["prior"] / "conversion.json")["components"]
    assert list(facts["image_encoder"]["dropped"]) == ["vision_model.embeddings.position_ids"]
    assert not any("query" in key for key in weights(converted_22 / REPOS["depth"] / "movq"))


def test_variant_is_cast_and_sharded_and_the_card_says_how_to_load_it(community_22, tmp_path):
    report = convert(community_22, tmp_path / "out", variant="fp16", max_shard_size="1MB", verify=True)
    for repo in REPOS.values():
        assert report.verified[repo] == read(tmp_path / "out" / repo / "conversion.json")["verification"]
    unet = tmp_path / "out" / REPOS["text"] / "unet"
    assert (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert {t.dtype for t in weights(unet).values()} == {torch.float16}
    assert {t.dtype for t in weights(tmp_path / "out" / REPOS["text"] / "movq").values()} == {torch.float32}
    assert 'variant="fp16"' in (tmp_path / "out" / REPOS["text"] / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ what goes in


def test_one_repository_is_a_source_too_and_what_is_missing_is_said(community_22, tmp_path):
    report = convert(community_22 / "depth", tmp_path, dtype="bfloat16")
    assert [path.name for path in report.repos] == [REPOS["depth"]]
    assert report.skipped.keys() == set(REPOS.values()) - {REPOS["depth"]}
    assert {t.dtype for t in weights(tmp_path / REPOS["depth"] / "movq").values()} == {torch.bfloat16}


def test_a_source_that_has_the_name_of_a_result_is_never_overwritten(source):
    (source / "text").rename(source / REPOS["text"])
    with pytest.raises(ConversionError, match="holds the source"):
        convert(source, source, overwrite=True)
    assert (source / REPOS["text"] / "unet" / "diffusion_pytorch_model.bin").is_file()


def test_only_half_precision_is_taken_where_there_is_nothing_else(source, tmp_path):
    for path in source.glob("inpainting/*/diffusion_pytorch_model*.bin*"):
        path.unlink()
    convert(source / "inpainting", tmp_path / "out")
    assert {t.dtype for t in weights(tmp_path / "out" / REPOS["inpainting"] / "unet").values()} == {torch.float16}


def test_a_plan_accounts_for_every_key_and_says_what_it_cannot_know(community_22):
    result = CliRunner().invoke(app, ["convert", str(community_22), "--plan"])
    assert result.exit_code == 0, result.stderr
    assert "controlnet/movq -> movq (VQModel): 307 keys make 307 tensors" in result.stdout
    single = community_22 / "text" / "unet" / "diffusion_pytorch_model.bin"
    assert "not compared" not in CliRunner().invoke(app, ["convert", str(single), "--plan"]).stdout
    (alone,) = plan({key: tuple(t.shape) for key, t in torch.load(single, weights_only=True).items()})
    assert alone.component.class_name == "UNet2DConditionModel"
    assert "not compared" in alone.notes[0]


def test_inspect_tells_the_parts_apart(community_22):
    found = {report.path.relative_to(community_22).parts[:2]: report for report in inspect(community_22)}
    parts = {place: (report.version, report.part) for place, report in found.items() if place[1] != "movq"}
    assert parts["text", "unet"] == ("2.2", "decoder/unet")
    assert parts["depth", "unet"] == ("2.2", "controlnet/unet")
    assert parts["prior", "text_encoder"] == ("2.2", "prior/text_encoder")
    assert parts["prior", "image_encoder"] == ("2.2", "prior/image_encoder")


# ------------------------------------------------------------------------------------------------ faults


def change(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**torch.load(path, weights_only=True), **changes}
    torch.save({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**read(path), **changes}))


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
UNET, MOVQ = "unet/diffusion_pytorch_model.bin", "movq/diffusion_pytorch_model.bin"
SHARD = "unet/diffusion_pytorch_model-00002-of-00002.bin"
NANS = torch.full((4,), float("nan"))

# name: the repository, what happens to it, and a part of the message
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no weights": ("text", lambda r: (r / MOVQ).unlink(), "movq/diffusion_pytorch_model.safetensors is missing in"),
    "no config": ("text", lambda r: (r / "unet/config.json").unlink(), "unet/config.json"),
    "no tokenizer": ("prior", lambda r: shutil.rmtree(r / "tokenizer"), "No tokenizer"),
    "no image processor": ("prior", lambda r: shutil.rmtree(r / "image_processor"), "preprocessor_config.json"),
    "no scheduler": ("depth", lambda r: shutil.rmtree(r / "scheduler"), "scheduler_config.json"),
    "unknown scheduler": ("text", lambda r: edit(r / SCHEDULER, _class_name="Metronome"), "Metronome"),
    "truncated file": ("text", lambda r: os.truncate(r / UNET, 1000), f"text/{UNET} (1000 bytes)"),
    "truncated shard": ("inpainting", lambda r: os.truncate(r / SHARD, 1000), f"{SHARD} (1000 bytes)"),
    "missing shard": ("inpainting", lambda r: (r / SHARD).unlink(), "00002.bin', which is not a file beside it"),
    "key in no shard": ("inpainting", lambda r: change(r / SHARD, **{"conv_out.bias": None}), "conv_out.bias"),
    "one key too many": ("text", lambda r: change(r / UNET, surplus=torch.zeros(2)), "--drop"),
    "one key too few": ("text", lambda r: change(r / UNET, **{"conv_in.bias": None}), "conv_in.bias"),
    "other sizes than configured": (
        "text",
        lambda r: edit(r / "unet/config.json", cross_attention_dim=40),
        "the model has [64, 40]",
    ),
    "configuration of no model": (
        "text",
        lambda r: edit(r / "unet/config.json", block_out_channels=[3]),
        "do not make a model",
    ),
    "NaN": ("text", lambda r: change(r / MOVQ, **{"quant_conv.bias": NANS}), f"quant_conv.bias of text/{MOVQ}"),
    "wrong file": ("text", lambda r: shutil.copyfile(r / MOVQ, r / UNET), "looks like the decoder/movq"),
    "UNet of nothing known": ("text", lambda r: edit(r / "unet/config.json", in_channels=5), "in_channels 5"),
    "twice": ("text", lambda r: shutil.copytree(r, r.with_name("twin")), "both the decoder"),
    "combined": ("text", lambda r: edit(r / INDEX, _class_name="KandinskyV22CombinedPipeline"), "accepted are"),
    "index that is no JSON": ("text", lambda r: (r / INDEX).write_text("{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_source_gives_one_message_and_nothing_else(name, community_22, tmp_path):
    repo, spoil, message = FAULTS[name]
    spoil(shutil.copytree(community_22 / repo, tmp_path / "source" / repo))
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "source"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("Error:") == 1
    assert not list((tmp_path / "out").glob("*")) + list((tmp_path / "out").glob(".*"))


def test_an_unknown_key_can_be_dropped_and_is_on_record(source, tmp_path):
    change(source / "text" / UNET, surplus=torch.zeros(2))
    report = convert(source / "text", tmp_path / "out", drop=["surplus"])
    assert report.dropped == [("unet/diffusion_pytorch_model.bin", "surplus", "left out with --drop")]


# ------------------------------------------------------------------------------------------------ cards


@pytest.mark.parametrize("repo", REPOS.values())
def test_cards_name_the_prior_as_a_list(converted_22, repo):
    data = ModelCard.load(converted_22 / repo / "README.md").data
    assert data.license == "apache-2.0"
    assert {"kandinsky", "kandinsky-2.2"} <= set(data.tags)
    named = data.to_dict().get("prior")
    assert named == (None if repo == REPOS["prior"] else ["kandinsky-community/kandinsky-2-2-prior"])


def test_the_package_has_the_pipelines_that_the_repositories_name(converted_22):
    for repo in REPOS.values():
        assert hasattr(kandinsky_diffusers, read(converted_22 / repo / "model_index.json")["_class_name"])
