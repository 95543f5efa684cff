"""Every transform is undone exactly by its inverse, and refuses shapes that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_diffusers.conversion.transforms import (
    AddLeadingAxis,
    Concat,
    DropLeadingAxis,
    MergeHeads,
    Split,
    SplitHeads,
    Squeeze,
    Transpose,
    Unsqueeze,
)


sizes = st.integers(1, 5)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@given(heads=sizes, head_dim=sizes, parts=st.integers(2, 4), tail=st.lists(sizes, max_size=2))
def test_fused_heads_come_apart_and_together_again(heads, head_dim, parts, tail):
    fused = numbered(heads * parts * head_dim, *tail)
    split = SplitHeads(head_dim, parts)
    pieces = split((fused,))
    for part, piece in enumerate(pieces):
        for head in range(heads):
            start = (head * parts + part) * head_dim
            assert torch.equal(piece[head * head_dim : (head + 1) * head_dim], fused[start : start + head_dim])
    assert torch.equal(split.inverse(pieces)[0], fused)


@given(parts=st.integers(1, 4), length=sizes, width=sizes, axis=st.integers(0, 1))
def test_split_and_concat_undo_each_other(parts, length, width, axis):
    shape = [length, width]
    shape[axis] *= parts
    whole = numbered(*shape)
    split = Split(parts, axis)
    assert torch.equal(split.inverse(split((whole,)))[0], whole)


@pytest.mark.parametrize(
    ("transform", "shape", "result"),
    [
        (Squeeze(), (6, 4, 1), (6, 4)),
        (Squeeze(2), (6, 4, 1, 1), (6, 4)),
        (Unsqueeze(2), (6, 4), (6, 4, 1, 1)),
        (AddLeadingAxis(), (5,), (1, 5)),
        (DropLeadingAxis(), (1, 5), (5,)),
        (Transpose(), (2, 3), (3, 2)),
    ],
)
def test_reshaping_transforms_change_the_shape_and_come_back(transform, shape, result):
    tensor = numbered(*shape)
    (changed,) = transform((tensor,))
    assert changed.shape == result
    assert torch.equal(transform.inverse((changed,))[0], tensor)


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (Squeeze(), [(3, 2)]),
        (Squeeze(2), [(1,)]),
        (DropLeadingAxis(), [(2, 5)]),
        (Transpose(0, 1), [(4,)]),
        (Split(3), [(4, 2)]),
        (Split(2), [(4,), (4,)]),
        (Concat(2), [(4,), (5,)]),
        (SplitHeads(4, 3), [(20, 2)]),
        (MergeHeads(4, 3), [(8,), (8,)]),
        (MergeHeads(3, 2), [(8,), (8,)]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(transform, shapes):
    with pytest.raises(ValueError, match=r"\[|\d"):
        transform(tuple(numbered(*shape) for shape in shapes))
