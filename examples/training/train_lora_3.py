"""Train a LoRA for the UNet of Kandinsky 3.0 or 3.1.

    accelerate launch examples/training/train_lora_3.py --data pictures --output lora --model repos/kandinsky-3-1 \\
        --mixed-precision bf16

`repos` is what `kandinsky-diffusers convert` writes; `kandinsky-community/kandinsky-3` on the Hub works, too. At use:

    pipe = AutoPipelineForText2Image.from_pretrained("repos/kandinsky-3-1")
    pipe.load_lora_weights("lora")

See README.md in this folder for the data, the options and what may run out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from _dataset import Conditions, read_examples
from _lora_training import Material, train_lora
from _settings import Settings, run

from kandinsky_diffusers import Kandinsky3Pipeline
from kandinsky_diffusers.k3.text import context_of, stock_context_of


TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of all attention, also where the text is pooled
STATES = ("prompt_embeds", "negative_prompt_embeds", "attention_mask", "negative_attention_mask")

States = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Kandinsky3Settings(Settings):
    """Settings of this training."""

    model: Annotated[str, typer.Option(help="Folder or Hub id of Kandinsky 3.0 or 3.1.")] = "repos/kandinsky-3-1"


def train(settings: Kandinsky3Settings) -> list[float]:
    """Train a LoRA for the UNet of Kandinsky 3.0 or 3.1."""
    examples = read_examples(settings.data, captions=True)

    def prepare(device: torch.device, dtype: torch.dtype) -> Material:
        captions = [str(example.caption) for example in examples]
        prompts = settings.validation_prompt or []
        states = encode([*captions, *prompts], settings.model, device, dtype)
        pipe = Kandinsky3Pipeline.from_pretrained(settings.model, text_encoder=None, tokenizer=None, dtype=dtype)
        pipe.to(device)
        conditions = [contexts_of(pipe.unet, each) for each in states[: len(captions)]]
        return Material(pipe, conditions, states[len(captions) :], TARGETS)

    return train_lora(settings, examples, prepare)


def encode(texts: Sequence[str], model: str, device: torch.device, dtype: torch.dtype) -> list[States]:
    """States of each text, and those that stand for no text, as a pipeline takes them in the place of a prompt."""
    pipe = Kandinsky3Pipeline.from_pretrained(model, unet=None, movq=None, dtype=dtype).to(device)
    encoded: list[Any] = [pipe.encode_prompt(text) for text in texts]
    return [{name: rows.cpu() for name, rows in zip(STATES, each, strict=True)} for each in encoded]


@torch.no_grad()
def contexts_of(unet: Any, states: States) -> Conditions:
    """What the UNet attends to without, and with, a text: two rows, as where the pipeline draws with guidance."""
    each = (torch.cat([states[f"negative_{name}"], states[name]]) for name in ("prompt_embeds", "attention_mask"))
    rows, mask = (part.to(unet.device) for part in each)
    rows = rows.to(unet.dtype)
    if unet.config.has_null_embedding:
        context = context_of(unet, rows, mask, images=1)
    else:
        context = stock_context_of(rows, mask, images=1)
        context.setdefault("context_lengths", mask.new_full((2,), mask.shape[1]))  # longer neighbours come in a batch
    return {name: tensor.cpu() for name, tensor in context.items()}


if __name__ == "__main__":
    run(train, Kandinsky3Settings)
