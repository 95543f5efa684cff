"""The text encoder, the largest model of 3.x, in 8 or 4 bits through diffusers' quantization config (on the CPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, PipelineQuantizationConfig
from transformers import BitsAndBytesConfig, T5Config, T5EncoderModel

from kandinsky_diffusers import Kandinsky3Pipeline
from tests.k3.conftest import QUICK, seeded
from tests.k3.test_stock import fresh_unet


CONFIGS: dict[str, Any] = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
    # nf4: older bitsandbytes have no other 4 bits on the CPU
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


ALLOWED = {"8 bit": 0.05, "4 bit": 0.25}  # mean difference of the states, over their mean size


@pytest.fixture(scope="module")
def wide_repo(components: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo whose text encoder is wide enough for kernels of 4 bits."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, dropout_rate=0.0)
    parts = {**components("3.1"), "text_encoder": T5EncoderModel(config), "unet": fresh_unet(Kandinsky3Pipeline, 64)}
    folder = tmp_path_factory.mktemp("wide")
    Kandinsky3Pipeline(**parts).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", CONFIGS)
def test_the_text_encoder_alone_can_be_quantised(wide_repo: Path, bits: str) -> None:
    whole = AutoPipelineForText2Image.from_pretrained(wide_repo)
    quantized = AutoPipelineForText2Image.from_pretrained(
        wide_repo,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"text_encoder": CONFIGS[bits]}),
        device_map="cpu",
    )
    layers = {type(module).__name__ for module in quantized.text_encoder.modules()}
    assert layers & {"Linear8bitLt", "Linear4bit"}
    assert quantized.unet.dtype == quantized.movq.dtype == torch.float32
    states = [pipe.encode_prompt("a red fox")[0].float() for pipe in (whole, quantized)]
    assert 0 < (states[1] - states[0]).abs().mean() <= ALLOWED[bits] * states[0].abs().mean()
    quantized.set_progress_bar_config(disable=True)
    assert np.isfinite(quantized("a red fox", **QUICK, generator=seeded(0)[0]).images).all()
