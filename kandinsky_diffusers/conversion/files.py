"""Small files beside the weights: tokenizers and image processors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .recipe import Inputs
from .writer import write_json


SLOW_TOKENIZER_FILES = (("vocab.json", "merges.txt"), ("sentencepiece.bpe.model",), ("spiece.model",))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tokenizer_check(inputs: Inputs, *, root: str, folder: str) -> None:
    """Raises:
    ConversionError: the folder holds no tokenizer.
    """
    source = inputs.folders[root] / folder
    present = {path.name for path in source.iterdir()} if source.is_dir() else set()
    if "tokenizer.json" not in present and not any(present.issuperset(names) for names in SLOW_TOKENIZER_FILES):
        wanted = ", ".join(" + ".join(names) for names in SLOW_TOKENIZER_FILES)
        raise ConversionError(f"No tokenizer in {source}: neither tokenizer.json nor {wanted}.")


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

    getattr(transformers, class_name).from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def _make_slow(folder: Path) -> None:
    """Byte-pair vocabularies can be taken out of ``tokenizer.json``; sentencepiece models cannot."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model["type"] != "BPE" or (folder / "vocab.json").is_file():
        return
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *pairs, "")), encoding="utf-8")


def _name_class(path: Path, class_name: str) -> None:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
