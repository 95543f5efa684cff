"""What a conversion writes: repositories that stock diffusers loads, complete, with their provenance."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from kandinsky_diffusers.conversion import ConversionError, convert


REPOS = ("kandinsky-2-1", "kandinsky-2-1-inpaint", "kandinsky-2-1-prior")
DECODERS = REPOS[:2]


@pytest.fixture(scope="module")
def options(goldens_21, release_21):
    return {"clip": release_21 / "clip", "original_config": goldens_21.path / "hyperparameters.json"}


@pytest.fixture
def prior_only(release_21, tmp_path):
    """The smallest release: nothing but the prior."""
    folder = tmp_path / "release"
    folder.mkdir()
    for name in ("prior_fp16.ckpt", "ViT-L-14_stats.th"):
        shutil.copyfile(release_21 / name, folder / name)
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


STOCK = """
import sys
import torch
from diffusers import DiffusionPipeline
from PIL import Image
prior = DiffusionPipeline.from_pretrained(sys.argv[1] + "/kandinsky-2-1-prior", torch_dtype=torch.float32)
decoder = DiffusionPipeline.from_pretrained(sys.argv[1] + "/kandinsky-2-1", torch_dtype=torch.float32)
inpaint = DiffusionPipeline.from_pretrained(sys.argv[1] + "/kandinsky-2-1-inpaint", torch_dtype=torch.float32)
embeds = prior("a hat", num_inference_steps=2).to_tuple()
options = dict(image_embeds=embeds[0], negative_image_embeds=embeds[1], height=64, width=64, num_inference_steps=1)
image = decoder("a hat", **options).images[0]
inpaint("a hat", image=image, mask_image=Image.new("L", image.size, 255), **options)
result = [type(pipe).__name__ for pipe in (prior, decoder, inpaint)]
"""


def test_the_repositories_load_and_run_in_stock_diffusers_without_us(converted_21, stock):
    assert stock.run(STOCK, converted_21) == [
        "KandinskyPriorPipeline",
        "KandinskyPipeline",
        "KandinskyInpaintPipeline",
    ]


def test_the_index_names_stock_classes_under_their_portable_names(converted_21):
    index = read(converted_21 / "kandinsky-2-1" / "model_index.json")
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["movq"] == ["diffusers", "VQModel"]
    assert index["text_encoder"] == ["kandinsky", "MultilingualCLIP"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["tokenizer"] == ["transformers", "XLMRobertaTokenizer"]
    assert not any(name.endswith("_scheduler") for name in index)
    prior = read(converted_21 / "kandinsky-2-1-prior" / "model_index.json")
    assert prior["image_processor"] == ["transformers", "CLIPImageProcessor"]
    processor = read(converted_21 / "kandinsky-2-1-prior" / "image_processor" / "preprocessor_config.json")
    assert processor["image_processor_type"] == "CLIPImageProcessor"


def test_tokenizers_have_their_fast_and_their_slow_files(converted_21):
    prior = {path.name for path in (converted_21 / "kandinsky-2-1-prior" / "tokenizer").iterdir()}
    assert prior >= {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}
    for repo in DECODERS:
        names = {path.name for path in (converted_21 / repo / "tokenizer").iterdir()}
        assert names >= {"tokenizer.json", "sentencepiece.bpe.model", "tokenizer_config.json"}


@pytest.mark.parametrize("repo", DECODERS)
def test_decoders_carry_the_three_samplers(converted_21, repo):
    import diffusers

    import kandinsky_diffusers

    ddim = diffusers.DDIMScheduler.from_pretrained(converted_21 / repo / "scheduler")
    assert (ddim.config.beta_start, ddim.config.beta_end, ddim.config.beta_schedule) == (0.00085, 0.012, "linear")
    assert (ddim.config.clip_sample, ddim.config.set_alpha_to_one, ddim.config.steps_offset) == (False, False, 1)
    ddpm = diffusers.DDPMScheduler.from_pretrained(converted_21 / repo, subfolder="ddpm_scheduler")
    assert (ddpm.config.variance_type, ddpm.config.thresholding) == ("learned_range", True)
    ancestral = read(converted_21 / repo / "ancestral_scheduler" / "scheduler_config.json")
    cls = getattr(kandinsky_diffusers, ancestral["_class_name"])
    assert cls.from_pretrained(converted_21 / repo, subfolder="ancestral_scheduler").config.denoised_range == 2.0


def test_every_tensor_keeps_its_own_dtype(converted_21):
    decoder = converted_21 / "kandinsky-2-1"
    assert {t.dtype for t in weights(decoder / "unet").values()} == {torch.float16}
    assert {t.dtype for t in weights(decoder / "movq").values()} == {torch.float32}
    prior = weights(converted_21 / "kandinsky-2-1-prior" / "prior")
    assert prior["prd_embedding"].dtype == torch.float16
    assert prior["clip_mean"].dtype == torch.float32


@pytest.mark.parametrize("repo", REPOS)
def test_cards_and_records_name_every_source_file(converted_21, release_21, repo):
    facts = read(converted_21 / repo / "conversion.json")
    card = (converted_21 / repo / "README.md").read_text(encoding="utf-8")
    assert facts["sources"]
    for source in facts["sources"].values():
        folder = release_21 / "clip" if source["folder"] == "clip" else release_21
        digest = hashlib.sha256((folder / source["file"]).read_bytes()).hexdigest()
        assert source["sha256"] == digest
        assert digest in card
    assert str(release_21) not in card + json.dumps(facts)


@pytest.mark.parametrize("repo", REPOS)
def test_cards_have_valid_front_matter_and_decoders_a_list_of_priors(converted_21, repo):
    data = ModelCard.load(converted_21 / repo / "README.md").data
    assert data.license == "apache-2.0"
    assert "kandinsky-2.1" in data.tags
    if repo in DECODERS:
        assert data.to_dict()["prior"] == ["kandinsky-community/kandinsky-2-1-prior"]


def test_what_was_left_out_is_said(converted_21):
    facts = read(converted_21 / "kandinsky-2-1" / "conversion.json")
    assert list(facts["components"]["text_encoder"]["dropped"]) == ["transformer.embeddings.position_ids"]
    assert "transformer.embeddings.position_ids" in (converted_21 / "kandinsky-2-1" / "README.md").read_text()


def test_a_key_left_out_with_drop_is_on_record(prior_only, options, tmp_path):
    tensors = torch.load(prior_only / "prior_fp16.ckpt", weights_only=True)
    torch.save({**tensors, "ema.decay": torch.ones(1)}, prior_only / "prior_fp16.ckpt")
    with pytest.raises(ConversionError, match=r"ema\.decay"):
        convert(prior_only, tmp_path / "out", **options)
    report = convert(prior_only, tmp_path / "out", drop=["ema.*"], **options)
    assert ("prior_fp16.ckpt", "ema.decay", "left out with --drop") in report.dropped
    repo = tmp_path / "out" / "kandinsky-2-1-prior"
    assert read(repo / "conversion.json")["components"]["prior"]["dropped"] == {"ema.decay": "left out with --drop"}
    assert "ema.decay" in (repo / "README.md").read_text()


def test_text_encoder_sizes_survive_stock_configuration(converted_21, goldens_21):
    from diffusers.pipelines.kandinsky import MultilingualCLIP

    model = MultilingualCLIP.from_pretrained(converted_21 / "kandinsky-2-1", subfolder="text_encoder")
    sizes = goldens_21.hyperparameters["text_enc_params"]
    assert model.LinearTransformation.in_features == sizes["in_features"]
    assert model.LinearTransformation.out_features == sizes["out_features"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_casts_every_number(prior_only, options, tmp_path, dtype):
    convert(prior_only, tmp_path / "out", dtype=dtype, **options)
    wanted = getattr(torch, dtype)
    for folder in ("prior", "text_encoder", "image_encoder"):
        written = weights(tmp_path / "out" / "kandinsky-2-1-prior" / folder)
        assert {t.dtype for t in written.values() if t.is_floating_point()} == {wanted}


def test_variant_casts_names_the_files_and_verifies(release_21, options, tmp_path):
    from diffusers import DiffusionPipeline

    report = convert(release_21, tmp_path, variant="fp16", max_shard_size="2MB", verify=True, **options)
    decoder = tmp_path / "kandinsky-2-1"
    assert (decoder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert len(list((decoder / "unet").glob("diffusion_pytorch_model.fp16-*-of-*.safetensors"))) > 1
    assert {t.dtype for t in weights(decoder / "text_encoder").values()} == {torch.float16}
    assert {t.dtype for t in weights(decoder / "movq").values()} == {torch.float32}
    for repo in REPOS:
        assert DiffusionPipeline.from_pretrained(tmp_path / repo, variant="fp16", torch_dtype=torch.float16)
        assert report.verified[repo] == read(tmp_path / repo / "conversion.json")["verification"]
        assert "compared bit for bit" in (tmp_path / repo / "README.md").read_text()


def test_a_repository_without_its_main_file_is_left_out_and_said(prior_only, options, tmp_path):
    report = convert(prior_only, tmp_path / "out", **options)
    assert [path.name for path in report.repos] == ["kandinsky-2-1-prior"]
    assert report.skipped == {
        "kandinsky-2-1": "decoder_fp16.ckpt is not in the release",
        "kandinsky-2-1-inpaint": "inpainting_fp16.ckpt is not in the release",
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kandinsky-2-1-prior"]


def test_clip_may_come_as_pytorch_file_and_without_some_tokenizer_files(prior_only, release_21, options, tmp_path):
    clip = tmp_path / "clip"
    shutil.copytree(release_21 / "clip", clip)
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    for name in ("model.safetensors", "tokenizer.json"):
        (clip / name).unlink()
    convert(prior_only, tmp_path / "made_fast", **{**options, "clip": clip})
    made = tmp_path / "made_fast" / "kandinsky-2-1-prior" / "tokenizer" / "tokenizer.json"

    shutil.copyfile(made, clip / "tokenizer.json")
    (clip / "vocab.json").unlink()
    (clip / "merges.txt").unlink()
    convert(prior_only, tmp_path / "made_slow", **{**options, "clip": clip})
    slow = tmp_path / "made_slow" / "kandinsky-2-1-prior" / "tokenizer"
    assert read(slow / "vocab.json") == read(release_21 / "clip" / "vocab.json")
    assert (slow / "merges.txt").read_text().split() == (release_21 / "clip" / "merges.txt").read_text().split()


def test_progress_bars_count_the_bytes_written(prior_only, options, tmp_path):
    bars = []

    class Bar:
        def __init__(self, total, unit, **_):
            assert unit == "B"
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, n):
            self.done += n

        def close(self):
            self.done = float(self.done)

    convert(prior_only, tmp_path / "out", progress=Bar, **options)
    assert [bar.done for bar in bars] == [bar.total for bar in bars]


def test_overwrite_replaces_a_repository_whole(prior_only, options, tmp_path):
    place = tmp_path / "out" / "kandinsky-2-1-prior"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("keep me")
    other = tmp_path / "out" / "kandinsky-2-2-prior"
    other.mkdir()
    with pytest.raises(ConversionError, match="overwrite"):
        convert(prior_only, tmp_path / "out", **options)
    assert (place / "mine.txt").read_text() == "keep me"
    convert(prior_only, tmp_path / "out", overwrite=True, **options)
    assert not (place / "mine.txt").exists()
    assert (place / "model_index.json").is_file()
    assert other.is_dir()


def test_a_source_is_never_overwritten_by_its_own_conversion(prior_only, options, tmp_path):
    source = prior_only.rename(tmp_path / "kandinsky-2-1-prior")
    with pytest.raises(ConversionError, match="holds the source"):
        convert(source, tmp_path, overwrite=True, **options)
    assert (source / "prior_fp16.ckpt").is_file()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"dtype": "fp16"}, "dtype"),
        ({"variant": "fp8"}, "variant"),
        ({"variant": "fp16", "dtype": "bfloat16"}, "variant"),
        ({"max_shard_size": "big"}, "max_shard_size"),
        ({"version": "9"}, "version"),
        ({"original_config": "no_such.json"}, "original_config"),
        ({"clip": "no/such/folder"}, "clip"),
        ({"drop": ["nothing.*"]}, "nothing"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_written(prior_only, options, tmp_path, wrong, named):
    with pytest.raises(ConversionError, match=named):
        convert(prior_only, tmp_path / "out", **{**options, **wrong})
    assert not (tmp_path / "out").exists()
