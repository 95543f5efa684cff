"""Layout `combined`: every decoder with its prior inside, in one repository that needs no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import ConversionError, convert


PRIOR_PARTS = ("prior", "text_encoder", "image_encoder", "tokenizer", "image_processor", "scheduler")
DECODERS_21 = {
    "kandinsky-2-1": "KandinskyCombinedPipeline",
    "kandinsky-2-1-inpaint": "KandinskyInpaintCombinedPipeline",
}
DECODERS_22 = {
    "kandinsky-2-2-decoder": "KandinskyV22CombinedPipeline",
    "kandinsky-2-2-decoder-inpaint": "KandinskyV22InpaintCombinedPipeline",
    "kandinsky-2-2-controlnet-depth": "KandinskyV22ControlnetCombinedPipeline",
}


@pytest.fixture(scope="module")
def combined_21(goldens_21, release_21, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("combined")
    config = goldens_21.path / "hyperparameters.json"
    clip = release_21 / "clip"
    convert(release_21, output, clip=clip, original_config=config, layout="combined", verify=True)
    return output


@pytest.fixture(scope="module")
def combined_22(community_22, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("combined")
    convert(community_22, output, layout="combined", verify=True)
    return output


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("release", "decoders"), [("combined_21", DECODERS_21), ("combined_22", DECODERS_22)])
def test_each_decoder_holds_its_prior_and_there_is_no_other_repository(release, decoders, request):
    output = request.getfixturevalue(release)
    assert {path.name for path in output.iterdir()} == decoders.keys()
    for name, pipeline in decoders.items():
        index = read(output / name / "model_index.json")
        assert index["_class_name"] == pipeline
        assert {f"prior_{part}" for part in PRIOR_PARTS} <= index.keys()
        assert all((output / name / folder).is_dir() for folder in index if not folder.startswith("_"))
        facts = read(output / name / "conversion.json")
        assert facts["options"]["layout"] == "combined"
        assert facts["verification"]["bit_identical_tensors"].keys() >= {"unet", "movq", "prior_prior"}
        assert facts["verification"]["loaded_and_run"] == pipeline
        assert "prior" not in ModelCard.load(output / name / "README.md").data.to_dict()


STOCK = """
import sys
from diffusers import AutoPipelineForInpainting, AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image
size = dict(height=64, width=64, num_inference_steps=1, prior_num_inference_steps=2)
names = []
for text, inpaint in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = AutoPipelineForText2Image.from_pretrained(text)
    image = pipe("a hat", **size).images[0]
    names.append(type(DiffusionPipeline.from_pretrained(text)).__name__)
    pipe = AutoPipelineForInpainting.from_pretrained(inpaint)
    pipe("a hat", image=image, mask_image=Image.new("L", image.size, 255), **size)
    names.append(type(pipe).__name__)
result = names
"""


def test_they_load_and_run_in_stock_diffusers_without_us_and_without_a_network(combined_21, combined_22, stock):
    classes = {**DECODERS_21, **dict([*DECODERS_22.items()][:2])}
    repos = [
        next(folder / name for folder in (combined_21, combined_22) if (folder / name).exists()) for name in classes
    ]
    assert stock.run(STOCK, *repos) == [*classes.values()]


def test_the_prior_inside_is_the_prior_apart(combined_21, converted_21, combined_22, community_22):
    for combined, prior in (
        (combined_21 / "kandinsky-2-1", converted_21 / "kandinsky-2-1-prior"),
        (combined_22 / "kandinsky-2-2-controlnet-depth", community_22 / "prior"),
    ):
        inside = AutoPipelineForText2Image.from_pretrained(combined).prior_pipe
        apart = DiffusionPipeline.from_pretrained(prior)
        drawn = [pipe("red cat", num_inference_steps=2, generator=torch.manual_seed(0)) for pipe in (inside, apart)]
        assert torch.equal(drawn[0].image_embeds, drawn[1].image_embeds)


def test_a_missing_prior_is_named(community_22, tmp_path):
    for name in ("text", "inpainting"):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / name).symlink_to(community_22 / name)
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--layout", "combined"]
    )
    assert result.exit_code == 1
    assert "repository of the prior is missing" in result.stderr
    assert result.stderr.count("is missing") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_part_of_the_prior_is_named(release_21, goldens_21, tmp_path):
    for path in release_21.iterdir():
        if path.name != "prior_fp16.ckpt":
            (tmp_path / path.name).symlink_to(path)
    options = {"clip": release_21 / "clip", "original_config": goldens_21.path / "hyperparameters.json"}
    with pytest.raises(ConversionError, match=r"prior_fp16\.ckpt is missing"):
        convert(tmp_path, tmp_path / "out", layout="combined", **options)


def test_a_prior_alone_cannot_be_combined(community_22, tmp_path):
    with pytest.raises(ConversionError, match=r"unet/\S+ of the decoder"):
        convert(community_22 / "prior", tmp_path / "out", layout="combined")


def test_an_unknown_layout_is_refused_with_those_that_are_known(community_22, tmp_path):
    with pytest.raises(ConversionError, match=r"layout is 'joined'; accepted are split, combined\."):
        convert(community_22, tmp_path / "out", layout="joined")
