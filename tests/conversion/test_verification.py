"""`verify`: a sound repository is found sound, the same one the same, and every difference is found and named."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import ConversionError, convert, verify
from kandinsky_diffusers.conversion.comparison import compare_models
from kandinsky_diffusers.conversion.pieces import largest_difference, same_bits
from kandinsky_diffusers.conversion.reader import WeightFile
from kandinsky_diffusers.conversion.reports import Outcome
from kandinsky_diffusers.conversion.tensors import Tensors
from tests.support.fake_hub import FakeHub
from tests.support.processes import PythonProcess
from tests.support.verification import PRIOR, UNET, change, failures, problems


# ------------------------------------------------------------------------------------------------ with another
def test_it_does_not_matter_how_weights_are_stored(
    prior_in_shards: Path, converted_21: Path, prior_repo: Path
) -> None:
    tensors = load_file(prior_repo / PRIOR)
    (prior_repo / PRIOR).unlink()
    torch.save(tensors, (prior_repo / PRIOR).with_suffix(".bin"))
    for other in (converted_21 / "kandinsky-2-1-prior", prior_repo):
        found = verify(prior_in_shards, other)
        assert found.passed
        assert all(component.outcomes == {"equal": len(component.tensors)} for component in found.components)
        assert sum(len(component.tensors) for component in found.components) > len(tensors)


def test_a_variant_is_equal_after_the_cast_that_made_it(
    prior_release: Path, converted_21: Path, config_21: Path, tmp_path: Path
) -> None:
    convert(prior_release, tmp_path, variant="fp16", original_config=config_21, clip=prior_release / "clip")
    variant, full = tmp_path / "kandinsky-2-1-prior", converted_21 / "kandinsky-2-1-prior"
    for pair in ((variant, full), (full, variant)):
        found = verify(*pair)
        assert found.passed
        outcomes = {component.name: component.outcomes for component in found.components}
        assert outcomes["text_encoder"].keys() == outcomes["image_encoder"].keys() == {"equal after cast"}
        assert outcomes["prior"]["equal after cast"] == 2  # mean and standard deviation; the rest is of half precision
    change(variant / "text_encoder" / "model.fp16.safetensors", "text_projection.weight", lambda weight: weight * 1.01)
    assert failures(verify(variant, full)).keys() == {"text_projection.weight"}
    assert verify(variant).loaded_and_run == "KandinskyPriorPipeline"


def test_every_difference_between_repositories_is_named_with_its_size(converted_21: Path, prior_repo: Path) -> None:
    change(prior_repo / PRIOR, "prd_embedding", lambda tensor: None)
    change(prior_repo / PRIOR, "clip_mean", lambda mean: mean[:, :-1])
    change(prior_repo / PRIOR, "clip_std", lambda std: std + 0.5)
    tensors = load_file(prior_repo / PRIOR)
    save_file({**tensors, "more": torch.ones(2)}, prior_repo / PRIOR, {"format": "pt"})
    shutil.rmtree(prior_repo / "image_encoder")

    found = verify(prior_repo, converted_21 / "kandinsky-2-1-prior")

    outcomes = {key: str(tensor.outcome) for key, tensor in failures(found).items()}
    assert outcomes == {
        "prd_embedding": "missing",
        "more": "extra",
        "clip_mean": "other shape",
        "clip_std": "different",
    }
    original = load_file(converted_21 / "kandinsky-2-1-prior" / PRIOR)["clip_std"]
    std = failures(found)["clip_std"]
    assert std.absolute == pytest.approx(0.5)
    assert std.relative == pytest.approx(0.5 / (original + 0.5).abs().max().item())
    assert f"only in {converted_21}" in problems(found)
    assert f"only in {converted_21}" in problems(verify(converted_21 / "kandinsky-2-1-prior", prior_repo))


def test_single_models_are_compared_too(converted_21: Path) -> None:
    assert verify(*(converted_21 / name / "movq" for name in ("kandinsky-2-1", "kandinsky-2-1-inpaint"))).passed


def test_one_tensor_of_each_side_is_in_memory_at_a_time() -> None:
    class Fresh(WeightFile):
        """Makes its tensors when they are asked for."""

        def tensor(self, key: str) -> torch.Tensor:
            tensor = super().tensor(key).clone()
            alive.add(tensor)
            most.append(len(alive))
            return tensor

    alive: Any = weakref.WeakSet()
    most: list[int] = []
    file = Fresh(Path("file"), {str(number): torch.zeros(3) for number in range(20)})
    assert len(list(compare_models(Tensors([file]), Tensors([file])))) == 20
    assert max(most) <= 4  # two, and two more that are let go when the next ones are there


TIE = torch.tensor([1 + 2**-8 + 2**-13])  # lies elsewhere in bfloat16 if it passes through float16


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [
        (torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 1.0]), Outcome.EQUAL),
        (torch.tensor([0.0]), torch.tensor([-0.0]), Outcome.DIFFERENT),
        (torch.tensor([0.1]).half(), torch.tensor([0.1]), Outcome.EQUAL_AFTER_CAST),
        (torch.tensor([0.1]), torch.tensor([0.1]).half(), Outcome.EQUAL_AFTER_CAST),
        (TIE.half(), TIE.bfloat16(), Outcome.DIFFERENT),
        (torch.tensor([3]), torch.tensor([3], dtype=torch.int32), Outcome.EQUAL_AFTER_CAST),
        (torch.empty(0), torch.empty(0), Outcome.EQUAL),
    ],
)
def test_what_equal_means(ours: torch.Tensor, theirs: torch.Tensor, outcome: Outcome) -> None:
    sides = (Tensors([WeightFile(Path("file"), {"key": tensor})]) for tensor in (ours, theirs))
    (found,) = compare_models(*sides)
    assert found.outcome is outcome


def test_tensors_larger_than_a_piece_are_compared_to_the_end() -> None:
    first = torch.zeros((1 << 22) + 5)
    second = first.clone()
    assert same_bits(first, second, torch.float32)
    second[-1] = 3.0
    assert not same_bits(first, second, torch.float32)
    assert largest_difference(first, second) == (3.0, 1.0)


# ------------------------------------------------------------------------------------------------ with an original
def test_a_repository_is_equal_to_the_release_it_was_made_from(
    converted_21: Path, release_21: Path, config_21: Path
) -> None:
    found = verify(converted_21 / "kandinsky-2-1", release_21, original_config=config_21)
    assert found.passed
    unet = torch.load(release_21 / "decoder_fp16.ckpt", weights_only=True)
    assert {component.name: component.outcomes for component in found.components}["unet"] == {"equal": len(unet)}


def test_differences_from_an_original_have_its_names(
    converted_21: Path, release_21: Path, config_21: Path, tmp_path: Path
) -> None:
    repo = tmp_path / "kandinsky-2-1"
    shutil.copytree(converted_21 / "kandinsky-2-1" / "unet", repo / "unet")
    shutil.copyfile(converted_21 / "kandinsky-2-1" / "model_index.json", repo / "model_index.json")
    change(repo / UNET, "mid_block.attentions.0.to_k.bias", lambda bias: bias.roll(1))
    change(repo / UNET, "time_embedding.linear_1.weight", lambda weight: None)
    change(repo / UNET, "time_embedding.linear_2.bias", lambda bias: bias[:-1])

    found = verify(repo, release_21 / "decoder_fp16.ckpt", original_config=config_21)

    assert {key: str(tensor.outcome) for key, tensor in failures(found).items()} == {
        "middle_block.1.qkv.bias": "different",
        "time_embed.0.weight": "missing",
        "time_embed.2.bias": "other shape",
    }
    assert [component.notes for component in found.components if component.name == "movq"] == [
        ("not compared: its source, movq, is not there",)
    ]


def test_a_constant_and_what_nothing_is_the_source_of_are_compared_as_well(
    converted_31: Path, release_31: Path, tmp_path: Path
) -> None:
    repo = tmp_path / "kandinsky-3-1"
    shutil.copytree(converted_31 / "kandinsky-3-1" / "movq", repo / "movq")
    shutil.copyfile(converted_31 / "kandinsky-3-1" / "model_index.json", repo / "model_index.json")
    weights = repo / "movq" / "diffusion_pytorch_model.safetensors"
    change(weights, "quantize.embedding.weight", lambda codebook: codebook + 1)
    save_file({**load_file(weights), "more": torch.ones(2)}, weights, {"format": "pt"})

    found = verify(repo, next(release_31.rglob("movq.pt")))

    outcomes = {key: str(tensor.outcome) for key, tensor in failures(found).items()}
    assert outcomes == {"quantize.embedding.weight": "different", "more": "extra"}


def test_what_was_left_out_on_request_is_known_from_the_record(
    prior_release: Path, config_21: Path, tmp_path: Path
) -> None:
    release = shutil.copytree(prior_release, tmp_path / "release")
    tensors = torch.load(release / "prior_fp16.ckpt", weights_only=True)
    torch.save({**tensors, "ema.decay[0]": torch.ones(1)}, release / "prior_fp16.ckpt")
    options: dict[str, Any] = {"original_config": config_21, "clip": release / "clip"}
    convert(release, tmp_path / "out", drop=["ema.*"], **options)
    repo = tmp_path / "out" / "kandinsky-2-1-prior"
    assert verify(repo, release, **options).passed
    (repo / "conversion.json").unlink()
    with pytest.raises(ConversionError, match=r"ema\.decay"):
        verify(repo, release, **options)


def test_only_a_cast_of_the_original_counts(prior_release: Path, config_21: Path, tmp_path: Path) -> None:
    """Rounding what was written could hide a difference below half precision."""
    convert(prior_release, tmp_path, dtype="float32", original_config=config_21, clip=prior_release / "clip")
    repo = tmp_path / "kandinsky-2-1-prior"
    assert verify(repo, prior_release, original_config=config_21).passed
    change(repo / PRIOR, "prd_embedding", lambda embedding: embedding * (1 + 2**-20))
    assert failures(verify(repo, prior_release, original_config=config_21)).keys() == {"model.prd_emb"}


def test_repositories_without_an_index_are_compared_with_their_originals(
    converted_lora: Path, release_lora: Path
) -> None:
    repo = converted_lora / "kandinsky-3-lora"
    assert verify(repo, release_lora).passed
    assert verify(repo).loaded_and_run is not None


def test_repositories_that_are_releases_are_compared_whatever_the_form(community_22: Path, tmp_path: Path) -> None:
    """The community's 2.2, pickled, sharded and under old names of tensors."""
    convert(community_22 / "depth", tmp_path)
    repo = tmp_path / "kandinsky-2-2-controlnet-depth"
    assert verify(repo, community_22).passed
    by_name = failures(verify(repo, community_22 / "depth"))
    assert {str(tensor.outcome) for tensor in by_name.values()} == {"missing", "extra"}
    assert verify(repo, community_22 / "depth", version="2.2").passed


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("movq_final.ckpt", r"against holds nothing that kandinsky-2-1-prior is made from"),
        ("nothing", r"against is .*, which is not a folder"),
    ],
)
def test_what_cannot_be_compared_is_an_error(converted_21: Path, release_21: Path, against: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        verify(converted_21 / "kandinsky-2-1-prior", release_21 / against)


def test_an_unknown_repository_has_no_original(converted_21: Path, release_21: Path) -> None:
    with pytest.raises(ConversionError, match="against is the original"):
        verify(converted_21 / "kandinsky-2-1" / "movq", release_21 / "movq_final.ckpt")
    with pytest.raises(ConversionError, match="holds no weights"):
        verify(converted_21 / "kandinsky-2-1" / "tokenizer")


# ------------------------------------------------------------------------------------------------ by id, and commands
VERIFY_BY_ID = """
from kandinsky_diffusers.conversion import verify
found = verify("someone/kandinsky-2-1-prior", "someone/Kandinsky_2.1", clip="someone/clip", original_config=CONFIG)
both = verify("someone/kandinsky-2-1-prior", "someone/kandinsky-2-1-prior")
result = [found.as_dict(), both.passed, verify("someone/kandinsky-2-1-prior").loaded_and_run]
"""


def test_repositories_and_originals_may_be_on_the_hub(
    converted_21: Path, prior_release: Path, config_21: Path, hub: FakeHub, from_hub: PythonProcess
) -> None:
    hub.repos |= {
        "someone/kandinsky-2-1-prior": converted_21 / "kandinsky-2-1-prior",
        "someone/Kandinsky_2.1": prior_release,
        "someone/clip": prior_release / "clip",
    }
    found, both, ran = from_hub.run(VERIFY_BY_ID.replace("CONFIG", repr(str(config_21))))
    assert found["passed"]
    assert all(component["outcomes"].keys() == {"equal"} for component in found["components"])
    assert both
    assert ran == "KandinskyPriorPipeline"


def test_the_command_shows_a_table_or_json_and_ends_with_1_where_something_is_wrong(
    converted_21: Path, prior_repo: Path
) -> None:
    wide = {"COLUMNS": "160"}
    command = ["verify", str(prior_repo), "--against", str(converted_21 / prior_repo.name)]
    same = CliRunner().invoke(app, [*command, "--all"], env=wide)
    assert same.exit_code == 0
    assert "prd_embedding" in same.stdout

    change(prior_repo / PRIOR, "prd_embedding", lambda embedding: embedding * torch.nan)
    table = CliRunner().invoke(app, command, env=wide)
    assert table.exit_code == 1
    assert "prd_embedding" in table.stdout
    assert "clip_std" not in table.stdout
    assert "is not the same as" in table.stderr

    as_json = CliRunner().invoke(app, [*command, "--json"])
    assert as_json.exit_code == 1
    found = json.loads(as_json.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (listed,) = [tensor for component in found["components"] for tensor in component["listed"]]
    assert (listed["key"], listed["outcome"], listed["absolute"]) == ("prd_embedding", "different", None)

    alone = CliRunner().invoke(app, ["verify", str(prior_repo), "--no-run"])
    assert alone.exit_code == 1
    assert "is not sound: prior" in alone.stderr
