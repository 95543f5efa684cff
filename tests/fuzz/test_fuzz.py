"""Whatever the input, nothing happens but that it is read or refused; SECURITY.md has the figures.

`make fuzz` runs many inputs, the default run some of each kind. A fault tells its target and seed, and
`make fuzz CASE=zip:17` runs that case alone.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .sandbox import Outcome, Target, run_cases
from .targets import Sources, known_files, known_target, targets


FEW = {"conversion": 12, "configuration": 15, "original configuration": 6, "shapes": 6, "tokenizer": 15, "output": 8}
FEW_OF_OTHERS = 15
# of a long run, in shares; others, which take a hundred times as long, have one
SHARES = {
    "zip": 30,
    "legacy": 15,
    "safetensors": 15,
    "damaged weights": 15,
    "prior of a card": 12,
    "picture": 12,
    "array": 12,
    "index": 12,
    "inventory": 8,
    "IP-Adapter": 8,
    "LoRA": 12,
    "tokenizer": 10,
    "configuration": 8,
    "output": 4,
    "conversion": 4,
}
STRIDE = 7919  # a prime, so that a run which is cut short has some of all
MOST_SHOWN = 20
REPORT = os.environ.get("KANDINSKY_FUZZ_REPORT")  # a file for the figures


@pytest.fixture(scope="module")
def sources(
    release_lora: Path,
    release_ip_adapter: Path,
    release_21: Path,
    release_31: Path,
    ip_adapter: Path,
    goldens_21: Any,
) -> Sources:
    settings = goldens_21.path / "hyperparameters.json"
    return Sources(release_lora, release_ip_adapter, release_21, release_31, ip_adapter, settings)


@pytest.fixture(scope="module")
def known(sources: Sources) -> dict[str, Target]:
    return targets(sources)


def run(cases: list[tuple[Target, int]], folder: Path) -> list[Outcome]:
    outcomes = list(run_cases(cases, folder))
    assert len(outcomes) == len(cases)
    faults = [outcome for outcome in outcomes if outcome.result == "fault"]
    assert not faults, told(faults, len(outcomes))
    return outcomes


def told(faults: list[Outcome], count: int) -> str:
    shown = (f"{fault.target}:{fault.seed}\n{fault.said}" for fault in faults[:MOST_SHOWN])
    return "\n\n".join((f"{len(faults)} faults of {count}", *shown))


def test_what_has_once_taken_all_memory_or_time_or_the_process_is_refused(sources: Sources, tmp_path: Path) -> None:
    files = known_files(sources)
    outcomes = run([(known_target(content), 0) for content in files.values()], tmp_path)
    ends = dict(zip(files, (outcome.result for outcome in outcomes), strict=True))
    assert ends == {**dict.fromkeys(files, "refused"), "a dict whose items are a number": "accepted"}


def test_some_hostile_input_of_each_kind_is_read_or_refused_and_nothing_else(
    known: dict[str, Target], tmp_path: Path
) -> None:
    cases = [(target, seed) for target in known.values() for seed in range(FEW.get(target.name, FEW_OF_OTHERS))]
    outcomes = run(cases, tmp_path)
    refused = Counter(outcome.target for outcome in outcomes if outcome.result == "refused")
    assert all(refused[target.name] for target in known.values() if target.errors), "else the input is not hostile"


@pytest.mark.fuzz
def test_much_hostile_input_is_read_or_refused_and_nothing_else(known: dict[str, Target], tmp_path: Path) -> None:
    count, first = int(os.environ.get("KANDINSKY_FUZZ", "0")), int(os.environ.get("KANDINSKY_FUZZ_SEED", "1000000"))
    if only := os.environ.get("KANDINSKY_FUZZ_CASE"):
        name, _, seed = only.rpartition(":")
        run([(known[name], int(seed))], tmp_path)
        return
    if not count:
        pytest.skip("KANDINSKY_FUZZ says how many inputs")
    turn = [target for target in known.values() for _ in range(SHARES.get(target.name, 1))]
    cases = [(turn[n * STRIDE % len(turn)], first + n) for n in range(count)]
    outcomes, faults = [], []
    for outcome in run_cases(cases, tmp_path):
        outcomes.append(outcome)
        faults += [outcome] if outcome.result == "fault" else []
        if REPORT and (len(outcomes) % 500 == 0 or len(outcomes) == count):
            Path(REPORT).write_text(json.dumps(summary(outcomes), indent=2) + "\n")
    assert not faults, told(faults, len(outcomes))


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """By target: how many, how they ended, the slowest and the one that took most memory."""
    by_target: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_target.setdefault(outcome.target, []).append(outcome)
    return {
        name: {
            "inputs": len(found),
            **Counter(outcome.result for outcome in found),
            "seconds": round(max(outcome.seconds for outcome in found), 2),
            "mebibytes": round(max(outcome.memory for outcome in found)),
        }
        for name, found in by_target.items()
    }
