"""Bytes and floating-point operations are counted as they can be counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky_diffusers.measuring import flops, peak_bytes


MEGABYTE = 1 << 20


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test with real tensors, and with those that have a shape only."""
    with FakeTensorMode() if request.param == "fake" else nullcontext(), torch.no_grad():
        yield


def megabytes(count: int = 1) -> torch.Tensor:
    return torch.ones(count, MEGABYTE // 4)


def test_what_is_alive_at_once_counts() -> None:
    def chain() -> torch.Tensor:
        tensor = megabytes(2)
        for _ in range(5):
            tensor = tensor * 2  # the next is there before the last is gone
        return tensor

    assert peak_bytes(chain) == 4 * MEGABYTE
    assert peak_bytes(lambda: [chain() for _ in range(3)]) == 8 * MEGABYTE, "results are kept, and count"


def test_the_peak_counts_not_the_end() -> None:
    assert peak_bytes(lambda: megabytes(3).sum()) == 3 * MEGABYTE + 4
    assert peak_bytes(lambda: None) == 0


def test_what_was_there_before_does_not_count() -> None:
    weight, other = megabytes(8), megabytes(1)
    assert peak_bytes(lambda: (weight[0] * other).reshape(-1)) == MEGABYTE
    assert peak_bytes(lambda: weight.view(4, -1).transpose(0, 1)) == 0


def test_views_and_in_place_results_count_once() -> None:
    assert peak_bytes(lambda: megabytes(4).mul_(2).view(2, -1)[1].add_(1)) == 4 * MEGABYTE
    assert peak_bytes(lambda: torch.ones(1, 1, dtype=torch.float16).expand(512, 1024)) == 2


def test_a_view_keeps_its_memory() -> None:
    def keep() -> torch.Tensor:
        part = megabytes(4)[0]
        return part + megabytes(1)

    assert peak_bytes(keep) == 6 * MEGABYTE


def test_operations_of_products_convolutions_and_attention() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert flops(lambda: (a @ b).exp()) == 2 * 3 * 5 * 7
    image, weight = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3)
    assert flops(lambda: F.conv2d(image, weight, padding=1)) == 2 * (2 * 8 * 8) * 6 * (4 * 3 * 3)
    query, key = torch.ones(1, 2, 9, 16), torch.ones(1, 2, 11, 16)
    assert flops(lambda: F.scaled_dot_product_attention(query, key, key)) == 2 * (2 * 9 * 11 * 16) * 2
