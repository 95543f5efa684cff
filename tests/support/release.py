"""Rebuild a tiny release, in the layout of the originally published files, from seeds instead of stored weights.

A *family* folder holds ``manifest/*.json``, one per weight file, and ``files/``, the small files that go in as they
are (configs, tokenizers). A manifest says::

    file             where the weight file goes in the release
    seed             first half of the name of every random stream; the tensor's name is the second half
    gain             scale of `linear` values (default 0.8)
    stream_prefix    put in front of the tensor's name in the stream's name (default "")
    container        {"layout": ...}, how the file packs its tensors, see `_pack`
    sha256           digest of names, dtypes, shapes and bytes of all tensors, in order
    hf_clip_folder   where to put the same CLIP numbers once more, under the names of the Hugging Face model
    tensors          name -> [shape, dtype, init] or [shape, dtype, init, "seed:name" of another stream]

The random bits come from SHA-256 and Philox, so they are the same everywhere, whatever the version of numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy
import torch


# init -> how a uniform u in [-1, 1) becomes a value; sqrt(3) u has variance 1
INITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "embedding": lambda u: 0.5 * math.sqrt(3) * u,
    "norm": lambda u: 1 + 0.2 * math.sqrt(3) * u,
    "bias": lambda u: 0.1 * math.sqrt(3) * u,
    "mean": lambda u: 0.3 * math.sqrt(3) * u,
    "std": lambda u: 1 + 0.5 * u,
}


class DigestMismatch(Exception):
    """Rebuilt tensors differ from the ones that the manifest describes."""


def build_release(family_dir: Path, out_dir: Path, change: Callable[[Any], Any] | None = None) -> Path:
    """Write the release of `family_dir` (or of its folder ``manifest``) into `out_dir`, and return `out_dir`.

    `change` makes other tensors of those that a manifest lists, as `tests.support.shallow` does.
    """
    family_dir = family_dir.parent if family_dir.name == "manifest" else family_dir
    manifests = sorted((family_dir / "manifest").glob("*.json"))
    if not manifests:
        raise FileNotFoundError(f"no manifest/*.json in {family_dir}")
    out_dir.mkdir(parents=True, exist_ok=True)
    if (family_dir / "files").is_dir():
        shutil.copytree(family_dir / "files", out_dir, dirs_exist_ok=True)
    for path in manifests:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        arrays = make_arrays(manifest if change is None else manifest | {"tensors": change(manifest["tensors"])})
        if change is None and digest(arrays) != manifest["sha256"]:
            raise DigestMismatch(f"{path}: the rebuilt tensors do not match the digest")
        write_weights(out_dir / manifest["file"], arrays, manifest["container"])
        if "hf_clip_folder" in manifest:
            safetensors.numpy.save_file(
                clip_in_transformers_layout(arrays),
                out_dir / manifest["hf_clip_folder"] / "model.safetensors",
                metadata={"format": "pt"},
            )
    return out_dir


# ---------------------------------------------------------------------------------------------------------- numbers


def uniform(stream: str, count: int) -> np.ndarray:
    """`count` float64 values in [-1, 1) that depend on nothing but the stream's name, ``"<seed>:<tensor>"``."""
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) / 2**52 - 1


def make_array(stream: str, shape: list[int], init: str, gain: float) -> np.ndarray:
    """One float32 array filled by the rule called `init`."""
    kind, _, argument = init.partition(":")
    if kind == "zeros":
        return np.zeros(shape, np.float32)
    if kind == "const":
        return np.full(shape, float(argument), np.float32)
    if kind == "arange":
        return np.arange(math.prod(shape)).reshape(shape)
    if kind == "onehot":
        return (np.arange(math.prod(shape)) == int(argument)).reshape(shape)
    u = uniform(stream, math.prod(shape)).reshape(shape)
    if kind == "linear":
        fan_in = math.prod(shape[1:])
        values = (float(argument or gain) * math.sqrt(3 / fan_in)) * u
    else:
        values = INITS[kind](u)
    return values.astype(np.float32)


def make_arrays(manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All tensors of a manifest, in order. Tied tensors (``same_as:<name>``) are one and the same array."""
    arrays: dict[str, np.ndarray] = {}
    for name, (shape, dtype, init, *other_stream) in manifest["tensors"].items():
        if init.startswith("same_as:"):
            arrays[name] = arrays[init.removeprefix("same_as:")]
            continue
        stream = other_stream[0] if other_stream else f"{manifest['seed']}:{manifest.get('stream_prefix', '')}{name}"
        arrays[name] = make_array(stream, shape, init, manifest.get("gain", 0.8)).astype(dtype, copy=False)
    return arrays


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over ``name|dtype|shape|`` and the little-endian bytes of every array, in order."""
    sha = hashlib.sha256()
    for name, array in arrays.items():
        sha.update(f"{name}|{array.dtype.name}|{list(array.shape)}|".encode())
        sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.hexdigest()


# --------------------------------------------------------------------------------------------------------- containers


def write_weights(path: Path, arrays: Mapping[str, np.ndarray], container: Mapping[str, Any]) -> None:
    """Write `arrays` to `path`, packed as `container` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if container["layout"] == "safetensors":
        safetensors.numpy.save_file(dict(arrays), path, metadata={"format": "pt"})
        return
    by_identity = {id(array): torch.from_numpy(array.copy()) for array in arrays.values()}  # tied stays tied
    tensors = {name: by_identity[id(array)] for name, array in arrays.items()}
    if "callback_class" in container:
        with _importable_class(*container["callback_class"]) as callback:
            torch.save(_pack(tensors, container) | {"callbacks": {callback: {"best_model_path": "best.ckpt"}}}, path)
    else:
        torch.save(_pack(tensors, container), path)


def _pack(tensors: dict[str, torch.Tensor], container: Mapping[str, Any]) -> Any:
    match container["layout"]:
        case "state_dict":  # a flat dict
            return tensors
        case "tuple":  # without names
            return tuple(tensors.values())
        case "tensor":  # a single bare tensor
            (tensor,) = tensors.values()
            return tensor
        case "tree":  # "a/b.c" is entry "b.c" of the dict "a"
            return _nest(tensors)
        case "nested":  # as Lightning does: below "state_dict", next to bookkeeping
            return {**container.get("extra", {}), "state_dict": tensors}
        case layout:
            raise ValueError(f"unknown layout {layout!r}")


def _nest(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *folders, leaf = name.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[leaf] = tensor
    return tree


@contextmanager
def _importable_class(module: str, name: str) -> Iterator[type]:
    """An empty class that can be pickled as ``module.name`` although no such module is installed."""
    packages = module.split(".")
    paths = [".".join(packages[: depth + 1]) for depth in range(len(packages))]
    before = {path: sys.modules.get(path) for path in paths}
    try:
        sys.modules.update({path: ModuleType(path) for path in paths})
        cls = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, cls)
        yield cls
    finally:
        for path, previous in before.items():
            if previous is None:
                del sys.modules[path]
            else:
                sys.modules[path] = previous


# ----------------------------------------------------------------------------------------- CLIP in its other clothes

CLIP_NAMES = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "transformer": "text_model.encoder",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # the published files spell it so
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "visual.transformer": "vision_model.encoder",
}
CLIP_BLOCK_NAMES = {
    ".resblocks.": ".layers.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
}


def clip_in_transformers_layout(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an OpenAI CLIP under the names of ``transformers.CLIPModel``, as float32."""
    renamed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        array = array.astype(np.float32)
        target = _clip_name(name)
        if name in ("text_projection", "visual.proj"):  # the original multiplies from the right
            renamed[target] = np.ascontiguousarray(array.T)
        elif ".attn.in_proj_" in target:  # query, key and value are one matrix
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                renamed[target.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = rows
        else:
            renamed[target] = array
    return renamed


def _clip_name(name: str) -> str:
    longest_first = sorted(CLIP_NAMES, key=len, reverse=True)
    prefix = next((p for p in longest_first if name == p or name.startswith(f"{p}.")), "")
    name = CLIP_NAMES.get(prefix, "") + name.removeprefix(prefix)
    for ours, theirs in CLIP_BLOCK_NAMES.items():
        name = name.replace(ours, theirs)
    return name
