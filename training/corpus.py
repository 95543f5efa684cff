"""The pictures and captions to train on, as tensors, and the tokenizers, learned from the captions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from transformers import CLIPTokenizer, XLMRobertaTokenizer

from .captions import LANGUAGES, caption, random_said
from .files import write_torch
from .models import TEXT_LENGTH
from .world import Scene, draw, random_scene


EMPTY = -1  # the number of the empty text among the captions
CAPTIONS = 2  # of each scene, in each language
VOCABULARY = 320  # tokens to learn, beside CLIP's 512 bytes
TOKENIZERS = {"clip": CLIPTokenizer, "mclip": XLMRobertaTokenizer}


@dataclass
class Corpus:
    """What is trained on.

    Args:
        pictures: `[scenes, 3, 64, 64]`, uint8.
        clip_ids: `[captions, 77]`, int16, tokens of CLIP. `CAPTIONS` for each scene, one after the other, each in all
            languages, which say the same. The last row is the empty text.
        mclip_ids: likewise, tokens of the M-CLIP.
    """

    pictures: torch.Tensor
    clip_ids: torch.Tensor
    mclip_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """What [`prepare`] wrote, on a device."""
        tensors = torch.load(folder / "corpus.pt", weights_only=True)
        return cls(**{name: tensor.to(device) for name, tensor in tensors.items()})

    def save(self, folder: Path) -> None:
        """Write it for [`load`]."""
        write_torch(folder / "corpus.pt", {field.name: getattr(self, field.name).cpu() for field in fields(self)})

    def pixels(self, rows: torch.Tensor) -> torch.Tensor:
        """Pictures `[rows, 3, 64, 64]` in [-1, 1]."""
        return self.pictures[rows] / 127.5 - 1.0

    def random_captions(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The number of one of the captions of each row, in any language."""
        of_each = CAPTIONS * len(LANGUAGES)
        return rows * of_each + torch.randint(of_each, rows.shape, generator=generator, device=rows.device)

    @property
    def english(self) -> torch.Tensor:
        """For each caption the number of the one that says the same in English; the empty text stays itself."""
        numbers = torch.arange(len(self.clip_ids), device=self.clip_ids.device)
        english = numbers - numbers % len(LANGUAGES) + LANGUAGES.index("en")
        return torch.cat([english[:-1], numbers[-1:]])


def prepare(folder: Path, scenes: int, seed: int, device: torch.device | str = "cpu") -> None:
    """Write tokenizers and corpus to a folder, each unless it is there.

    Args:
        folder: becomes `corpus.pt` and `tokenizers/`.
        scenes: how many to draw.
        seed: of all that is random.
        device: where to draw.
    """
    if (folder / "corpus.pt").is_file():
        return
    rng = random.Random(seed)
    world = [random_scene(rng) for _ in range(scenes)]
    texts = [*_captions(world, rng), ""]
    learn_tokenizers(folder / "tokenizers", texts)
    tokens: dict[str, torch.Tensor] = {}
    for name in TOKENIZERS:
        tokens[f"{name}_ids"] = tokenize(load_tokenizer(folder, name), texts)
    Corpus(draw(world, device), **tokens).save(folder)


def _captions(world: Sequence[Scene], rng: random.Random) -> Iterator[str]:
    for scene in world:
        for _ in range(CAPTIONS):
            said = random_said(rng, len(scene.figures))
            yield from (caption(scene, language, said, rng) for language in LANGUAGES)


def learn_tokenizers(folder: Path, texts: Iterable[str]) -> None:
    """Write those tokenizers that are not there, CLIP's and the M-CLIP's, with vocabularies learned from texts."""
    texts = list(texts)
    missing = {name: made for name, made in TOKENIZERS.items() if not (folder / name).is_dir()}
    for name, tokenizer_class in missing.items():
        size = VOCABULARY + (512 if name == "clip" else 0)
        learned: Any = tokenizer_class().train_new_from_iterator(iter(texts), size, show_progress=False)
        if name == "clip":
            learned = _with_last_tokens_last(learned)
        learned.model_max_length = TEXT_LENGTH
        learned.save_pretrained(folder / name)


def _with_last_tokens_last(tokenizer: Any) -> CLIPTokenizer:
    """The same but for the special tokens' ids: OpenAI's CLIP takes the highest id for the end of a text."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = (tokenizer.bos_token, tokenizer.eos_token)
    words = [word for word in sorted(model["vocab"], key=model["vocab"].get) if word not in special]
    vocabulary = {word: number for number, word in enumerate((*words, *special))}
    return CLIPTokenizer(vocabulary, [tuple(pair) for pair in model["merges"]])  # pyright: ignore


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer `"clip"` or `"mclip"` that [`prepare`] wrote to the folder."""
    return TOKENIZERS[name].from_pretrained(folder / "tokenizers" / name)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Tokens `[texts, 77]`, int16, padded as the pipelines do."""
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH).input_ids
    return torch.tensor(ids, dtype=torch.int16)
