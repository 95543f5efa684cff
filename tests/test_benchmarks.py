"""The command that measures ours against stock, on tiny models: what it runs, stores and shows, not how fast."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import gauge
from benchmarks.__main__ import main
from benchmarks.cases import OPTIMIZED, OURS, STOCK, Case, Outcome, Run, Subject, Workload
from benchmarks.gauge_chart import STOCK_IN_OURS
from benchmarks.models import build, twin
from benchmarks.report import write_html
from benchmarks.runner import Plan, measure_case, measure_workload
from benchmarks.selection import select
from benchmarks.store import NOT_MEASURED, Store, rows_of
from benchmarks.subjects import SUBJECTS
from kandinsky_diffusers.components import adopt
from training.captions import LANGUAGES
from training.evaluation import wishes


ABOUT = {"machine": {}, "date": "2026-01-01"}
CASE = Case("prior", 0, 1, "float32", "cpu", tiny=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the command. Read only."""
    output = tmp_path_factory.mktemp("benchmarks")
    run_command(output, only="prior,2.2-step", sizes="64", repeats=2)
    return output


def run_command(output: Path, **options: Any) -> None:
    main(device="cpu", threads=1, output=output, tiny=True, **options)


def stored(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the CPU by subject and candidate; those at other sizes than 64 are left out."""
    rows = json.loads((folder / "benchmarks.json").read_text())["rows"]
    return {
        (row["subject"], row["candidate"]): row for row in rows if row["size"] in (0, 64) and row["device"] == "cpu"
    }


def test_a_row_says_what_was_measured_on_what(measured: Path) -> None:
    row = stored(measured)["2.2-step", OURS]

    assert row["status"] == "measured"
    assert row["seconds"]["runs"] == 2
    assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
    assert set(row["times_faster"]) == {STOCK}
    assert row["peak_bytes"]["counted"] > 0
    assert row["flops"] > 0
    assert row["machine"]["torch"] == torch.__version__
    assert "embeddings are given" in row["note"].lower()
    assert "one step" in row["reduced"]
    assert row["command"].endswith("--device cpu --only 2.2-step --sizes 64 --batches 1 --dtypes float32")


@pytest.mark.parametrize("subject", ["prior", "2.2-step"])
def test_both_compute_the_same_with_the_same_weights(measured: Path, subject: str) -> None:
    row = stored(measured)[subject, OURS]

    assert row["difference"] < 1e-4
    assert "warning" not in row


def test_the_prior_of_ours_does_fewer_operations_than_stocks(measured: Path) -> None:
    rows = stored(measured)

    assert rows["prior", OURS]["flops"] < rows["prior", STOCK]["flops"] / 5


def test_what_nobody_has_measured_is_stored_with_the_command_that_does(measured: Path) -> None:
    rows = json.loads((measured / "benchmarks.json").read_text())["rows"]
    missing = [row for row in rows if row["status"] == NOT_MEASURED]

    assert {row["subject"] for row in missing if row["device"] == "cuda"} == {
        name for name, subject in SUBJECTS.items() if "cuda" in subject.sizes
    }
    wanted = ("2.2-run", 768, 4, "bfloat16", "cuda", "stock compiled")
    names = ("subject", "size", "batch", "dtype", "device", "candidate")
    command = next(row["command"] for row in missing if tuple(row[name] for name in names) == wanted)
    assert command.endswith("--device cuda --only 2.2-run --sizes 768 --batches 4 --dtypes bfloat16")


def test_the_page_shows_figures_and_missing_ones_and_needs_nothing_else(measured: Path) -> None:
    page = (measured / "benchmarks.html").read_text()

    assert SUBJECTS["2.2-step"].title in page
    assert SUBJECTS["3.0-step"].title not in page
    assert page.count("<rect") == 4
    assert "--only 3.0-step" in page
    assert "http" not in page


def test_a_later_run_adds_to_what_is_stored(tmp_path: Path) -> None:
    options = {"sizes": "64", "repeats": 1, "memory": False, "against": STOCK}
    run_command(tmp_path, only="superres-window", **options | {"against": OURS})
    before = stored(tmp_path)["superres-window", OURS]
    run_command(tmp_path, only="movq-2", **options)

    assert stored(tmp_path)["superres-window", OURS] == before
    assert stored(tmp_path)["movq-2", STOCK]["status"] == "measured"


def test_after_the_time_limit_nothing_is_begun(tmp_path: Path) -> None:
    run_command(tmp_path, only="2.2-step", sizes="64", time_limit=1e-9)

    row = stored(tmp_path)["2.2-step", STOCK]
    assert row["status"] == NOT_MEASURED
    assert row["command"].endswith("--only 2.2-step --sizes 64 --batches 1 --dtypes float32")


def test_an_item_may_say_what_of_it() -> None:
    run, movq = select("2.2-run:512/768::float16:stock/ours, movq-2", {"batches": ["4"], "sizes": ["1024"]})

    cases = [(case.size, case.batch, case.dtype) for case in run.cases("cuda")]
    assert cases == [(512, 4, "float16"), (768, 4, "float16")]
    assert run.candidates("cuda") == [STOCK, OURS]
    assert {case.size for case in movq.cases("cuda")} == {1024}
    assert set(movq.candidates("cuda")) > {STOCK, OURS}


@pytest.mark.parametrize(
    ("only", "error"),
    [
        ("2.2-stop", "`only` has '2.2-stop'"),
        ("prior:0:1:float32:stock:5", "`only` has 'prior:0:1:float32:stock:5'"),
        ("prior::::theirs", "`against` has 'theirs'"),
    ],
)
def test_what_cannot_be_selected_is_an_error(only: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        select(only, {})


def test_figures_give_way_to_figures_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "benchmarks.json")
    for status in ("measured", "failed", NOT_MEASURED):
        store.add(rows_of(CASE, [OURS], status=status))
    store.add(rows_of(CASE, [STOCK], status="failed"))
    store.add(rows_of(CASE, [STOCK], status="measured", flops=1))

    assert [row["status"] for row in Store(tmp_path / "benchmarks.json").rows] == ["measured", "measured"]


def workload(log: list[str], case: Case) -> Workload:
    """One whose stock and ours note when they run, and whose third way cannot be made ready."""

    def way(name: str) -> Run:
        def run(steps: int | None) -> Outcome:
            log.append(name)
            return Outcome(torch.tensor([1.0, 2.0 if name == STOCK else 2.5]))

        return run

    def broken() -> Run:
        raise ValueError("there is no such way")

    return Workload({STOCK: partial(way, STOCK), "broken": broken, OURS: partial(way, OURS)})


def test_candidates_take_turns_and_one_that_fails_does_not_take_the_others_with_it() -> None:
    log: list[str] = []
    subject = Subject("fake", "", partial(measure_workload, make=partial(workload, log)))

    rows = measure_case(subject, CASE, Plan([STOCK, "broken", OURS], repeats=3, memory=False), ABOUT)

    assert log == [STOCK, OURS] * 3
    stock, broken, ours = rows
    assert [row["status"] for row in rows] == ["measured", "failed", "measured"]
    assert broken["error"] == "ValueError: there is no such way"
    assert ours["difference"] == 0.25
    assert "difference" not in stock


def test_compiled_work_is_counted_like_the_same_work_that_is_not() -> None:
    def matmul(steps: int | None) -> Outcome:
        return Outcome(torch.ones(2, 3) @ torch.ones(3, 4))

    ways = {name: lambda: matmul for name in (STOCK, OURS, OPTIMIZED)}
    subject = Subject("fake", "", partial(measure_workload, make=lambda case: Workload(ways)))

    rows = measure_case(subject, CASE, Plan([OURS, OPTIMIZED], repeats=1), ABOUT)

    assert [row["flops"] for row in rows] == [2 * 2 * 3 * 4] * 2
    assert all(row["peak_fraction"] > 0 for row in rows)


def test_a_subject_that_fails_as_a_whole_is_told_of_in_each_row(tmp_path: Path) -> None:
    def measure(*arguments: Any) -> list[dict[str, Any]]:
        raise RuntimeError("out of memory")

    rows = measure_case(Subject("fake", "", measure), CASE, Plan([STOCK, OURS]), ABOUT)
    write_html(rows, SUBJECTS, tmp_path / "page.html")

    assert [(row["candidate"], row["status"]) for row in rows] == [(STOCK, "failed"), (OURS, "failed")]
    assert "out of memory" in (tmp_path / "page.html").read_text()


def test_trees_share_weights_and_nothing_else() -> None:
    stock = build("prior", "cpu", torch.float32, tiny=True)
    kinds = {type(layer.attn1.processor) for layer in stock.transformer_blocks}

    ours = adopt(twin(stock))

    assert all(ours.get_parameter(name) is weight for name, weight in stock.named_parameters())
    assert {type(layer.attn1.processor) for layer in stock.transformer_blocks} == kinds
    assert {type(layer.attn1.processor) for layer in ours.transformer_blocks} != kinds


def test_the_gauge_counts_what_each_scheduler_draws_and_tells_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauge, "wishes", lambda language: wishes(language)[:2])

    gauge.main(steps="1", schedulers="DDIM,UniPC", device="cpu", output=tmp_path)

    rows = {
        (row["scheduler"], row["classes"]): row for row in json.loads((tmp_path / "gauge.json").read_text())["rows"]
    }
    assert rows["DDIM", OURS]["class"] == "KandinskyDDIMScheduler"
    assert rows["DDIM", OURS]["pictures"] == 2 * len(LANGUAGES)
    assert rows["DDIM", OURS]["shares"] == rows["DDIM", STOCK]["shares"]
    assert "generator" in rows["UniPC", STOCK]["error"]
    assert rows["UniPC", STOCK_IN_OURS]["shares"]
    assert (tmp_path / "gauge.svg").read_text().count("<polyline") == 6


def test_the_gauge_knows_its_schedulers(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="Euler"):
        gauge.main(schedulers="Euler", output=tmp_path)
