"""Drawing the rows of the demo with the repositories that a conversion wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from ..conversion.repository import Progress
from .motifs import COLOURED_SHAPES, Motifs
from .rows import Picture, Row, Shot, from_text, rows_of


DECODER, INPAINTING = "kandinsky-2-1", "kandinsky-2-1-inpaint"
AUTO_PIPELINES: dict[str, Any] = {
    "text": AutoPipelineForText2Image,
    "mix": AutoPipelineForText2Image,
    "image": AutoPipelineForImage2Image,
    "inpainting": AutoPipelineForInpainting,
}


@dataclass(frozen=True)
class Settings:
    """What the demo draws, and how.

    Args:
        motifs: the prompts.
        size: height and width in pixels; None for those that the release was trained on.
        steps: of the decoder.
        prior_steps: of the prior.

    Raises:
        ValueError: the lowest strength of image to image leaves none of the steps.
    """

    motifs: Motifs = COLOURED_SHAPES
    size: int | None = None
    steps: int = 25
    prior_steps: int = 10

    def __post_init__(self) -> None:
        fewest = math.ceil(1 / min(self.motifs.strengths))
        if self.steps < fewest:
            raise ValueError(f"`steps` is {self.steps}; accepted are {fewest} and more, for image to image needs one.")


def draw(repos: Mapping[str, Path], settings: Settings, progress: Progress | None = None) -> list[Row[Picture]]:
    """Draw all rows, one picture at a time.

    Args:
        repos: the converted repositories by their names; that for inpainting may be missing.
        settings: what is drawn, and how.
        progress: makes a progress bar; called with tqdm's arguments.
    """
    artist = Artist(repos, settings)
    start = artist.draw(from_text(settings.motifs.start))
    rows = list(rows_of(settings.motifs, start, inpainting=INPAINTING in repos))
    total = sum(isinstance(item, Shot) for row in rows for item in row.items)
    bar = progress(total=total, desc="drawing") if progress else None
    drawn = []
    for row in rows:
        pictures = []
        for item in row.items:
            if isinstance(item, Shot):
                item = Picture(item.caption, item.description, artist.draw(item))
                if bar:
                    bar.update(1)
            pictures.append(item)
        drawn.append(Row(row.title, row.text, tuple(pictures)))
    if bar:
        bar.close()
    return drawn


class Artist:
    """Draws with the repositories of a release; models of one task are in memory at a time.

    Args:
        repos: by their names.
        settings: for all pictures.
    """

    def __init__(self, repos: Mapping[str, Path], settings: Settings) -> None:
        self._repos, self._settings = repos, settings
        self._auto_pipeline: Any = None
        self._pipeline: Any = None

    def draw(self, shot: Shot) -> Image.Image:
        """Draw a picture."""
        pipeline = self._pipeline_for(shot.task)
        size = self._settings.size or _size_of_training(pipeline)
        call = pipeline.mix if shot.task == "mix" else pipeline
        return call(
            height=size,
            width=size,
            num_inference_steps=self._settings.steps,
            prior_num_inference_steps=self._settings.prior_steps,
            generator=torch.Generator().manual_seed(shot.seed),
            **shot.arguments,
        ).images[0]

    def _pipeline_for(self, task: str) -> Any:
        auto_pipeline = AUTO_PIPELINES[task]
        if self._auto_pipeline is not auto_pipeline:
            self._pipeline = None  # its memory first
            repo = self._repos[INPAINTING if task == "inpainting" else DECODER]
            with _without_loading_bars():
                loaded = auto_pipeline.from_pretrained(repo)
            self._pipeline = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
            self._pipeline.set_progress_bar_config(disable=True)
            self._auto_pipeline = auto_pipeline
        return self._pipeline


def _size_of_training(pipeline: Any) -> int:
    return pipeline.unet.config.sample_size * pipeline.decoder_pipe.movq_scale_factor


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
