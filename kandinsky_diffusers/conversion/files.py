"""Small files beside the weights: tokenizers and image processors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .json_files import read_json
from .recipe import Inputs
from .writer import write_json


SLOW_TOKENIZER_FILES = (("vocab.json", "merges.txt"), ("sentencepiece.bpe.model",), ("spiece.model",))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


_ID_FILES = ("vocab.json", "added_tokens.json")
_MOST_IDS = 1_000_000  # four times as many as the largest published vocabulary has


def tokenizer_check(inputs: Inputs, *, root: str, folder: str) -> None:
    """Raises:
    ConversionError: the folder holds no tokenizer, or one that cannot be read.
    """
    source = inputs.folders[root] / folder
    present = {path.name for path in source.iterdir()} if source.is_dir() else set()
    if "tokenizer.json" not in present and not any(present.issuperset(names) for names in SLOW_TOKENIZER_FILES):
        wanted = ", ".join(" + ".join(names) for names in SLOW_TOKENIZER_FILES)
        raise ConversionError(f"No tokenizer in {source}: neither tokenizer.json nor {wanted}.")
    for name in sorted(present.intersection((*TOKENIZER_FILES, *_ID_FILES))):
        content = read_json(source / name)
        if name in _ID_FILES:
            _check_ids(content, source / name)
    if "tokenizer.json" in present:
        _pairs(_model_of(source / "tokenizer.json"), source)


def copy_tokenizer(inputs: Inputs, target: Path, *, root: str, folder: str, class_name: str) -> None:
    """Copy a tokenizer, and make what it lacks: ``tokenizer.json``, or the vocabulary and the merges.

    Raises:
        ConversionError: ``tokenizer.json`` is missing, and cannot be made from the other files.
    """
    source = inputs.folders[root] / folder
    target.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, *(name for names in SLOW_TOKENIZER_FILES for name in names)):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer.json").is_file():
        _make_fast(target, class_name)
    _make_slow(target)
    _name_class(target / "tokenizer_config.json", class_name)


def _make_fast(folder: Path, class_name: str) -> None:
    import transformers

    try:
        tokenizer = getattr(transformers, class_name).from_pretrained(folder)
    except Exception as error:
        raise ConversionError(f"The tokenizer does not load as {class_name}: {f'{error}'[:500]}") from error
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _make_slow(folder: Path) -> None:
    """Byte-pair vocabularies can be taken out of ``tokenizer.json``; sentencepiece models cannot."""
    model = _model_of(folder / "tokenizer.json")
    if model.get("type") != "BPE" or (folder / "vocab.json").is_file():
        return
    pairs = _pairs(model, folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *pairs, "")), encoding="utf-8")


def _model_of(path: Path) -> dict[str, Any]:
    model = read_json(path).get("model")
    if not isinstance(model, dict):
        raise ConversionError(f"{path} is not a tokenizer: it has no model.")
    return model


def _check_ids(vocabulary: dict[str, Any], path: Path) -> None:
    """One that is far from the others would make tables with all that are between."""
    if not all(type(number) is int and 0 <= number < _MOST_IDS for number in vocabulary.values()):
        raise ConversionError(f"{path} gives a token something else than a number below {_MOST_IDS}.")


def _pairs(model: dict[str, Any], folder: Path) -> list[str]:
    """The merges of a byte-pair vocabulary, each as two texts with a space between; none of another one."""
    if model.get("type") != "BPE":
        return []
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if isinstance(vocabulary, dict) and isinstance(merges, list):
        _check_ids(vocabulary, folder / "tokenizer.json")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        if all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in pairs):
            return [" ".join(pair) for pair in pairs]
    raise ConversionError(f"{folder / 'tokenizer.json'} is not a tokenizer: its vocabulary or its merges are others.")


def _name_class(path: Path, class_name: str) -> None:
    config = read_json(path) if path.is_file() else {}
    if config.get("tokenizer_class") != class_name:
        write_json(path, {**config, "tokenizer_class": class_name})


def image_processor_check(inputs: Inputs, *, root: str, folder: str) -> None:
    """Raises:
    ConversionError: the folder holds no image processor.
    """
    if not inputs.json(root, str(Path(folder, "preprocessor_config.json"))):
        raise ConversionError(f"{inputs.folders[root] / folder} has no preprocessor_config.json.")


def copy_clip_image_processor(inputs: Inputs, target: Path, *, root: str, folder: str) -> None:
    """Write the image processor of a CLIP folder under the name that every version of transformers knows."""
    config = inputs.json(root, str(Path(folder, "preprocessor_config.json")))
    config.pop("feature_extractor_type", None)
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "preprocessor_config.json", {**config, "image_processor_type": "CLIPImageProcessor"})
