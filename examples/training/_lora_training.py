"""The training loop of both scripts: LoRA on the attention of a pipeline's UNet, by predicting noise.

Encoders run before training, once over the whole data set, and are gone when it begins. Then there are the UNet and
the MoVQ, and what differs between versions is inside the pipeline's `predict_noise`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _dataset import Conditions, Draws, Example, collate
from _settings import Precision, Settings
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, compute_snr
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file

from kandinsky_diffusers.images import pixels_from
from kandinsky_diffusers.inputs import check_choice


WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = "settings.json"
CHECKPOINT = "checkpoint-"
DTYPES = {Precision.no: torch.float32, Precision.fp16: torch.float16, Precision.bf16: torch.bfloat16}
MAY_CHANGE = {  # when a training is resumed; everything else would make it another training
    "output",
    "steps",
    "resume",
    "report_to",
    "gradient_checkpointing",
    *("checkpoint_every", "checkpoint_limit", "validation_prompt", "validation_every", "validation_steps"),
}


@dataclass(frozen=True)
class Material:
    """What a script makes of its models and its data set.

    Args:
        pipe: with the UNet to train, and a MoVQ; it draws the validation pictures.
        conditions: of each example, as the pipeline's `predict_noise` takes them: two rows, without the condition (as
            the unconditional half has it) and with it.
        validation: for each validation prompt, what the pipeline is called with.
        targets: layers that get a LoRA unless the settings name some, by the end of their names.
    """

    pipe: Any
    conditions: Sequence[Conditions]
    validation: Sequence[dict[str, Any]]
    targets: Sequence[str]


Prepare = Callable[[torch.device, torch.dtype], Material]


class NoisePredictor(torch.nn.Module):
    """`predict_noise` of a pipeline as a module, for accelerate to wrap; it has the UNet's parameters.

    Channels beyond those of the latents, the variance that the UNet of 2.2 predicts too, are left out.
    """

    def __init__(self, pipe: Any):
        super().__init__()
        self.unet = pipe.unet
        self._predict_noise = pipe.predict_noise

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return self._predict_noise(latents, timesteps, conditions)[:, : latents.shape[1]]


def train_lora(settings: Settings, examples: Sequence[Example], prepare: Prepare) -> list[float]:
    """Train, and write `pytorch_lora_weights.safetensors` into `output`, for `pipe.load_lora_weights(output)`.

    Args:
        settings: of the training.
        examples: the data set.
        prepare: loads the models onto a device in a dtype, and encodes the conditions.

    Returns:
        the loss of each optimizer step made.

    Raises:
        ValueError: `output` is in use, or there is nothing, or another training, to resume. Nothing is loaded then.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation,
        mixed_precision=settings.mixed_precision,
        log_with=settings.report_to,
        project_dir=str(settings.output),
    )
    facts = _facts(settings, examples, accelerator)
    checkpoint = _checkpoint_to_resume(settings, facts)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    set_seed(settings.seed)  # of the LoRA's first weights
    dtype = DTYPES[Precision(accelerator.mixed_precision)]
    material = prepare(accelerator.device, dtype)
    latents = encode_latents(material.pipe, examples, settings.size, accelerator.device)
    training = LoraTraining(settings, accelerator, material, facts)
    losses = training.run(latents, checkpoint)
    if accelerator.is_main_process:
        material.pipe.save_lora_weights(settings.output)
    accelerator.end_training()
    return losses


@torch.no_grad()
def encode_latents(pipe: Any, examples: Sequence[Example], size: int, device: torch.device) -> list[torch.Tensor]:
    """Latents `[channels, height, width]` of each example, in main memory."""
    pixels = (pixels_from(example.picture(size), size, size) for example in examples)
    return [pipe.encode_pixels(picture, device)[0].cpu() for picture in pixels]


def noise_schedule_of(pipe: Any) -> DDPMScheduler:
    """The schedule that the UNet was trained on, whatever sampler the pipeline draws with.

    Raises:
        ValueError: the UNet predicts something else than noise.
    """
    schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    check_choice("prediction_type", schedule.config.prediction_type, ("epsilon",))
    return schedule


class LoraTraining:
    """One training: the LoRA in a pipeline's UNet, its optimizer, and where it stands.

    Args:
        settings: of the training.
        accelerator: as they say.
        material: what is trained on.
        facts: what must be the same when the training is resumed.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, material: Material, facts: dict[str, Any]):
        self.settings, self.accelerator, self.material, self.facts = settings, accelerator, material, facts
        self.pipe = material.pipe
        self.noise_schedule = noise_schedule_of(self.pipe)
        self.parameters = self._add_lora()
        optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.lr_schedule = get_scheduler(
            settings.lr_schedule,
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.steps,
        )
        self.model, self.optimizer = accelerator.prepare(NoisePredictor(self.pipe), optimizer)
        # not prepared, which would make a step of it in each process
        accelerator.register_for_checkpointing(self.lr_schedule)
        accelerator.register_save_state_pre_hook(self._save_only_lora)
        accelerator.register_load_state_pre_hook(self._load_only_lora)

    def _add_lora(self) -> list[torch.nn.Parameter]:
        unet, rank = self.pipe.unet, self.settings.rank
        unet.requires_grad_(False)
        config = LoraConfig(
            r=rank,
            lora_alpha=self.settings.alpha or rank,
            init_lora_weights="gaussian",
            target_modules=self.settings.target or list(self.material.targets),
        )
        unet.add_adapter(config)
        cast_training_params(unet, torch.float32)
        if self.settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return [parameter for parameter in unet.parameters() if parameter.requires_grad]

    def run(self, latents: Sequence[torch.Tensor], checkpoint: Path | None) -> list[float]:
        """The loop; returns the loss of each optimizer step made."""
        settings, accelerator = self.settings, self.accelerator
        step = 0
        if checkpoint is not None:
            accelerator.load_state(str(checkpoint))
            step = _recorded(checkpoint)["step"]
        if settings.report_to:
            accelerator.init_trackers("kandinsky-lora", config=self.facts)
        losses, parts = [], []
        self.pipe.set_progress_bar_config(disable=True)
        self.model.train()
        with tqdm(total=settings.steps, initial=step, desc="steps") as bar:
            for batch in self._batches(latents, step):
                parts.append(self._learn(batch))
                if not accelerator.sync_gradients:
                    continue
                step += 1
                losses.append(accelerator.reduce(torch.stack(parts).mean(), "mean").item())
                parts.clear()
                accelerator.log({"loss": losses[-1], "learning_rate": self.lr_schedule.get_last_lr()[0]}, step)
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
                if step % settings.checkpoint_every == 0:
                    self._checkpoint(step)
                if step % settings.validation_every == 0:
                    self._validate(step)
        return losses

    def _batches(self, latents: Sequence[torch.Tensor], first_step: int) -> Any:
        settings = self.settings
        draws_per_step = settings.batch_size * settings.gradient_accumulation * self.accelerator.num_processes
        draws = Draws(
            latents,
            self.material.conditions,
            self.noise_schedule.config.num_train_timesteps,
            settings.condition_dropout,
            settings.seed,
            settings.steps * draws_per_step,
        )
        rest = torch.utils.data.Subset(draws, range(first_step * draws_per_step, len(draws)))
        loader = torch.utils.data.DataLoader(rest, settings.batch_size, collate_fn=collate)
        return self.accelerator.prepare_data_loader(loader)

    def _learn(self, batch: dict[str, Any]) -> torch.Tensor:
        """One batch, and an optimizer step if it is its turn; returns the loss."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            loss = self._loss(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients and not self.optimizer.step_was_skipped:
            self.lr_schedule.step()
        return loss.detach()

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Mean squared error of the noise (https://arxiv.org/abs/2006.11239, formula 14)."""
        latents, noise, timesteps = batch["latents"], batch["noise"].to(batch["latents"].dtype), batch["timestep"]
        noisy = self.noise_schedule.add_noise(latents, noise, timesteps)
        prediction = self.model(noisy, timesteps, batch["conditions"])
        errors = (prediction.float() - batch["noise"]).square().mean(dim=(1, 2, 3))
        if self.settings.snr_gamma is not None:
            snr = compute_snr(self.noise_schedule, timesteps)
            errors = errors * snr.clamp(max=self.settings.snr_gamma) / snr
        return errors.mean()

    def _validate(self, step: int) -> None:
        """Draw the validation pictures, always with the same seeds."""
        accelerator, folder = self.accelerator, self.settings.output / "validation"
        if not accelerator.is_main_process or not self.material.validation:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.pipe.unet.eval()
        for number, arguments in enumerate(self.material.validation):
            generator = torch.Generator().manual_seed(self.settings.seed + number)
            with accelerator.autocast():
                image = self.pipe(
                    **arguments,
                    height=self.settings.size,
                    width=self.settings.size,
                    num_inference_steps=self.settings.validation_steps,
                    generator=generator,
                ).images[0]
            image.save(folder / f"step-{step:06}-{number}.png")
        self.pipe.unet.train()

    def _checkpoint(self, step: int) -> None:
        """Write a checkpoint, which has its name only when it is whole, and remove those beyond the limit."""
        accelerator, output = self.accelerator, self.settings.output
        unfinished, whole = output / f".{CHECKPOINT}{step}", output / f"{CHECKPOINT}{step}"
        if accelerator.is_main_process:
            for left in (unfinished, whole):  # from a training that was stopped, and is resumed
                shutil.rmtree(left, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            record = {"step": step, **self.facts}
            (unfinished / SETTINGS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            unfinished.rename(whole)
            if self.settings.checkpoint_limit is not None:
                for old in _checkpoints(output)[: -self.settings.checkpoint_limit]:
                    shutil.rmtree(old)

    def _save_only_lora(self, models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            self.pipe.save_lora_weights(folder)

    def _load_only_lora(self, models: list[Any], folder: str) -> None:
        models.clear()
        saved = load_file(Path(folder, WEIGHTS)).items()
        found = set_peft_model_state_dict(self.pipe.unet, {key.removeprefix("unet."): value for key, value in saved})
        if found.unexpected_keys:
            raise ValueError(f"`resume` is {folder!r}, whose {WEIGHTS} has unknown keys: {found.unexpected_keys[:3]}.")


def _facts(settings: Settings, examples: Sequence[Example], accelerator: Accelerator) -> dict[str, Any]:
    """What makes a training this one, as JSON has it."""
    kept = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    data = json.dumps([(example.path.name, example.caption) for example in examples])
    facts = {
        **kept,
        "mixed_precision": accelerator.mixed_precision,
        "number of processes": accelerator.num_processes,
        "data": hashlib.sha256(data.encode()).hexdigest(),
    }
    return json.loads(json.dumps(facts, default=str))


def _checkpoints(output: Path) -> list[Path]:
    """From the oldest to the newest."""
    return sorted(output.glob(f"{CHECKPOINT}*"), key=lambda folder: int(folder.name.removeprefix(CHECKPOINT)))


def _recorded(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8"))


def _checkpoint_to_resume(settings: Settings, facts: dict[str, Any]) -> Path | None:
    checkpoint = _chosen_checkpoint(settings)
    if settings.output.exists() and any(settings.output.iterdir()) and settings.output not in _parents(checkpoint):
        raise ValueError(
            f"`output` is {str(settings.output)!r}, which is not empty; accepted is a new folder, or `resume` with one"
            " of its checkpoints."
        )
    if checkpoint is None:
        return None
    recorded = _recorded(checkpoint)
    step = recorded.pop("step")
    if step >= settings.steps:
        raise ValueError(f"`steps` is {settings.steps}; the checkpoint to resume has made {step} already.")
    changed = {name: recorded.get(name) for name, value in facts.items() if recorded.get(name) != value}
    if changed:
        was = ", ".join(f"`{name}` {value!r} (now {facts[name]!r})" for name, value in changed.items())
        raise ValueError(f"`resume` is {settings.resume!r}, a training with {was}; accepted are the same settings.")
    return checkpoint


def _chosen_checkpoint(settings: Settings) -> Path | None:
    if settings.resume is None:
        return None
    if settings.resume == "latest":
        found = _checkpoints(settings.output)
        if not found:
            raise ValueError(f"`resume` is 'latest'; there is no checkpoint in {str(settings.output)!r}.")
        return found[-1]
    if not Path(settings.resume, SETTINGS).is_file():
        raise ValueError(f"`resume` is {settings.resume!r}; accepted is 'latest' or the folder of a checkpoint.")
    return Path(settings.resume)


def _parents(checkpoint: Path | None) -> Sequence[Path]:
    return () if checkpoint is None else checkpoint.parents
