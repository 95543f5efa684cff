"""Train a LoRA for the decoder of Kandinsky 2.2, which draws from image embeddings.

    accelerate launch examples/training/train_lora_22_decoder.py --data pictures --output lora --mixed-precision bf16

Each picture is drawn from its own CLIP embedding, so no captions are needed. At use the prior makes the embedding:

    pipe = AutoPipelineForText2Image.from_pretrained("kandinsky-community/kandinsky-2-2-decoder")
    pipe.load_lora_weights("lora")

See README.md in this folder for the data, the options and what may run out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from _dataset import Conditions, Example, read_examples
from _lora_training import Material, train_lora
from _settings import Settings, run

from kandinsky_diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline


TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")  # all linear layers of the attention


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(Settings):
    """Settings of this training."""

    decoder: Annotated[str, typer.Option(help="Folder or Hub id of the decoder.")] = (
        "kandinsky-community/kandinsky-2-2-decoder"
    )
    prior: Annotated[str, typer.Option(help="Folder or Hub id of the prior, whose CLIP embeds the pictures.")] = (
        "kandinsky-community/kandinsky-2-2-prior"
    )


def train(settings: DecoderSettings) -> list[float]:
    """Train a LoRA for the decoder of Kandinsky 2.2."""
    examples = read_examples(settings.data, captions=False)

    def prepare(device: torch.device, dtype: torch.dtype) -> Material:
        conditions, validation = embed(settings, examples, device, dtype)
        pipe = KandinskyV22Pipeline.from_pretrained(settings.decoder, dtype=dtype).to(device)
        return Material(pipe, conditions, validation, TARGETS)

    return train_lora(settings, examples, prepare)


def embed(
    settings: DecoderSettings, examples: Sequence[Example], device: torch.device, dtype: torch.dtype
) -> tuple[list[Conditions], list[dict[str, Any]]]:
    """Embeddings of the pictures, by CLIP, and of the validation prompts, by the prior."""
    pipe = KandinskyV22PriorPipeline.from_pretrained(settings.prior, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    conditions: list[Conditions] = []
    for example in examples:
        embeds: Any = pipe.interpolate([example.picture(settings.size)], [1.0])
        pair = torch.cat([embeds.negative_image_embeds, embeds.image_embeds])
        conditions.append({"image_embeds": pair.cpu()})
    prompts = settings.validation_prompt or []
    seeded = (torch.Generator().manual_seed(settings.seed + number) for number in range(len(prompts)))
    validation = [dict(pipe(prompt, generator=each)) for prompt, each in zip(prompts, seeded, strict=True)]
    return conditions, validation


if __name__ == "__main__":
    run(train, DecoderSettings)
