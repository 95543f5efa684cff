"""Kandinsky 2.2, the priors: from a prompt, or a prompt and a picture, to the image embedding that is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import PIL.Image
import torch
from diffusers.pipelines.kandinsky.pipeline_kandinsky_prior import KandinskyPriorPipelineOutput
from diffusers.pipelines.kandinsky2_2 import (
    KandinskyV22PriorEmb2EmbPipeline as StockKandinskyV22PriorEmb2EmbPipeline,
)
from diffusers.pipelines.kandinsky2_2 import KandinskyV22PriorPipeline as StockKandinskyV22PriorPipeline

from ..inputs import as_prompts, check_strength, expand
from ..options import PriorOptions, Prompts, accepts
from ..prior_pipeline import Embedded, PriorPipeline
from ..schedulers import noise_to, start_at


class KandinskyV22PriorPipeline(PriorPipeline, StockKandinskyV22PriorPipeline):
    """Text to image embedding with Kandinsky 2.2, see [`PriorPipeline`]."""

    _embeds_negative_prior_prompt = True


class KandinskyV22PriorEmb2EmbPipeline(PriorPipeline, StockKandinskyV22PriorEmb2EmbPipeline):
    """Image embedding to image embedding with Kandinsky 2.2: a picture, changed towards a prompt.

    Made of the parts of [`PriorPipeline`]; `interpolate` is that of [`KandinskyV22PriorPipeline`].
    """

    _embeds_negative_prior_prompt = True

    @torch.no_grad()
    @accepts(PriorOptions, stock=StockKandinskyV22PriorEmb2EmbPipeline)
    def __call__(
        self,
        prompt: Prompts,
        image: PIL.Image.Image | torch.Tensor | Sequence[Any] | None = None,
        strength: float = 0.3,
        **options: Unpack[PriorOptions],
    ) -> Embedded:
        """Image embeddings between those of pictures and those of prompts.

        Args:
            prompt: one or several, in English.
            image: one for all prompts, or one for each: PIL pictures, pixel values `[batch, 3, height, width]` as the
                image encoder takes them, or embeddings `[batch, width]`.
            strength: above 0, up to 1, which forgets the embedding: the share of the steps that are made.
            options: [`PriorOptions`]; `latents` are the noise that is put on the embeddings.

        Returns:
            `image_embeds` and `negative_image_embeds`, each `[embeddings, width]`.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        call = self._check({**options, **locals()})
        items = _as_items(image, self.prior.config.embedding_dim)
        rows = sum(1 if isinstance(item, PIL.Image.Image) else len(item) for item in items)
        prompts = len(as_prompts(prompt))
        expand(torch.empty(rows, 1), prompts, call.embeddings, "image")
        check_strength(strength)
        self.scheduler.set_timesteps(call["num_inference_steps"])  # on the host, see `RunningCall`
        timesteps, noise_timestep = start_at(self.scheduler, strength)
        if noise_timestep is None:
            raise ValueError("`strength` is 0, which changes nothing; accepted is more, up to 1.")

        embeds = expand(self._embeds_of_items(items), prompts, call.embeddings, "image").repeat(call.halves, 1)
        noise = self._noise(call)
        return self._embed(call, timesteps, noise_to(self.scheduler, embeds.to(noise), noise, noise_timestep))

    def _embed_text(self, prompt: str, **options: Any) -> KandinskyPriorPipelineOutput:
        return PriorPipeline.__call__(self, prompt, **options)

    def _embeds_of_items(self, items: Sequence[PIL.Image.Image | torch.Tensor]) -> torch.Tensor:
        device = self._execution_device
        given = (isinstance(item, torch.Tensor) and item.ndim == 2 for item in items)
        return torch.cat(
            [
                item.to(device) if is_embeds else self._encode_image(item, device)
                for item, is_embeds in zip(items, given, strict=True)
            ]
        )


def _as_items(image: Any, width: int) -> list[Any]:
    """PIL pictures, pixel values `[batch, 3, height, width]` and embeddings `[batch, width]`."""
    items = list(image) if isinstance(image, (list, tuple)) else [image]
    for item in items:
        if not isinstance(item, (PIL.Image.Image, torch.Tensor)):
            raise TypeError(f"`image` is or has a {type(item).__name__}; accepted are PIL pictures and tensors.")
        shape = tuple(item.shape) if isinstance(item, torch.Tensor) else None
        if shape is not None and not ((len(shape) == 2 and shape[1] == width) or (len(shape) == 4 and shape[1] == 3)):
            raise ValueError(
                f"`image` has the shape {list(shape)}; accepted are pixel values [batch, 3, height, width] and"
                f" embeddings [batch, {width}]."
            )
    if not items:
        raise ValueError("`image` is an empty list; at least one picture is needed.")
    return items
