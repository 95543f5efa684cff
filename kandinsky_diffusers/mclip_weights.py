"""Where every tensor of M-CLIP goes, the multilingual text encoder of 2.0 and 2.1."""

from __future__ import annotations

from typing import Any

from .conversion.hub_source import model_settings
from .conversion.matching import Shapes
from .conversion.recipe import Config, Inputs
from .conversion.rules import Drop, RuleTable, rename
from .conversion.shapes import count_modules, shape_of


POSITION_IDS = "position numbers, a buffer of old transformers versions"

# What shapes cannot tell, as published.
XLM_ROBERTA_HEAD_DIM = 64
XLM_ROBERTA = {"layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def is_mclip(shapes: Shapes) -> bool:
    """Whether these are the keys of M-CLIP."""
    return "LinearTransformation.weight" in shapes


def mclip_config(shapes: Shapes, inputs: Inputs, *, folder: str) -> dict[str, Any]:
    """Configuration of ``MultilingualCLIP``: sizes from the shapes, the rest from ``config.json`` in ``folder``."""
    words, width = shape_of(shapes, "transformer.embeddings.word_embeddings.weight")
    return {
        **XLM_ROBERTA,
        "num_attention_heads": max(1, width // XLM_ROBERTA_HEAD_DIM),
        **model_settings(inputs.json("release", f"{folder}/config.json")),
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": count_modules(shapes, "transformer.encoder.layer"),
        "intermediate_size": shape_of(shapes, "transformer.encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": shape_of(shapes, "transformer.embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape_of(shapes, "transformer.embeddings.token_type_embeddings.weight")[0],
        "transformerDimSize": shape_of(shapes, "LinearTransformation.weight")[1],
        "imageDimSize": shape_of(shapes, "LinearTransformation.weight")[0],
    }


def mclip_rules(config: Config) -> RuleTable:
    """Rules of M-CLIP: ``MultilingualCLIP`` kept the original's names."""
    return RuleTable(
        rules=(
            rename("transformer.embeddings.{name}.{p}", "transformer.embeddings.{name}.{p}"),
            rename("transformer.encoder.{rest}", "transformer.encoder.{rest}"),
            rename("transformer.pooler.dense.{p}", "transformer.pooler.dense.{p}"),
            rename("LinearTransformation.{p}", "LinearTransformation.{p}"),
        ),
        drops=(Drop("transformer.embeddings.position_ids", POSITION_IDS),),
        paths={
            "name": {n: n for n in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")}
        },
    )
