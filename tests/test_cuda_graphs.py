"""The forward of a model as a CUDA graph: what is recorded, replayed, and dropped again.

There is no GPU here: in the place of a CUDA graph, [`StandIn`] does the work again with the tensors that it was
recorded with, and the forwards that are not recorded are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky_diffusers.cuda_graphs import RECORDINGS, graph, ungraph


class StandIn:
    """Does work again as a CUDA graph would: on the inputs that it was recorded with, into the same output."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        output = run()

        def replay() -> None:
            for old, new in zip(pytree.tree_leaves(output), pytree.tree_leaves(run()), strict=True):
                old.copy_(new)

        return replay, output


class Cache:
    """Belongs to one call, as those of the models."""

    def __init__(self, rows: torch.Tensor | None) -> None:
        self.rows = rows

    @property
    def filled(self) -> bool:
        return self.rows is not None


pytree.register_pytree_node(Cache, lambda cache: ([cache.rows], None), lambda parts, _: Cache(*parts))


class Model(torch.nn.Module):
    """With a layer, a number, and conditions in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.scale = 1.0
        self.forwards = self.fills = 0

    def forward(
        self, sample: torch.Tensor, added: dict[str, Any] | None = None, fill: bool = False, **options: Any
    ) -> Any:
        if fill:
            self.fills += 1
            for cache in (added or {}).values():
                cache.rows = torch.full((2, 4), 2.0)
            return None
        self.forwards += 1
        rows = [value.rows if isinstance(value, Cache) else value for value in (added or {}).values()]
        return {"sample": self.scale * self.layer(sample) + sum(row for row in rows if row is not None)}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def recorder(model: Model) -> StandIn:
    recorder = StandIn()
    graph(model, recorder)
    return recorder


def expected(model: Model, sample: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    return model.scale * model.layer(sample) + sum(rows)


@torch.no_grad()
def test_the_second_input_of_a_kind_is_recorded_and_others_replay_it(model: Model, recorder: StandIn) -> None:
    for seed in range(5):
        sample, rows = torch.randn(2, 4), torch.randn(2, 4)
        assert torch.equal(model(sample, {"rows": rows})["sample"], expected(model, sample, rows)), seed
    assert recorder.recorded == 1


@torch.no_grad()
def test_an_output_stays_when_the_graph_is_replayed(model: Model, recorder: StandIn) -> None:
    samples = torch.randn(4, 2, 4)
    outputs = [model(sample)["sample"] for sample in samples]
    torch.testing.assert_close(torch.stack(outputs), model.layer(samples))


@torch.no_grad()
@pytest.mark.parametrize("other", [{"shape": (3, 4)}, {"dtype": torch.float64}, {"option": 2}, {"transposed": True}])
def test_another_kind_has_its_own_recording(model: Model, recorder: StandIn, other: dict[str, Any]) -> None:
    for _ in range(2):
        model(torch.randn(2, 4), option=1)
    for _ in range(3):
        sample = torch.randn(other.get("shape", (2, 4)))
        sample = sample.t().contiguous().t() if other.get("transposed") else sample
        rows = {"rows": torch.ones(1, dtype=other.get("dtype"))} if "dtype" in other else None
        model(sample, rows, option=other.get("option", 1))
    model(torch.randn(2, 4), option=1)
    assert recorder.recorded == 2


@torch.no_grad()
def test_the_last_used_recordings_are_kept(model: Model, recorder: StandIn) -> None:
    for rows in range(1, RECORDINGS + 2):
        for _ in range(2):
            model(torch.randn(rows, 4))
    model(torch.randn(RECORDINGS, 4))
    assert recorder.recorded == RECORDINGS + 1
    for _ in range(2):
        model(torch.randn(1, 4))
    assert recorder.recorded == RECORDINGS + 2


@torch.no_grad()
def test_only_what_has_changed_is_copied_in(model: Model, recorder: StandIn) -> None:
    rows = torch.randn(2, 4)
    for _ in range(2):
        model(torch.randn(2, 4), {"rows": rows})
    with _CountedCopies() as unchanged:
        model(torch.randn(2, 4), {"rows": rows})
    rows += 1
    sample = torch.randn(2, 4)
    with _CountedCopies() as changed:
        output = model(sample, {"rows": rows})["sample"]
    assert torch.equal(output, expected(model, sample, rows))
    assert changed.count == unchanged.count + 1


class _CountedCopies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def _move(model: Model) -> None:
    model.layer.weight.data = 2 * model.layer.weight.data


def _replace(model: Model) -> None:
    model.layer = torch.nn.Linear(4, 4)


def _rescale(model: Model) -> None:
    model.scale = 3.0


@torch.no_grad()
@pytest.mark.parametrize("change", [_move, _replace, _rescale])
@pytest.mark.parametrize("cached", [False, True])
def test_weights_and_settings_that_change_between_calls_are_noticed(
    model: Model, recorder: StandIn, change: Callable[[Model], None], cached: bool
) -> None:
    def call() -> None:
        added = {"cache": Cache(torch.randn(2, 4))} if cached else {}
        for _ in range(3):
            sample = torch.randn(2, 4)
            rows = [cache.rows for cache in added.values() if cache.rows is not None]
            torch.testing.assert_close(model(sample, added)["sample"], expected(model, sample, *rows))

    call()
    change(model)
    call()
    assert recorder.recorded == 2


@torch.no_grad()
def test_another_call_with_a_cache_of_its_own_replays(model: Model, recorder: StandIn) -> None:
    for _ in range(3):
        cache, sample = Cache(torch.randn(2, 4)), torch.randn(2, 4)
        for _ in range(2):
            output = model(sample, {"cache": cache})["sample"]
            assert cache.rows is not None
            assert torch.equal(output, expected(model, sample, cache.rows))
    assert recorder.recorded == 1


@torch.no_grad()
def test_a_cache_is_filled_and_then_the_first_step_of_a_call_is_replayed(model: Model, recorder: StandIn) -> None:
    for calls in range(1, 4):
        cache = Cache(None)
        for _ in range(2):
            sample = torch.randn(2, 4)
            assert torch.equal(model(sample, {"cache": cache})["sample"], model.layer(sample) + 2.0)
        assert (model.fills, recorder.recorded) == (calls, 1)
    assert model.forwards == 1 + 1 + 5  # before there was a recording, while it was made, and whenever it is replayed


@pytest.mark.parametrize(
    "why", ["gradients", "training", "autocast", "project", "object", "device", "weights", "hooks"]
)
def test_what_cannot_be_recorded_runs_as_before(model: Model, recorder: StandIn, why: str) -> None:
    added: dict[str, Any] = {"rows": _Number()} if why == "object" else {}
    if why == "device":
        recorder.device_type = "cuda"
    if why == "weights":
        model.register_buffer("elsewhere", torch.empty(1, device="meta"))
    if why == "hooks":
        HookRegistry.check_if_exists_or_initialize(model.layer).register_hook(ModelHook(), "of others")
    model.train(why == "training")
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", enabled=why == "autocast"):
        for _ in range(3):
            model(torch.randn(2, 4), added, **({"project": True} if why == "project" else {}))
    assert (model.forwards, recorder.recorded) == (3, 0)


class _Number:
    """A kind of argument that nothing is known of."""

    def __radd__(self, other: Any) -> Any:
        return other + 1.0


@torch.no_grad()
def test_a_model_that_cannot_be_recorded_goes_on_without(
    model: Model, recorder: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(run: Any, device: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", fail)
    for _ in range(3):
        sample = torch.randn(2, 4)
        assert torch.equal(model(sample)["sample"], model.layer(sample))
    assert [record.message.count("without: operation not permitted") for record in caplog.records] == [1]


def test_ungraph_leaves_nothing(model: Model) -> None:
    before = dict(vars(model))
    graph(model, StandIn())
    ungraph(model)
    assert vars(model) == before
