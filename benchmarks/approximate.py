"""What the approximations save, and how far their pictures are from those made without: guidance interval, step cache.

    python -m benchmarks.approximate --repo FOLDER_OR_HUB_ID [--steps 50] [--pictures 8] [--device cuda]

Each setting draws the same pictures, from the same noise. The difference is the mean over all pixels, in levels of 0
to 255. What is saved is a share of the operations of the UNet over the whole run. Without a repository it draws with
the tiny Kandinsky of `training/`, which knows coloured shapes. What a step from the cache saves at full size needs no
weights, and is counted on shapes alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoPipelineForText2Image
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

import kandinsky_diffusers  # noqa: F401 (AutoPipelines find ours)
from kandinsky_diffusers.components import adopt
from kandinsky_diffusers.measuring import flops
from kandinsky_diffusers.step_cache import CachedSteps, step_cache_config

from .measure import machine
from .models import build
from .tiny import tiny_repos


PROMPT = "a red circle"


@dataclass(frozen=True)
class Setting:
    """A way to draw.

    Args:
        name: as it is printed.
        arguments: of the call.
        step_cache: arguments of `enable_step_cache`; None without one.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    step_cache: dict[str, int] | None = None

    @contextmanager
    def applied_to(self, pipe: Any) -> Iterator[None]:
        """Let `pipe` draw so."""
        if self.step_cache is not None:
            pipe.enable_step_cache(**self.step_cache)
        try:
            yield
        finally:
            pipe.disable_step_cache()


EXACT = Setting("exact")
INTERVALS = ((0.0, 0.8), (0.2, 1.0), (0.2, 0.8))
SETTINGS = (
    *(Setting(f"guidance {interval}", {"guidance_interval": interval}) for interval in INTERVALS),
    *(Setting(f"step cache {interval}", {}, {"interval": interval}) for interval in (2, 3, 5)),
    Setting("step cache 3, order 1", {}, {"interval": 3, "order": 1}),
    Setting("guidance (0.0, 0.8), step cache 2", {"guidance_interval": (0.0, 0.8)}, {"interval": 2}),
)


def measure(draw: Callable[..., np.ndarray], pipe: Any, steps: int, seeds: range) -> list[dict[str, Any]]:
    """Figures of each setting.

    Args:
        draw: `draw(seed, steps, **arguments)` makes a picture with `pipe`, `[height, width, 3]` in [0, 1].
        pipe: the pipeline.
        steps: of a run.
        seeds: of the pictures.
    """
    operations = {count: flops(lambda count=count: draw(0, count)) for count in (1, 2, steps)}
    of_unet = steps * (operations[2] - operations[1])  # all else is the same for any number of steps
    exact = [draw(seed, steps) for seed in seeds]
    rows = []
    for setting in SETTINGS:
        with setting.applied_to(pipe):
            pictures = [draw(seed, steps, **setting.arguments) for seed in seeds]
            own = flops(lambda arguments=setting.arguments: draw(0, steps, **arguments))
        each = [float(255 * np.abs(near - far).mean()) for near, far in zip(pictures, exact, strict=True)]
        rows.append(
            {
                "setting": setting.name,
                "difference": float(np.mean(each)),
                "largest_difference": max(each),
                "unet_operations_saved": (operations[steps] - own) / of_unet,
            }
        )
    return rows


@torch.no_grad()
def saved_at_full_size() -> dict[str, float]:
    """Share of the UNet's operations that a step from the cache saves, at published sizes, with guidance."""
    conditions: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
        ("unet-2.1", 768): lambda: {
            "encoder_hidden_states": torch.randn(2, 77, 1024),
            "added_cond_kwargs": {"image_embeds": torch.randn(2, 768), "text_embeds": torch.randn(2, 768)},
        },
        ("unet-2.2", 768): lambda: {
            "encoder_hidden_states": None,
            "added_cond_kwargs": {"image_embeds": torch.randn(2, 1280)},
        },
        ("unet-3.1", 1024): lambda: {"encoder_hidden_states": torch.randn(2, 77, 4096)},
    }
    saved = {}
    for (name, size), given in conditions.items():
        with FakeTensorMode():
            unet = adopt(build(name, "cpu", torch.float32, False))
            unet.enable_cache(step_cache_config(unet, interval=2))
            steps, arguments = CachedSteps(unet), {"timestep": 1, **given()}
            sample = torch.randn(2, 4, size // 8, size // 8)
            with steps.step(2, {}):
                whole = flops(lambda call=unet, sample=sample, own=arguments: call(sample, **own))
            with steps.step(2, {}):
                cached = flops(lambda call=unet, sample=sample, own=arguments: call(sample, **own))
        saved[f"{name} at {size}"] = 1 - cached / whole
        build.cache_clear()
    return saved


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Print the figures as a table."""
    table = Table("", "difference", "largest", "UNet saved", title=title)
    for row in rows:
        differences = (f"{row[name]:.2f}" for name in ("difference", "largest_difference"))
        table.add_row(row["setting"], *differences, f"{row['unet_operations_saved']:.0%}")
    Console().print(table)


def main(
    repo: Annotated[str, typer.Option(help="folder or Hub id; the tiny Kandinsky of training/ if empty")] = "",
    prompt: Annotated[str, typer.Option(help="what is drawn")] = PROMPT,
    steps: Annotated[int, typer.Option(min=2, help="of each run")] = 50,
    pictures: Annotated[int, typer.Option(min=1, help="of each setting, with the seeds 0, 1 ...")] = 4,
    size: Annotated[int, typer.Option(min=0, help="side in pixels; 0 for what the pipeline draws by default")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    output: Annotated[Path, typer.Option(help="where the figures go, as JSON")] = Path(
        "benchmark_output/approximate.json"
    ),
) -> None:
    """Draw with each setting, and compare."""
    torch.set_num_threads(threads)
    with nullcontext("") if repo else tiny_repos() as repos:
        pipe: Any = AutoPipelineForText2Image.from_pretrained(
            repo or Path(repos, "kandinsky-2-1"), dtype=getattr(torch, dtype)
        ).to(device)
        pipe.set_progress_bar_config(disable=True)
        side = size or (64 if not repo else 0)
        common = {"height": side, "width": side} if side else {}

        def draw(seed: int, count: int, **arguments: Any) -> np.ndarray:
            generator = torch.Generator().manual_seed(seed)
            options = {**common, **arguments, "num_inference_steps": count, "output_type": "np"}
            return pipe(prompt, generator=generator, **options).images[0]

        rows = measure(draw, pipe, steps, range(pictures))
    name = repo or "tiny, of training/"
    print_rows(rows, f"{name}: {pictures} pictures, {steps} steps, {dtype} on {device}")
    full_size = saved_at_full_size()
    Console().print({unet: f"{share:.0%} of a step from the cache is saved" for unet, share in full_size.items()})
    report = {
        "machine": machine(device),
        "repo": name,
        "prompt": prompt,
        "steps": steps,
        "pictures": pictures,
        "size": size,
        "dtype": dtype,
        "device": device,
        "settings": rows,
        "saved_by_a_cached_step_at_full_size": full_size,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
