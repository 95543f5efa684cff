"""Files that want something else than to be converted: each is refused with one error, before it costs anything.

`tests/fuzz` has what is drawn at random; here stands what was found with it.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky_diffusers.conversion import ConversionError, convert, inspect, plan_source
from kandinsky_diffusers.conversion.files import copy_tokenizer, tokenizer_check
from kandinsky_diffusers.conversion.hub_source import model_settings
from kandinsky_diffusers.conversion.json_files import parse_object, read_json
from kandinsky_diffusers.conversion.planning import plan_model
from kandinsky_diffusers.conversion.reader import open_weights
from kandinsky_diffusers.conversion.recipe import Inputs
from kandinsky_diffusers.conversion.staging import PREFIX, Staging
from kandinsky_diffusers.k3.ip_adapter_variants import IMAGE_ENCODER


SHAPES = {"text_projection.weight": [4, 4], "visual_projection.weight": [4, 4]}


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


# ------------------------------------------------------------------------------------------------------ weight files
def two_directories(content: bytes, wide: bool) -> bytes:
    """A zip file with a directory for those who look before its end, and one for those who look where the end says."""
    end = content.rindex(b"PK\x05\x06")
    (count, length, offset) = struct.unpack("<HLL", content[end + 10 : end + 20])
    directory = content[offset : offset + length]
    if not wide:
        return content[:end] + directory + content[end:]
    numbers = (b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length)
    first, second = (struct.pack("<4sQHHLLQQQQ", *numbers, place) for place in (offset, end + 56))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    return content[:end] + first + directory + second + locator + content[end:]


@pytest.mark.parametrize("wide", [False, True])
def test_a_zip_file_has_one_directory_for_all_that_read_it(wide: bool, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(two_directories(content, wide))
    assert torch.load(tmp_path / "a.pt", weights_only=True), "else there is nothing to be refused"
    with pytest.raises(ConversionError, match="elsewhere"):
        open_weights(tmp_path / "a.pt")


def test_a_zip_file_may_have_an_end_of_32_bits_or_of_64(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "64.pt")
    with zipfile.ZipFile(tmp_path / "64.pt") as wide, zipfile.ZipFile(tmp_path / "32.pt", "w") as narrow:
        for entry in wide.infolist():
            narrow.writestr(entry.filename, wide.read(entry))
    assert [b"PK\x06\x07" in (tmp_path / f"{bits}.pt").read_bytes() for bits in (32, 64)] == [False, True]
    assert all(open_weights(tmp_path / f"{bits}.pt").shapes == {"a": (2,)} for bits in (32, 64))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "..", "../x.safetensors", "/etc/passwd"])
def test_an_index_lists_weight_files_beside_it_and_not_itself(name: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(ConversionError, match="not a file beside it"):
        open_weights(path)


@pytest.mark.parametrize("shape", ["ab", ["a"], [-1], [1.5], [2**40, 2**40], [True], None, {}])
def test_shapes_are_lists_of_whole_numbers_that_can_be_multiplied(shape: Any, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"shape|not an inventory"):
        plan_source(write_json(tmp_path / "a.json", {"tensors": {**SHAPES, "logit_scale": shape}}))


def test_an_inventory_that_unpacks_to_too_much_or_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(bytes(2**27)))
    with pytest.raises(ConversionError, match="unpacks to more than"):
        plan_source(tmp_path / "a.json.gz")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"{}")[:10] + b"\xff" * 20)
    with pytest.raises(ConversionError, match="damaged"):
        plan_source(tmp_path / "a.json.gz")


def test_blocks_with_large_numbers_are_not_counted_up_to(tmp_path: Path) -> None:
    """The rules for LoRAs have a path for each block; this name would make 10^30 of them."""
    path = write_json(tmp_path / "a.json", {"tensors": {f"down_samples.{10**30}.resnet_attn_blocks.0.x": [1]}})
    assert inspect(path)[0].part is None


def test_more_modules_than_any_model_has_are_refused(tmp_path: Path) -> None:
    shapes = {f"model.transformer.resblocks.{n}.ln_1.weight": [4] for n in range(300)}
    shapes |= {"model.prd_emb": [1, 1, 32], "model.positional_embedding": [1, 5, 32]}
    with pytest.raises(ConversionError, match="300 modules"):
        plan_source(write_json(tmp_path / "a.json", {"tensors": shapes}))


def test_only_tensors_of_real_numbers_are_converted(release_lora: Path, tmp_path: Path) -> None:
    tensors = torch.load(release_lora / "pytorch_model.bin", weights_only=True)
    key = next(iter(tensors))
    (tmp_path / "release").mkdir()
    torch.save({**tensors, key: tensors[key].to(torch.complex64)}, tmp_path / "release" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=f"{key} is of the kind complex64"):
        convert(tmp_path / "release", tmp_path / "out", version="3-lora")
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_tensor_is_not_given_as_one(tmp_path: Path) -> None:
    torch.save({"a": 3}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"a of .* is a int"):
        open_weights(tmp_path / "a.pt").tensor("a")


@pytest.mark.parametrize("key", ["a\nb", "\ud800", "a\0", "k" * 501])
def test_names_are_short_and_printable(key: str, tmp_path: Path) -> None:
    torch.save({key: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="printable"):
        open_weights(tmp_path / "a.pt")


def test_names_are_texts(tmp_path: Path) -> None:
    torch.save({(1, 2): torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="a key that is a tuple"):
        open_weights(tmp_path / "a.pt")


# --------------------------------------------------------------------------------------------------- configurations
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100 + "1" + "}" * 100, "9" * 5000, '{"a": "\\ud800"}', "[]", "NaNN"]
)
def test_json_that_is_no_object_or_too_deep_is_refused(text: str) -> None:
    with pytest.raises(ConversionError, match="the file"):
        parse_object(text, "the file")


def test_json_as_large_as_no_configuration_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(ConversionError, match="larger than"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "many"},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"hidden_act": "os.system"},
        {"to_diff_dict": 3},
        {"hidden_size": [1]},
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    settings: dict[str, Any], release_ip_adapter: Path, tmp_path: Path
) -> None:
    folder = release_ip_adapter / "image_encoder"
    (tmp_path / "image_encoder").mkdir()
    write_json(tmp_path / "image_encoder" / "config.json", {**read_json(folder / "config.json"), **settings})
    inputs = Inputs({"release": tmp_path}, {"image_encoder": open_weights(folder / "model.safetensors")})
    with pytest.raises(ConversionError, match="do not make a model"):
        plan_model(IMAGE_ENCODER, inputs)


def test_a_configuration_cannot_ask_for_code_or_tables() -> None:
    asked = {"attn_implementation": "someone/kernel", "auto_map": {}, "num_labels": 10**9, "_attn_implementation": "x"}
    assert model_settings({**asked, "hidden_size": 4}) == {"hidden_size": 4}


@pytest.mark.parametrize("given", ["many", None, [4], True, {}])
def test_the_originals_configuration_gives_numbers_where_they_are_expected(given: Any) -> None:
    settings = Inputs(original_config={"model_config": {"num_head_channels": given}, "a.pt": {"groups": given}})
    with pytest.raises(ConversionError, match="num_head_channels"):
        settings.setting("model_config.num_head_channels", 64)
    with pytest.raises(ConversionError, match="groups"):
        settings.argument("a.pt", "groups", 32)


# ---------------------------------------------------------------------------------------------------------- tokenizers
SPOILT = {
    "damaged": ("tokenizer.json", lambda content: content[:-20]),
    "without a model": ("tokenizer.json", lambda content: "{}"),
    "other merges": (
        "tokenizer.json",
        lambda content: json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": [3]}}),
    ),
    "damaged settings": ("tokenizer_config.json", lambda content: content + "x"),
    "an id far away": ("vocab.json", lambda content: json.dumps({**json.loads(content), "x": 2**32 - 1})),
    "an id that is none": ("vocab.json", lambda content: json.dumps({**json.loads(content), "x": "y"})),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_tokenizer_is_refused_before_anything_is_made_of_it(
    name: str, release_21: Path, tmp_path: Path
) -> None:
    shutil.copytree(release_21 / "clip", tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    file, spoil = SPOILT[name]
    path = tmp_path / "clip" / file
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ConversionError, match=file.partition(".")[0]):
        tokenizer_check(Inputs({"clip": tmp_path / "clip"}), root="clip", folder="")


def test_merges_that_do_not_fit_the_vocabulary_are_one_error(release_21: Path, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for name in ("vocab.json", "tokenizer_config.json"):
        shutil.copyfile(release_21 / "clip" / name, tmp_path / "clip" / name)
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\nnot there\n")
    with pytest.raises(ConversionError, match="does not load"):
        copy_tokenizer(
            Inputs({"clip": tmp_path / "clip"}), tmp_path / "out", root="clip", folder="", class_name="CLIPTokenizer"
        )


# -------------------------------------------------------------------------------------------------------------- output
def test_an_output_folder_that_was_not_there_is_not_there_after_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with Staging(tmp_path / "a" / "b") as staging:
            (staging.folder / "x").mkdir()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_a_repository_is_replaced_and_not_followed(release_lora: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.txt").write_text("keep me")
    (tmp_path / "out").mkdir()
    for target in ("../mine", "../missing", "kandinsky-3-lora"):  # the last one leads to itself
        link = tmp_path / "out" / "kandinsky-3-lora"
        link.symlink_to(target)
        with pytest.raises(ConversionError, match="Already there"):
            convert(release_lora, tmp_path / "out", version="3-lora")
        convert(release_lora, tmp_path / "out", version="3-lora", overwrite=True)
        assert not link.is_symlink()
        assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["keep.txt"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["kandinsky-3-lora"]
        shutil.rmtree(link)


@pytest.mark.parametrize("name", ["", "lock", "replaced"])
def test_remains_that_are_links_are_not_taken_for_those_of_a_conversion(name: str, tmp_path: Path) -> None:
    outside, output = tmp_path / "outside", tmp_path / "out"
    (outside / "replaced" / "mine").mkdir(parents=True)
    remains = output / f"{PREFIX}a"
    (remains if name else output).mkdir(parents=True)
    os.symlink(outside / (name if name == "replaced" else ""), remains / name if name else remains)
    before = sorted(tmp_path.rglob("*"))
    with Staging(output):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_may_be_links_as_in_the_hubs_cache(release_lora: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    shutil.copyfile(release_lora / "pytorch_model.bin", tmp_path / "blobs" / "3f2a")
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "snapshots" / "1" / "pytorch_model.bin").symlink_to("../../blobs/3f2a")
    report = convert(tmp_path / "snapshots" / "1", tmp_path / "out", version="3-lora")
    assert report.repos == [tmp_path / "out" / "kandinsky-3-lora"]
