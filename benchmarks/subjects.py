"""The subjects, as data."""

from __future__ import annotations

from functools import partial
from typing import Any

from .accuracy import SAMPLES, decoder_outputs, measure_accuracy, movq_outputs, prior_outputs
from .cases import CANDIDATES, OPTIMIZED, OURS, STOCK, Subject
from .drawing import FAMILIES, workload
from .files import COPY, loading_workload, measure_conversion, measure_loading
from .parts import EXACT, TILED, movq_workload, prior_workload, superres_run, superres_window
from .runner import measure_workload


NO_SIZE = {"cpu": (0,), "cuda": (0,)}
ONE = {"cpu": (1,), "cuda": (1,)}
FEW_STEPS = {"cpu": 2, "cuda": 6}
TITLES = {
    "2.1": "Kandinsky 2.1",
    "2.2": "Kandinsky 2.2",
    "3.0": "Kandinsky 3.0",
    "3.1": "Kandinsky 3.1",
    "flash": "Kandinsky 3.1 Flash",
}


def _decoders() -> list[Subject]:
    subjects = []
    for family in FAMILIES:
        steps = 4 if family == "flash" else 50
        step: dict[str, Any] = {"steps": FEW_STEPS | {"cuda": min(steps, FEW_STEPS["cuda"])}, "per_step": True}
        subjects += [
            Subject(
                f"{family}-step",
                f"{TITLES[family]}: one step, the UNet with guidance and the scheduler"
                if family != "flash"
                else f"{TITLES[family]}: one step, the UNet and the scheduler",
                partial(measure_workload, make=partial(workload, family=family, of_steps=True)),
                reduced="512 pixels, one step of two",
                **step,
            ),
            Subject(
                f"{family}-run",
                f"{TITLES[family]}: {steps} steps and decoding",
                partial(measure_workload, make=partial(workload, family=family, of_steps=False)),
                steps={"cpu": 2, "cuda": steps},
                reduced=f"512 pixels, 2 steps of {steps}",
            ),
        ]
    return subjects


def _accuracy(name: str, title: str, **options: Any) -> Subject:
    options = {"sizes": {"cpu": (64,), "cuda": (128,)}, "candidates": (STOCK, OURS)} | options
    return Subject(
        f"accuracy-{name}",
        f"Accuracy of half precision: {title}",
        batches=dict.fromkeys(ONE, (SAMPLES,)),
        dtypes={"cpu": ("bfloat16",), "cuda": ("float16", "bfloat16")},
        reduced="64 pixels, bfloat16",
        **options,
    )


ALL = (
    Subject(
        "prior",
        "Prior of 2.2: 25 steps",
        partial(measure_workload, make=prior_workload),
        steps={"cpu": 25, "cuda": 25},
        sizes=NO_SIZE,
    ),
    *_decoders(),
    *(
        Subject(
            f"movq-{family}",
            f"MoVQ of {family}.x: decoding",
            partial(measure_workload, make=partial(movq_workload, name=f"movq-{family}")),
            sizes={"cpu": (512,), "cuda": (512, 768, 1024, 2048)},
            candidates=(*CANDIDATES[:3], TILED, OPTIMIZED),
            on_cpu=(STOCK, OURS, TILED),
            counted_sizes=(768, 1024, 2048),
            reduced="timed at 512 pixels, larger ones counted only",
        )
        for family in (2, 3)
    ),
    Subject(
        "superres-window",
        "KandiSuperRes x4: one window through the UNet",
        partial(measure_workload, make=superres_window),
        sizes={"cpu": (256,), "cuda": (512, 1024)},
        batches=ONE,
        candidates=(EXACT, OURS, OPTIMIZED),
        on_cpu=(EXACT, OURS),
        reduced="256 pixels",
    ),
    Subject(
        "superres-run",
        "KandiSuperRes x4: 5 steps",
        partial(measure_workload, make=superres_run),
        steps={"cpu": 2, "cuda": 5},
        sizes={"cpu": (256,), "cuda": (1024, 2048)},
        batches=ONE,
        candidates=(EXACT, OURS, OPTIMIZED),
        on_cpu=(EXACT, OURS),
        reduced="from 64 to 256 pixels, 2 steps of 5",
    ),
    _accuracy(
        "prior",
        "predictions of the prior",
        measure=partial(measure_accuracy, outputs=prior_outputs),
        sizes=NO_SIZE,
    ),
    *(
        _accuracy(
            family,
            f"two steps of {family}",
            measure=partial(measure_accuracy, outputs=partial(decoder_outputs, family=family)),
            candidates=(STOCK, OURS, OPTIMIZED),
        )
        for family in ("2.1", "2.2", "3.0")
    ),
    *(
        _accuracy(
            f"movq-{family}",
            f"MoVQ of {family}.x",
            measure=partial(measure_accuracy, outputs=partial(movq_outputs, model=f"movq-{family}")),
        )
        for family in (2, 3)
    ),
    Subject(
        "load",
        "Loading a decoder of 2.2",
        partial(measure_loading, make=loading_workload),
        sizes=NO_SIZE,
        batches=ONE,
        candidates=(STOCK, OURS),
        when_named=True,
    ),
    *(
        Subject(
            f"conversion-{version}",
            f"Converting the decoder of {version}",
            partial(measure_conversion, version=version),
            sizes={"cpu": (0,)},
            batches={"cpu": (1,)},
            dtypes={"cpu": (dtype,)},
            candidates=(COPY, OURS),
            on_cpu=(COPY, OURS),
            when_named=version == "3.1",
        )
        for version, dtype in (("2.1", "float16"), ("3.1", "float32"))
    ),
)
SUBJECTS = {subject.name: subject for subject in ALL}
