"""Pictures and captions in a folder, and the order, timesteps and noise in which training sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.nn.utils.rnn import pad_sequence

from kandinsky_diffusers.sampling import draw_noise


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"

Conditions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """A picture of the data set.

    Args:
        path: of its file.
        caption: None where captions are not needed.
    """

    path: Path
    caption: str | None = None

    def picture(self, size: int) -> PIL.Image.Image:
        """RGB, the largest square in the middle, resized to `size` pixels a side; turned as its EXIF data says."""
        with PIL.Image.open(self.path) as image:
            upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
        return PIL.ImageOps.fit(upright, (size, size), PIL.Image.Resampling.BICUBIC)


def read_examples(folder: Path, captions: bool) -> list[Example]:
    """The examples of a data set folder.

    Either `metadata.jsonl` names them, a line `{"file_name": "cat.png", "text": "a red cat"}` for each; or they are
    all the pictures that lie in the folder, `cat.png` with its caption in `cat.txt`.

    Args:
        folder: where they lie.
        captions: whether each picture needs one.

    Raises:
        ValueError: there is no such folder, nothing in it, or a file, a caption or a line of the metadata is not as
            described.
    """
    if not folder.is_dir():
        raise ValueError(f"`data` is {str(folder)!r}; accepted is a folder of pictures.")
    named = (folder / METADATA).is_file()
    examples = list(_from_metadata(folder, captions) if named else _from_files(folder, captions))
    if not examples:
        raise ValueError(f"`data` is {str(folder)!r}, which has no pictures; accepted are {', '.join(PICTURES)}.")
    missing = [example.path.name for example in examples if captions and not example.caption]
    if missing:
        raise ValueError(
            f"`data` has no caption for {_some(missing)}; accepted is a text in {METADATA} for each picture, or a .txt"
            " file beside each."
        )
    for example in examples:
        _check_picture(example.path)
    return examples


def _from_metadata(folder: Path, captions: bool) -> Iterator[Example]:
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield Example(folder / row["file_name"], row.get("text") if captions else None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'`data` has {METADATA} with line {number}: {line!r}; accepted is {{"file_name": ..., "text": ...}}.'
            ) from error


def _from_files(folder: Path, captions: bool) -> Iterator[Example]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES:
            text = path.with_suffix(".txt")
            yield Example(path, text.read_text(encoding="utf-8").strip() if captions and text.is_file() else None)


def _check_picture(path: Path) -> None:
    try:
        with PIL.Image.open(path):
            pass
    except OSError as error:
        raise ValueError(f"`data` has {path.name}, which is no picture that can be read: {error}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class Draws(torch.utils.data.Dataset):
    """Training as one long list: draw n is one example, at one timestep, with one noise.

    Everything is decided by the seed and n. So a resumed training goes on as if it had never stopped, and several
    processes draw what one would. Each pass over the examples has an order of its own.

    Args:
        latents: `[channels, height, width]` of each example.
        conditions: named tensors `[2, ...]` of each example: without and with its caption or picture.
        timesteps: number of training timesteps.
        dropout: share of draws without the condition.
        seed: of everything random.
        length: number of draws.
    """

    latents: Sequence[torch.Tensor]
    conditions: Sequence[Conditions]
    timesteps: int
    dropout: float
    seed: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.length:
            raise IndexError(index)  # by which iteration ends
        epoch, place = divmod(index, len(self.latents))
        example = _order(self.seed, epoch, len(self.latents))[place]
        latents, generator = self.latents[example], _generator(self.seed, 1, index)
        kept = int(torch.rand((), generator=generator) >= self.dropout)
        return {
            "latents": latents,
            "timestep": torch.randint(self.timesteps, (), generator=generator),
            "noise": draw_noise(latents.shape, generator, dtype=torch.float32),
            "conditions": {name: rows[kept] for name, rows in self.conditions[example].items()},
        }


def collate(draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of several draws; conditions of different lengths are filled up with zeros, which are masked."""
    batch = {name: torch.stack([draw[name] for draw in draws]) for name in ("latents", "timestep", "noise")}
    names = draws[0]["conditions"]
    return {**batch, "conditions": {name: _filled([draw["conditions"][name] for draw in draws]) for name in names}}


def _filled(rows: list[torch.Tensor]) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=_generator(seed, 0, epoch)).tolist()


def _generator(*key: int) -> torch.Generator:
    """Of its own for each key, with nothing in common with those of neighbouring ones."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
