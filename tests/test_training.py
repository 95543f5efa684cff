"""The training scripts in examples/training: on tiny models, from a folder of pictures to a LoRA that draws them."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from _dataset import Draws, Example, collate, read_examples
from _lora_training import noise_schedule_of
from _settings import Settings, run
from safetensors.torch import load_file
from train_lora_3 import Kandinsky3Settings, contexts_of, encode
from train_lora_3 import train as train_3
from train_lora_22_decoder import DecoderSettings
from train_lora_22_decoder import train as train_22

from kandinsky_diffusers import Kandinsky3Pipeline, Kandinsky3UNet, KandinskyV22Pipeline, KandinskyV22PriorPipeline
from kandinsky_diffusers.images import pixels_from
from kandinsky_diffusers.k3.text import context_of
from tests.support import tiny22


RED, BLUE = (220, 30, 30), (30, 30, 220)
CPU = torch.device("cpu")
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_out"]  # random attention cannot learn to see noise


def write_picture(folder: Path, name: str, colour: tuple[int, int, int], caption: str | None = None) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    PIL.Image.new("RGB", (96, 80), colour).save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption)
    return folder


def picture(colour: tuple[int, int, int]) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (64, 64), colour)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one red picture."""
    return write_picture(tmp_path_factory.mktemp("data"), "red", RED, "a red picture")


@pytest.fixture(scope="session")
def repos_22(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("repos")
    KandinskyV22Pipeline(**tiny22.decoder_components()).save_pretrained(folder / "kandinsky-2-2-decoder")
    KandinskyV22PriorPipeline(**tiny22.prior_components()).save_pretrained(folder / "kandinsky-2-2-prior")
    return {"decoder": str(folder / "kandinsky-2-2-decoder"), "prior": str(folder / "kandinsky-2-2-prior")}


@pytest.fixture
def settings_22(data: Path, repos_22: dict[str, str], tmp_path: Path) -> Callable[..., DecoderSettings]:
    def make(**changed: Any) -> DecoderSettings:
        usual = {"data": data, "output": tmp_path / "lora", "size": 64, "learning_rate": 1e-2, **repos_22}
        return DecoderSettings(**{**usual, **changed})

    return make


# --- Settings and data


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 100},
        {"steps": 0},
        {"rank": 0},
        {"condition_dropout": 1.5},
        {"learning_rate": 0.0},
        {"checkpoint_limit": 0},
        {"seed": -1},
        {"max_grad_norm": float("nan")},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_bad_settings_are_named(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` is .*; accepted"):
        Settings(data=tmp_path, output=tmp_path / "lora", **bad)


def no_folder(data: Path) -> str:
    return "accepted is a folder"


def no_pictures(data: Path) -> str:
    data.mkdir()
    return "no pictures"


def no_caption(data: Path) -> str:
    write_picture(write_picture(data, "red", RED, "a red picture"), "blue", BLUE)
    return r"no caption for blue\.png"


def no_caption_in_metadata(data: Path) -> str:
    (write_picture(data, "red", RED) / "metadata.jsonl").write_text('{"file_name": "red.png"}')
    return r"no caption for red\.png"


def no_metadata(data: Path) -> str:
    (write_picture(data, "red", RED) / "metadata.jsonl").write_text('\n["red.png"]')
    return "line 2"


def no_such_picture(data: Path) -> str:
    (write_picture(data, "red", RED) / "metadata.jsonl").write_text('{"file_name": "rot.png", "text": "rot"}')
    return r"rot\.png"


def no_picture(data: Path) -> str:
    write_picture(data, "red", RED, "a red picture")
    (data / "red.png").write_text("red")
    return r"red\.png"


@pytest.mark.parametrize(
    "make", [no_folder, no_pictures, no_caption, no_caption_in_metadata, no_metadata, no_such_picture, no_picture]
)
def test_bad_data_is_named_before_any_model_is_looked_for(make: Callable[[Path], str], tmp_path: Path) -> None:
    message = make(tmp_path / "data")

    with pytest.raises(ValueError, match=f"`data`.*{message}"):
        train_3(Kandinsky3Settings(data=tmp_path / "data", output=tmp_path / "lora", model="nowhere"))
    assert not (tmp_path / "lora").exists()


def test_captions_come_from_metadata_or_from_files_beside_the_pictures(tmp_path: Path) -> None:
    beside = write_picture(write_picture(tmp_path / "a", "red", RED, "a red picture"), "blue", BLUE, "a blue picture")
    named = write_picture(write_picture(tmp_path / "b", "red", RED), "blue", BLUE)
    rows = [{"file_name": f"{name}.png", "text": f"a {name} picture"} for name in ("blue", "red")]
    (named / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    found = [[(e.path.name, e.caption) for e in read_examples(folder, captions=True)] for folder in (beside, named)]

    assert found[0] == found[1] == [("blue.png", "a blue picture"), ("red.png", "a red picture")]


def test_pictures_are_cut_to_the_square_in_their_middle(tmp_path: Path) -> None:
    image = PIL.Image.new("RGBA", (192, 96), BLUE)
    image.paste(RED, (48, 0, 144, 96))
    image.save(tmp_path / "wide.png")

    square = Example(tmp_path / "wide.png").picture(64)

    assert square.size == (64, 64)
    assert abs(np.asarray(square, dtype=float) - RED).max() < 12  # the filter sees a little beyond the border


def test_the_command_line_fills_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[DecoderSettings] = []
    line = f"train --data {tmp_path} --output lora --size 256 --validation-prompt a --validation-prompt b"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--lr-schedule", "cosine", "--prior", "some/prior"])

    with pytest.raises(SystemExit, match="0"):
        run(taken.append, DecoderSettings)

    (settings,) = taken
    assert (settings.data, settings.size, settings.validation_prompt) == (tmp_path, 256, ["a", "b"])
    assert (settings.lr_schedule.value, settings.prior) == ("cosine", "some/prior")
    assert settings.decoder == "kandinsky-community/kandinsky-2-2-decoder"


# --- What training sees


def draws(count: int, **changed: Any) -> Draws:
    """Of examples that are told by their latents; the condition of number n has n + 1 rows, of ones, or else zeros."""
    latents = [torch.full((4, 2, 2), float(number)) for number in range(count)]
    rows = [torch.ones(number + 1, 3) for number in range(count)]
    conditions = [{"context": torch.stack([torch.zeros_like(ones), ones])} for ones in rows]
    usual = {"timesteps": 1000, "dropout": 0.25, "seed": 0, "length": 400}
    return Draws(latents, conditions, **{**usual, **changed})


def every(parts: Draws) -> list[dict[str, Any]]:
    return [parts[index] for index in range(len(parts))]


def test_each_pass_shows_every_example_once_in_an_order_of_its_own() -> None:
    seen = [int(draw["latents"][0, 0, 0]) for draw in every(draws(5))]
    passes = [seen[start : start + 5] for start in range(0, 400, 5)]

    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 40


def test_draws_follow_from_seed_and_place() -> None:
    one, same, other = (every(draws(5, seed=seed)) for seed in (3, 3, 4))

    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a["noise"], b["noise"])
        assert a["timestep"] == b["timestep"]
        assert not torch.equal(a["noise"], c["noise"])
    assert len({float(draw["noise"].sum()) for draw in one}) == len(one)
    assert min(int(draw["timestep"]) for draw in one) < 20
    assert max(int(draw["timestep"]) for draw in one) > 980


def test_the_share_of_draws_without_the_condition_is_the_one_asked_for() -> None:
    kept = Counter(float(draw["conditions"]["context"].max()) for draw in every(draws(5)))

    assert 0.2 < kept[0.0] / 400 < 0.3
    assert {float(draw["conditions"]["context"].min()) for draw in every(draws(5, dropout=0.0))} == {1.0}


def test_conditions_of_a_batch_are_filled_up_to_the_longest() -> None:
    batch = collate([draws(5, dropout=0.0)[place] for place in range(5)])

    assert batch["conditions"]["context"].shape == (5, 5, 3)
    assert batch["conditions"]["context"].sum() == 3 * (1 + 2 + 3 + 4 + 5)


def test_texts_of_a_batch_are_what_the_pipeline_draws_with(converted_31: Path) -> None:
    """Encoded one by one, and put together for a batch: what the UNet predicts is what it predicts in a call."""
    repo = str(converted_31 / "kandinsky-3-1")
    pipe: Any = Kandinsky3Pipeline.from_pretrained(repo)
    captions = ["a fox", "a red fox in a green field"]
    noise, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([7, 600])
    with torch.no_grad():
        states, negative_states, mask, negative_mask = pipe.encode_prompt(captions)
        halves = torch.cat([negative_states, states]), torch.cat([negative_mask, mask])
        in_a_call = context_of(pipe.unet, *halves, images=2)
        wanted = pipe.predict_noise(torch.cat([noise] * 2), torch.cat([timesteps] * 2), in_a_call)

        alone = [contexts_of(pipe.unet, states) for states in encode(captions, repo, CPU, torch.float32)]
        found = []
        for kept in (0, 1):
            rows = [{name: pair[kept] for name, pair in one.items()} for one in alone]
            seen = [
                {"latents": n, "noise": n, "timestep": n, "conditions": r} for n, r in zip(noise, rows, strict=True)
            ]
            found.append(pipe.predict_noise(noise, timesteps, collate(seen)["conditions"]))

    torch.testing.assert_close(torch.cat(found), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("repo", ["kandinsky-3-1", "kandinsky-3-1-inpaint"])
def test_noise_of_3_is_that_of_the_original(converted_31: Path, repo: str) -> None:
    schedule = noise_schedule_of(Kandinsky3Pipeline.from_pretrained(converted_31 / repo, text_encoder=None, movq=None))

    found = schedule.alphas_cumprod[[0, 19, 229, 479, 729, 979]]

    wanted = torch.tensor([0.99995869, 0.9982525, 0.8687737, 0.5250043, 0.1668527, 9.7119e-4])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


# --- Training


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def test_a_decoder_lora_draws_what_it_was_trained_on(
    settings_22: Callable[..., DecoderSettings], repos_22: dict[str, str]
) -> None:
    validation = {"validation_prompt": ["a cat"], "validation_every": 40, "validation_steps": 2}
    settings = settings_22(steps=40, batch_size=4, target=CONVOLUTIONS, **validation)

    losses = train_22(settings)

    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    assert [path.name for path in (settings.output / "validation").iterdir()] == ["step-000040-0.png"]
    pipe: Any = KandinskyV22Pipeline.from_pretrained(repos_22["decoder"])
    embeds: Any = KandinskyV22PriorPipeline.from_pretrained(repos_22["prior"]).interpolate([picture(RED)], [1.0])
    with torch.no_grad():
        red, blue = (pipe.encode_pixels(pixels_from(picture(colour), 64, 64), CPU) for colour in (RED, BLUE))

    def draw() -> torch.Tensor:
        options = {"height": 64, "width": 64, "num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "latent"}
        seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return pipe(**embeds, **options, num_images_per_prompt=4, generator=seeds).images

    without = draw()
    pipe.load_lora_weights(settings.output)
    drawn = draw()
    assert rms(drawn, red) < 0.8 * rms(without, red)
    assert rms(drawn, red) < rms(drawn, blue)


@pytest.fixture(scope="session")
def outspoken_31(converted_31: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Kandinsky 3.1 whose UNet predicts about as much as there is noise; the golden one predicts next to nothing."""
    repo = tmp_path_factory.mktemp("repos") / "kandinsky-3-1"
    shutil.copytree(converted_31 / "kandinsky-3-1", repo)
    unet = Kandinsky3UNet.from_pretrained(repo, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(5)
    unet.save_pretrained(repo / "unet")
    return str(repo)


@torch.no_grad()
def denoised(pipe: Any, latents: torch.Tensor, caption: str) -> torch.Tensor:
    """The latents that the UNet of 3.x sees in noisy ones, with noise that no training draws."""
    timesteps = torch.arange(100, 900, 25)
    schedule, noise = noise_schedule_of(pipe), torch.randn(len(timesteps), *latents.shape[1:])
    noisy = schedule.add_noise(latents.expand_as(noise), noise, timesteps)  # pyright: ignore[reportArgumentType]
    states, _, mask, _ = pipe.encode_prompt([caption] * len(timesteps), do_classifier_free_guidance=False)
    predicted = pipe.predict_noise(noisy, timesteps, context_of(pipe.unet, states, mask, images=len(timesteps)))
    alphas = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return (noisy - (1 - alphas).sqrt() * predicted) / alphas.sqrt()


def test_a_lora_of_3_sees_the_trained_picture_in_noise(outspoken_31: str, data: Path, tmp_path: Path) -> None:
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv_out"]
    usual = {"data": data, "output": tmp_path / "lora", "model": outspoken_31, "size": 64, "target": layers}
    losses = train_3(Kandinsky3Settings(**usual, steps=16, batch_size=2, learning_rate=2e-2))

    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    pipe: Any = Kandinsky3Pipeline.from_pretrained(outspoken_31)
    with torch.no_grad():
        red = pipe.encode_pixels(pixels_from(picture(RED), 64, 64), CPU)
    torch.manual_seed(0)
    without = denoised(pipe, red, "a red picture")
    pipe.load_lora_weights(tmp_path / "lora")
    torch.manual_seed(0)
    assert rms(denoised(pipe, red, "a red picture"), red) < 0.9 * rms(without, red)


# --- Checkpoints


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(settings_22: Callable[..., DecoderSettings]) -> None:
    usual = {"gradient_accumulation": 2, "lr_schedule": "cosine", "steps": 6, "checkpoint_every": 2, "snr_gamma": 5.0}
    whole = settings_22(**usual)
    losses = train_22(whole)
    weights = load_file(whole.output / "pytorch_lora_weights.safetensors")
    shutil.rmtree(whole.output / "checkpoint-6")

    resumed = train_22(settings_22(**usual, resume="latest"))

    assert resumed == losses[4:]
    again = load_file(whole.output / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_accumulated_batches_are_one_large_batch(settings_22: Callable[..., DecoderSettings], tmp_path: Path) -> None:
    at_once = train_22(settings_22(steps=3, batch_size=2))
    in_two = train_22(settings_22(steps=3, gradient_accumulation=2, output=tmp_path / "other"))

    assert in_two == pytest.approx(at_once, rel=1e-4)


def test_only_the_newest_checkpoints_are_kept(settings_22: Callable[..., DecoderSettings]) -> None:
    settings = settings_22(steps=3, checkpoint_every=1, checkpoint_limit=2)
    train_22(settings)

    assert {path.name for path in settings.output.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-3"}


def test_what_cannot_be_resumed_is_refused(settings_22: Callable[..., DecoderSettings], tmp_path: Path) -> None:
    train_22(settings_22(steps=1, checkpoint_every=1))
    checkpoint = str(tmp_path / "lora" / "checkpoint-1")

    for message, changed in {
        "`output` is .* not empty": {},
        "`steps` is 1; the checkpoint to resume has made 1": {"steps": 1, "resume": "latest"},
        "with `rank` 16 .now 4.": {"rank": 4, "resume": "latest"},
        "`resume` is 'latest'; there is no checkpoint": {"output": tmp_path / "new", "resume": "latest"},
        "`resume` is 'nowhere'": {"resume": "nowhere"},
    }.items():
        with pytest.raises(ValueError, match=message):
            train_22(settings_22(**{"steps": 2, "decoder": "nowhere", **changed}))
    assert len(train_22(settings_22(steps=2, output=tmp_path / "new", resume=checkpoint))) == 1
