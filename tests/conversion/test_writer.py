"""Weight files are what safetensors, diffusers and transformers read; wrong numbers do not get into them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kandinsky_diffusers.conversion.errors import ConversionError
from kandinsky_diffusers.conversion.writer import Entry, ShardedWriter, parse_size


def write(folder, tensors, limit=10**9, variant=None, dtypes=None):
    entries = [
        Entry(key, (dtypes or {}).get(key, str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
        for key, tensor in tensors.items()
    ]
    writer = ShardedWriter(folder, "model", entries, limit, variant)
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.close()
    writer.check_complete()
    return writer.files


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8])
shapes = st.lists(st.integers(0, 4), max_size=3)


@given(specs=st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=8), limit=st.integers(1, 200))
def test_safetensors_reads_back_every_shape_and_dtype_from_any_shards(tmp_path_factory, specs, limit):
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"t{i}": torch.randn(shape).mul(9).abs().to(dtype) for i, (shape, dtype) in enumerate(specs)}
    read = {key: value for path in write(folder, tensors, limit) for key, value in load_file(path).items()}
    assert read.keys() == tensors.keys()
    assert all(read[key].dtype == t.dtype and torch.equal(read[key], t) for key, t in tensors.items())


def test_shards_have_the_names_and_the_index_of_diffusers(tmp_path):
    tensors = {"a": torch.zeros(10), "b": torch.ones(10), "c": torch.ones(3)}
    files = write(tmp_path, tensors, limit=52, variant="fp16")
    assert [path.name for path in files] == [
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.fp16.json").read_text())
    assert index["metadata"]["total_size"] == 92
    assert index["weight_map"] == {"a": files[0].name, "b": files[1].name, "c": files[1].name}


def test_every_tensor_is_aligned_to_its_own_width(tmp_path):
    tensors = {"half": torch.zeros(3).half(), "byte": torch.zeros(1).byte(), "long": torch.zeros(2).long()}
    (path,) = write(tmp_path, tensors)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert all((8 + length + header[key]["data_offsets"][0]) % t.itemsize == 0 for key, t in tensors.items())


def test_views_are_written_as_what_they_show(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    write(tmp_path, {"t": base.T[1:]})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], base.T[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype):
    tensor = torch.randn(9999).to(dtype)
    tensor[5000] = value
    with pytest.raises(ConversionError, match=r"bad\.weight holds NaN or infinite values"):
        write(tmp_path, {"bad.weight": tensor})


def test_numbers_that_the_dtype_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="too large for float16"):
        write(tmp_path, {"t": torch.tensor([1.0, 7e4])}, dtypes={"t": "float16"})


def test_a_tensor_that_never_came_is_noticed(tmp_path):
    writer = ShardedWriter(tmp_path, "model", [Entry("a", "float32", (1,))], 100)
    with pytest.raises(ConversionError, match="never written"):
        writer.check_complete()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("200", 200), (7, 7), ("3kb", 3000)]
)
def test_sizes_are_understood(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-1GB", "0", 0])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConversionError, match="max_shard_size"):
        parse_size(text)
