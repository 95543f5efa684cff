"""Properties of readers for all input; where one is broken hypothesis gives the smallest input that does it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky_diffusers.connected import find_prior
from kandinsky_diffusers.conversion import ConversionError
from kandinsky_diffusers.conversion.json_files import parse_object
from kandinsky_diffusers.conversion.reader import open_weights


TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
often = settings(max_examples=80, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples of a property."""
    return tmp_path_factory.mktemp("properties")


def saved(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


FILES = {"a.pt": saved(True), "b.bin": saved(False), "c.safetensors": safetensors.torch.save(TENSORS)}


def read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        file = open_weights(path)
    except ConversionError:
        return
    assert file.shapes.keys() == file.dtypes.keys() or not file.has_weights


@often
@given(
    name=st.sampled_from([*FILES, "d.json", "e.json.gz", "f.safetensors.index.json"]), content=st.binary(max_size=200)
)
def test_any_bytes_are_read_or_refused(folder: Path, name: str, content: bytes) -> None:
    read(folder / name, content)


@often
@given(name=st.sampled_from(list(FILES)), data=st.data())
def test_a_good_file_with_other_bytes_in_it_is_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    whole = FILES[name]
    place = data.draw(st.integers(0, len(whole)))
    gone = data.draw(st.integers(0, 8))
    read(folder / name, whole[:place] + data.draw(st.binary(max_size=8)) + whole[place + gone :])


@often
@given(content=JSON)
def test_any_json_is_an_inventory_an_index_or_refused(folder: Path, content: Any) -> None:
    for name in ("a.json", "a.safetensors.index.json"):
        for shapes in (content, {"a": content}, {"a": [content]}):
            read(folder / name, json.dumps({"tensors": shapes, "weight_map": shapes}).encode())
        read(folder / name, json.dumps(content).encode())


@often
@given(content=JSON)
def test_json_objects_come_back_as_they_are(content: Any) -> None:
    whole = json.dumps({"a": content})
    assert json.dumps(parse_object(whole, "it")) == whole


@often
@given(text=st.text(alphabet="ab:-[]{}&*!|>'\"#?,\n \t%@`~0", max_size=60))
def test_any_front_matter_names_a_prior_or_none(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(f"---\nprior: {text}\n---\n", encoding="utf-8")
    try:
        assert isinstance(find_prior(folder), str)
    except ValueError:
        return
