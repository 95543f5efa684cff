"""Kandinsky 3.0 and 3.1: what a conversion writes, from which folders, and what is wrong with others."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kandinsky_diffusers.cli import app
from kandinsky_diffusers.conversion import ConversionError, convert, inspect


REPOS_30 = ("kandinsky-3", "kandinsky-3-inpaint")
REPOS_31 = ("kandinsky-3-1", "kandinsky-3-1-flash", "kandinsky-3-1-inpaint")


@pytest.fixture
def source(release_31: Path, tmp_path: Path) -> Path:
    """A copy of the 3.1 release that a test may spoil."""
    return shutil.copytree(release_31, tmp_path / "release")


@pytest.fixture
def one_unet(source: Path) -> Path:
    """The same without the UNets of Flash and of inpainting."""
    for name in ("kandinsky3_flash.pt", "kandinsky3_inpainting.pt"):
        (source / "weights" / name).unlink()
    return source


@pytest.fixture(scope="module")
def config(goldens_31: Any) -> dict[str, Path]:
    return {"original_config": goldens_31.path / "hyperparameters.json"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def change(path: Path, changed: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    changed(content)
    torch.save(content, path)


@pytest.fixture(scope="module")
def converted(converted_30: Path, converted_31: Path) -> dict[str, Path]:
    return {folder.name: folder for place in (converted_30, converted_31) for folder in place.iterdir()}


# ------------------------------------------------------------------------------------------------ what comes out
@pytest.mark.parametrize("repo", REPOS_30 + REPOS_31)
def test_tokenizers_have_their_fast_and_their_slow_files(converted: dict[str, Path], repo: str) -> None:
    names = {path.name for path in (converted[repo] / "tokenizer").iterdir()}
    assert names >= {"tokenizer.json", "spiece.model", "tokenizer_config.json"}
    assert read(converted[repo] / "tokenizer" / "tokenizer_config.json")["tokenizer_class"] == "T5Tokenizer"


@pytest.mark.parametrize("repo", REPOS_30 + REPOS_31)
def test_only_the_encoder_of_the_text_model_is_written(converted: dict[str, Path], repo: str) -> None:
    written = weights(converted[repo] / "text_encoder")
    assert "shared.weight" in written
    assert not [key for key in written if key.startswith(("decoder.", "lm_head.")) or "embed_tokens" in key]
    assert read(converted[repo] / "text_encoder" / "config.json")["architectures"] == ["T5EncoderModel"]


def test_the_three_repositories_have_their_own_projection_and_null_embedding(converted: dict[str, Path]) -> None:
    unets = [weights(converted[repo] / "unet") for repo in REPOS_31]
    for key in ("encoder_hid_proj.projection_linear.weight", "null_embedding"):
        assert not torch.equal(unets[0][key], unets[1][key])
        assert not torch.equal(unets[0][key], unets[2][key])


@pytest.mark.parametrize("repo", REPOS_30 + REPOS_31)
def test_cards_and_records_name_every_source_file(
    converted: dict[str, Path], release_30: Path, release_31: Path, repo: str
) -> None:
    facts, card = read(converted[repo] / "conversion.json"), (converted[repo] / "README.md").read_text()
    release = release_31 if repo in REPOS_31 else release_30
    places = {"release": release / "weights", "text_encoder": release / "flan-ul2"}
    assert len({source["file"] for source in facts["sources"].values()}) >= 3
    for source in facts["sources"].values():
        digest = hashlib.sha256((places[source["folder"]] / source["file"]).read_bytes()).hexdigest()
        assert source["sha256"] == digest
        assert digest in card
    data = ModelCard.load(converted[repo] / "README.md").data
    assert data.license == "apache-2.0"
    assert "kandinsky" in data.tags


def test_a_text_model_that_is_dropped_is_told_by_reason_and_not_key_by_key(converted: dict[str, Path]) -> None:
    facts, card = (
        read(converted["kandinsky-3"] / "conversion.json"),
        (converted["kandinsky-3"] / "README.md").read_text(),
    )
    dropped = facts["components"]["text_encoder"]["dropped"]
    assert "lm_head.weight" in dropped
    assert sum(key in card for key in dropped) <= 4
    assert f"{len(dropped) - 1} tensors" in card


def test_everything_is_verified(release_31: Path, config: Any, tmp_path: Path) -> None:
    report = convert(release_31, tmp_path, verify=True, **config)
    assert set(report.verified) == set(REPOS_31)
    assert report.verified["kandinsky-3-1"]["loaded_and_run"] == "Kandinsky3Pipeline"
    assert {t.dtype for t in weights(tmp_path / "kandinsky-3-1" / "movq").values()} == {torch.float32}


def test_in_half_precision_the_movq_stays_whole(one_unet: Path, config: Any, tmp_path: Path) -> None:
    report = convert(one_unet, tmp_path / "out", verify=True, variant="fp16", **config)
    repo = tmp_path / "out" / "kandinsky-3-1"
    assert report.verified["kandinsky-3-1"]["loaded_and_run"] == "Kandinsky3Pipeline"
    assert {t.dtype for t in weights(repo / "movq").values()} == {torch.float32}
    assert {t.dtype for t in weights(repo / "unet").values()} == {torch.float16}
    pipe = DiffusionPipeline.from_pretrained(repo, variant="fp16", dtype=torch.float16)
    assert pipe.movq.dtype == torch.float32


def test_shared_models_may_be_hard_links(release_31: Path, converted_31: Path, config: Any, tmp_path: Path) -> None:
    convert(release_31, tmp_path, link_shared=True, **config)
    for output, links in ((converted_31, 1), (tmp_path, 3)):
        for model in ("text_encoder", "movq"):
            for path in (output / "kandinsky-3-1" / model).iterdir():
                twins = [repo / model / path.name for repo in output.glob("kandinsky-3-1*")]
                assert len(twins) == 3
                assert sum(map(path.samefile, twins)) == links
    assert (tmp_path / "kandinsky-3-1" / "unet" / "config.json").stat().st_nlink == 1
    for path in converted_31.rglob("*.safetensors"):
        twin = tmp_path / path.relative_to(converted_31)
        assert twin.read_bytes() == path.read_bytes()


# ------------------------------------------------------------------------------------------------ what may go in
@pytest.mark.parametrize("version", ["3.0", "3.1"])
def test_the_version_is_told_by_the_files(
    release_30: Path, release_31: Path, goldens_30: Any, config: Any, tmp_path: Path, version: str
) -> None:
    """Also where only the folder of the weights is given."""
    release = {"3.0": release_30, "3.1": release_31}[version]
    for number, folder in enumerate((release, release / "weights")):
        report = convert(folder, tmp_path / str(number), text_encoder=release / "flan-ul2", **config)
        assert {path.name for path in report.repos} == set(REPOS_30 if version == "3.0" else REPOS_31)


def test_flash_alone_is_enough(source: Path, config: Any, tmp_path: Path) -> None:
    for name in ("kandinsky3.pt", "kandinsky3_inpainting.pt"):
        (source / "weights" / name).unlink()
    report = convert(source, tmp_path / "out", **config)
    assert [path.name for path in report.repos] == ["kandinsky-3-1-flash"]
    assert report.skipped["kandinsky-3-1"] == "kandinsky3.pt is not in the release"


@pytest.mark.parametrize("form", ["pickled", "sharded", "pickled and sharded", "with the copy of the embedding"])
def test_the_text_encoder_may_come_in_any_form(one_unet: Path, config: Any, tmp_path: Path, form: str) -> None:
    folder = one_unet / "weights" / "flan_ul2_encoder"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if form == "with the copy of the embedding":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    stem, ending = ("pytorch_model", "bin") if form.startswith(("pickled", "with")) else ("model", "safetensors")
    parts = {f"{stem}.{ending}": tensors}
    if "sharded" in form:
        keys = list(tensors)
        halves = (keys[: len(keys) // 2], keys[len(keys) // 2 :])
        parts = {
            f"{stem}-0000{n}-of-00002.{ending}": {k: tensors[k] for k in half} for n, half in enumerate(halves, 1)
        }
        index = {key: name for name, part in parts.items() for key in part}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": index}))
    for name, part in parts.items():
        torch.save(part, folder / name) if ending == "bin" else save_file(part, folder / name)
    convert(one_unet, tmp_path / "out", **config)
    written = weights(tmp_path / "out" / "kandinsky-3-1" / "text_encoder")
    tensors.pop("encoder.embed_tokens.weight", None)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())


def test_the_null_embedding_may_be_a_row(one_unet: Path, config: Any, tmp_path: Path) -> None:
    path = one_unet / "weights" / "kandinsky3.pt"
    change(path, lambda content: content.update(null_embedding=content["null_embedding"][None]))
    convert(one_unet, tmp_path / "out", **config)
    assert weights(tmp_path / "out" / "kandinsky-3-1" / "unet")["null_embedding"].ndim == 1


def test_a_tokenizer_without_its_fast_file_gets_one(one_unet: Path, config: Any, tmp_path: Path) -> None:
    (one_unet / "weights" / "flan_ul2_encoder" / "tokenizer.json").unlink()
    convert(one_unet, tmp_path / "out", **config)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "kandinsky-3-1")
    assert (tmp_path / "out" / "kandinsky-3-1" / "tokenizer" / "tokenizer.json").is_file()
    assert pipe.tokenizer("a red fox").input_ids[-1] == pipe.tokenizer.eos_token_id


def test_inspect_says_what_the_files_are(release_30: Path, release_31: Path) -> None:
    parts = {"kandinsky3.pt": "unet", "kandinsky3_inpainting.pt": "inpainting", "movq.pt": "movq"}
    of_31 = {**parts, "kandinsky3_flash.pt": "flash", "projection_flash.pt": "flash projection"}
    for release, version, expected in ((release_30, "3.0", parts), (release_31, "3.1", of_31)):
        for report in inspect(release / "weights"):
            if report.path.name in expected:
                assert report.part == expected[report.path.name]
                assert report.version == version or report.path.name == "movq.pt"  # the same in both


# ------------------------------------------------------------------------------------------------ what is wrong
FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "one key too many": ("kandinsky3.pt", lambda c: c["unet"].update(spare=torch.ones(1)), "spare"),
    "one key too few": ("kandinsky3.pt", lambda c: c["unet"].pop("out_layer.2.bias"), r"out_layer\.2\.bias"),
    "an optimizer": ("kandinsky3.pt", lambda c: c.update(optimizer={"step": torch.ones(1)}), "optimizer/step"),
    "no null embedding": ("kandinsky3.pt", lambda c: c.pop("null_embedding"), "null_embedding is missing"),
    "not a number": (
        "kandinsky3_flash.pt",
        lambda c: c["unet"]["out_layer.2.bias"].fill_(float("nan")),
        r"out_layer\.2\.bias of kandinsky3_flash\.pt",
    ),
    "another shape": ("movq.pt", lambda c: c.update({"quant_conv.bias": torch.ones(5)}), r"quant_conv\.bias"),
    "half a projection": ("flan_ul2_encoder/projection.pt", lambda c: c.pop("1.bias"), r"projection_norm\.bias"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(source: Path, config: Any, tmp_path: Path, fault: str) -> None:
    name, spoil, message = FAULTS[fault]
    change(source / "weights" / name, spoil)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", **config)
    assert not list((tmp_path / "out").glob("*"))


def test_a_missing_projection_is_named(source: Path, config: Any, tmp_path: Path) -> None:
    (source / "weights" / "flan_ul2_encoder" / "projection_flash.pt").unlink()
    with pytest.raises(ConversionError, match=r"flan_ul2_encoder/projection_flash\.pt is missing"):
        convert(source, tmp_path / "out", **config)


def test_files_of_the_other_version_are_told_apart(
    source: Path, release_30: Path, config: Any, tmp_path: Path
) -> None:
    shutil.copyfile(release_30 / "weights" / "kandinsky3.pt", source / "weights" / "kandinsky3.pt")
    with pytest.raises(ConversionError, match=r"kandinsky3\.pt is not the unet of Kandinsky 3\.1.*Kandinsky 3\.0"):
        convert(source, tmp_path / "out", **config)


def test_3_0_says_which_text_encoder_it_lacks(release_30: Path, config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="text_encoder is 'no/such/model'"):
        convert(release_30, tmp_path / "out", text_encoder="no/such/model", **config)


def test_the_command_line_has_the_options(release_30: Path, goldens_30: Any, tmp_path: Path) -> None:
    config = str(goldens_30.path / "hyperparameters.json")
    place, encoder = str(tmp_path / "out"), str(release_30 / "flan-ul2")
    command = ["convert", str(release_30), place, "--version", "3.0", "--text-encoder", encoder, "--link-shared"]
    result = CliRunner().invoke(app, [*command, "--original-config", config])
    assert result.exit_code == 0, result.output
    assert len([line for line in result.output.splitlines() if line.startswith("dropped")]) <= 2
    plan = CliRunner().invoke(app, ["convert", "--plan", str(release_30), "--text-encoder", encoder])
    assert plan.exit_code == 1, "the published sizes do not fit the tiny release"
    plan = CliRunner().invoke(
        app, ["convert", "--plan", str(release_30), "--text-encoder", encoder, "--original-config", config]
    )
    assert plan.exit_code == 0, plan.output
    assert "unet + unet projection -> unet (Kandinsky3UNet)" in plan.output
