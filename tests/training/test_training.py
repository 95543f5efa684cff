"""The training of the tiny Kandinsky: it can be interrupted, and what it writes is a release of 2.1."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, UnCLIPScheduler
from torch import nn

from kandinsky_diffusers.demo import convert_release
from training.captions import random_caption
from training.corpus import EMPTY, Corpus, load_tokenizer, prepare, tokenize
from training.crew import Crew
from training.decoder import random_keep_masks
from training.diffusion import Diffusion, cosine_betas, linear_betas
from training.files import read_jsonl
from training.loop import LOG, Schedule, Trainer
from training.models import make_movq
from training.movq import rescale
from training.release import write_release
from training.stage import WEIGHTS
from training.stages import STAGES, Plan, best_so_far, run_stage
from training.world import random_scene


CPU = torch.device("cpu")
SCENES = 8
RELEASE = {
    "ViT-L-14_stats.th",
    "decoder_fp16.ckpt",
    "hyperparameters.json",
    "inpainting_fp16.ckpt",
    "movq_final.ckpt",
    "prior_fp16.ckpt",
    "text_encoder/pytorch_model.bin",
    "text_encoder/tokenizer.json",
    "clip/model.safetensors",
    "clip/tokenizer.json",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a small corpus, and no stage done."""
    folder = tmp_path_factory.mktemp("work")
    prepare(folder, scenes=SCENES, seed=0)
    return folder


# ---------------------------------------------------------------------------------------------------------- the loop


def trainer(folder: Path, steps: int, seconds: float | None = None) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)

    def loss(rows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        noise = torch.randn(len(rows), 1, generator=generator)
        return {"loss": (model(rows[:, None] / 10 + noise) - 3 * rows[:, None]).square().mean()}

    schedule = Schedule(8, batch_size=4, learning_rate=0.1, seconds=seconds, log_every=2, seed=5)
    made = Trainer(model, loss, 10, schedule, folder, Accelerator(cpu=True))
    if steps < 8:
        interrupt_at(made, steps)
    return made


def interrupt_at(trainer: Trainer, steps: int) -> None:
    take_step: Callable[[float], Any] = trainer._step

    def step(rate: float) -> Any:
        if trainer.step == steps:
            trainer.save()
            raise KeyboardInterrupt
        return take_step(rate)

    trainer._step = step


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", steps=8)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts", steps=5).run()
    second = trainer(tmp_path / "parts", steps=8)
    assert second.step == 5
    second.run()

    for one, other in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)
    logs = [[line["loss"] for line in read_jsonl(tmp_path / name / LOG)] for name in ("whole", "parts")]
    assert [len(log) for log in logs] == [4, 4]
    assert logs[0][:2] == logs[1][:2]


def test_a_training_with_a_time_limit_ends_in_time_at_a_low_rate(tmp_path: Path) -> None:
    limited = trainer(tmp_path, steps=8, seconds=0.5)
    began = time.monotonic()
    limited.run()

    assert limited.step > 8, "the time counts, not the steps"
    assert time.monotonic() - began < 5
    assert limited.optimizer.param_groups[0]["lr"] < 0.01


# ------------------------------------------------------------------------------------------------------------ stages


def test_a_stage_leaves_weights_a_log_and_what_later_ones_need(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "movq", replace(STAGES["movq"], batch_sizes=(4, 4)))
    run_stage("movq", Plan(work, cpu=True, shorter=2500))

    written = torch.load(work / "movq" / WEIGHTS, weights_only=True)
    assert written["latents"].shape == (SCENES, 4, 8, 8)
    assert written["latents"].abs().quantile(0.995).item() == pytest.approx(1, abs=0.2)
    assert read_jsonl(work / "movq" / LOG)[0]["step"] == 1
    assert Plan(work).is_done("movq")
    assert torch.equal(best_so_far(work)["movq"].quant_conv.weight, written["model"]["quant_conv.weight"])


def test_without_time_for_any_stage_there_is_a_release_all_the_same(work: Path, tmp_path: Path) -> None:
    over = Plan(work, began=time.time() - 100, ends=time.time() - 50)
    unfinished = Crew(over, tmp_path / "release", processes=2).run()

    assert set(unfinished) <= set(STAGES)
    assert {path.relative_to(tmp_path / "release").as_posix() for path in (tmp_path / "release").rglob("*")} >= RELEASE
    assert (tmp_path / "release_logs" / "curves.png").is_file()


def test_the_release_is_small_and_converts_to_the_models_that_were_trained(work: Path, tmp_path: Path) -> None:
    models = best_so_far(work)
    release = write_release(models, work / "tokenizers", tmp_path / "release")
    assert sum(path.stat().st_size for path in release.rglob("*") if path.is_file()) < 25e6

    convert_release(release, tmp_path / "repos")

    prior = DiffusionPipeline.from_pretrained(tmp_path / "repos" / "kandinsky-2-1-prior")
    decoder, inpainting = (
        DiffusionPipeline.from_pretrained(tmp_path / "repos" / name)
        for name in ("kandinsky-2-1", "kandinsky-2-1-inpaint")
    )
    for trained, converted in (
        (models["prior"], prior.prior),
        (models["decoder"], decoder.unet),
        (models["inpainting"], inpainting.unet),
        (models["movq"], decoder.movq),
        (models["mclip"], decoder.text_encoder),
        (models["clip"], prior.text_encoder),
        (models["clip"], prior.image_encoder),
    ):
        assert_same_weights(trained, converted)
    text = random_caption(random_scene(random.Random(1)), "ru", random.Random(1))
    for name, tokenizer in (("clip", prior.tokenizer), ("mclip", decoder.tokenizer)):
        assert torch.equal(tokenize(tokenizer, [text]), tokenize(load_tokenizer(work, name), [text]))


def assert_same_weights(trained: nn.Module, converted: nn.Module) -> None:
    weights = trained.state_dict()
    for key, tensor in converted.state_dict().items():
        exact = torch.equal(tensor, weights[key])
        assert exact or torch.equal(tensor, weights[key].half().float()), key


# ------------------------------------------------------------------------------------------------ what is trained on


def test_the_noise_is_that_of_the_schedulers_of_the_pipelines() -> None:
    clean, noise = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    timesteps: Any = torch.tensor([0, 1, 500, 998, 999])
    decoders = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012)
    priors = UnCLIPScheduler(1000)

    for scheduler, betas in ((decoders, linear_betas()), (priors, cosine_betas())):
        expected = scheduler.add_noise(clean, noise, timesteps)
        torch.testing.assert_close(Diffusion(betas, CPU).noised(clean, noise, timesteps), expected, atol=2e-3, rtol=0)


def test_the_bound_is_lowest_for_the_true_variance_and_moves_no_mean() -> None:
    diffusion, timesteps = Diffusion(linear_betas(), CPU), torch.tensor([1, 300, 900])
    clean, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    noisy = diffusion.noised(clean, noise, timesteps)

    def bound(share: float) -> torch.Tensor:
        predicted = torch.cat([noise, torch.full_like(noise, share)], dim=1)
        return diffusion.variance_bound(predicted, clean, noisy, timesteps)

    torch.testing.assert_close(bound(-1.0), torch.zeros(3), atol=1e-4, rtol=0)  # that of the exact step back
    assert (bound(0.0) > bound(-1.0)).all()
    predicted = torch.randn(3, 8, 8, 8, requires_grad=True)
    diffusion.variance_bound(predicted, clean, noisy, timesteps).sum().backward()
    assert predicted.grad is not None
    assert predicted.grad[:, :4].abs().max() == 0
    assert predicted.grad[:, 4:].abs().min() > 0


def test_rescaling_latents_leaves_pictures_as_they_were() -> None:
    torch.manual_seed(0)
    movq, pictures = make_movq().eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    mean, scale = torch.randn(4), torch.rand(4) + 0.5
    with torch.no_grad():
        latents = movq.encode(pictures).latents
        decoded = movq.decode(latents, force_not_quantize=True).sample
        rescale(movq, mean, scale)
        rescaled = movq.encode(pictures).latents
        again = movq.decode(rescaled, force_not_quantize=True).sample

    expected = (latents - mean.view(-1, 1, 1)) / scale.view(-1, 1, 1)
    torch.testing.assert_close(rescaled, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, decoded, atol=1e-4, rtol=1e-4)


def test_masks_are_boxes_ellipses_and_whole_pictures() -> None:
    masks = random_keep_masks(500, torch.Generator().manual_seed(0))

    assert masks.shape == (500, 1, 8, 8)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert 0.05 < (masks.sum(dim=(1, 2, 3)) == 0).float().mean() < 0.4
    assert (masks.sum(dim=(1, 2, 3)) == 64).float().mean() < 0.1, "with nothing to paint nothing is learned"


def test_captions_of_one_scene_and_number_are_alike_and_clip_ends_a_text_with_its_highest_token(work: Path) -> None:
    corpus = Corpus.load(work, CPU)
    tokenizer = load_tokenizer(work, "clip")

    assert corpus.clip_ids.max() == tokenizer.eos_token_id == len(tokenizer) - 1
    assert corpus.pictures.shape == (SCENES, 3, 64, 64)
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in corpus.clip_ids]
    assert said[EMPTY] == ""
    for number, english in enumerate(corpus.english.tolist()):
        assert ("background" in said[english]) == ("фон" in said[number] or "background" in said[number])
        assert said[english].isascii()
