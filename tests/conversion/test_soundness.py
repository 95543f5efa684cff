"""`verify` without anything to compare with: what is written is sound, and damage of any kind is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kandinsky_diffusers.conversion import verify
from tests.support.verification import PRIOR, change, failures, problems


def test_what_convert_has_written_is_sound_and_runs(prior_in_shards: Path) -> None:
    found = verify(prior_in_shards)
    assert found.passed
    assert found.loaded_and_run == "KandinskyPriorPipeline"
    assert {component.name for component in found.components} == {"prior", "text_encoder", "image_encoder"}
    assert all(component.outcomes.keys() == {"sound"} for component in found.components)


def truncate(repo: Path) -> None:
    path = next(repo.joinpath("prior").glob("*-00001-of-*"))
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_shard(repo: Path) -> None:
    next(repo.joinpath("prior").glob("*-00002-of-*")).unlink()


def lose_an_index(repo: Path) -> None:
    next(repo.joinpath("prior").glob("*.index.json")).unlink()


def shorten_an_index(repo: Path) -> None:
    path = next(repo.joinpath("prior").glob("*.index.json"))
    index = json.loads(path.read_text())
    del index["weight_map"]["prd_embedding"]
    path.write_text(json.dumps(index))


def lose_a_component(repo: Path) -> None:
    shutil.rmtree(repo / "tokenizer")


def lose_weights(repo: Path) -> None:
    for path in repo.joinpath("prior").glob("diffusion*"):
        path.unlink()


def flip_a_bit(repo: Path) -> None:
    """Neither a size nor a header tells this."""
    path = next(repo.joinpath("prior").glob("*-00001-of-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def break_the_scheduler(repo: Path) -> None:
    (repo / "scheduler" / "scheduler_config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (truncate, r"prior/diffusion_pytorch_model-00001-of-\d+\.safetensors .* truncated"),
        (lose_a_shard, "lists 'diffusion_pytorch_model-00002-of-"),
        (lose_an_index, "diffusion_pytorch_model-00001-of-.*without an index"),
        (shorten_an_index, "1 tensors, such as prd_embedding, are not in"),
        (lose_a_component, "lists tokenizer, and there is no such folder"),
        (lose_weights, "prior has a config.json, but no weights"),
        (flip_a_bit, "00001-of-.* is not the file that was written and verified"),
        (break_the_scheduler, "does not run"),
    ],
)
def test_damage_of_any_kind_is_found(
    prior_in_shards: Path, tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    repo = shutil.copytree(prior_in_shards, tmp_path / prior_in_shards.name)
    spoil(repo)
    found = verify(repo, run=spoil is break_the_scheduler)
    assert not found.passed
    assert re.search(named, problems(found)), problems(found)


def test_numbers_that_are_not_finite_are_named(prior_repo: Path) -> None:
    change(prior_repo / PRIOR, "clip_std", lambda std: std.index_fill(1, torch.tensor([1]), torch.inf))
    found = verify(prior_repo)
    assert {key: tensor.outcome for key, tensor in failures(found).items()} == {"clip_std": "not finite"}
    assert found.loaded_and_run is None


def test_a_model_with_fewer_tensors_than_were_written_is_found(prior_repo: Path) -> None:
    written = len(load_file(prior_repo / PRIOR))
    change(prior_repo / PRIOR, "clip_std", lambda std: None)
    assert f"{written - 1} tensors; conversion.json says {written}" in problems(verify(prior_repo, run=False))


def test_pickled_weights_are_checked_and_never_executed(prior_repo: Path, tmp_path: Path) -> None:
    target = prior_repo / "prior" / "diffusion_pytorch_model.bin"
    torch.save({"weight": torch.zeros(100)}, target)
    content = bytearray(target.read_bytes())
    content[content.index(bytes(400)) + 7] = 1
    target.write_bytes(content)
    assert "does not have the checksum" in problems(verify(prior_repo, run=False))

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"weight": Bomb()}, target)
    assert not verify(prior_repo, run=False).passed
    assert not (tmp_path / "executed").exists()


def test_a_repository_of_another_pipeline_is_loaded_but_not_run(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

    sizes: dict[str, Any] = {"num_attention_heads": 1, "attention_head_dim": 4, "num_layers": 1, "sample_size": 2}
    sizes |= {"num_embeds_ada_norm": 2, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
    scheduler: Any = DDPMScheduler()
    autoencoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    DiTPipeline(DiTTransformer2DModel(**sizes), autoencoder, scheduler).save_pretrained(tmp_path)
    found = verify(tmp_path)
    assert found.passed
    assert found.loaded_and_run is None
    assert "loaded as DiTPipeline, but not run" in found.notes[0]
