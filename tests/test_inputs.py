"""What a pipeline is called with: lists, rows of embeddings, counts, and errors that name the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kandinsky_diffusers import inputs


# --------------------------------------------------------------------------------------------------------------- texts
@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a cat", ["a cat"]), (["a", "b"], ["a", "b"]), (("a", "b"), ["a", "b"]), ("", [""])],
)
def test_one_prompt_or_several_become_a_list(prompt: Any, prompts: list[str]) -> None:
    assert inputs.as_prompts(prompt) == prompts


def test_a_list_of_prompts_is_copied() -> None:
    prompts = ["a cat"]
    inputs.as_prompts(prompts).append("a dog")
    assert prompts == ["a cat"]


@pytest.mark.parametrize(
    ("negative", "negatives"),
    [
        (None, ["", "", ""]),
        ("ugly", ["ugly", "ugly", "ugly"]),
        (["ugly"], ["ugly", "ugly", "ugly"]),
        (["a", "b", "c"], ["a", "b", "c"]),
    ],
)
def test_a_negative_prompt_serves_every_prompt(negative: Any, negatives: list[str]) -> None:
    assert inputs.as_negatives(negative, 3) == negatives


@pytest.mark.parametrize(
    ("check", "error", "says"),
    [
        (lambda: inputs.as_prompts(None), TypeError, "`prompt` is None"),
        (lambda: inputs.as_prompts(5), TypeError, "`prompt` is 5"),
        (lambda: inputs.as_prompts(b"cat"), TypeError, "`prompt`"),
        (lambda: inputs.as_prompts(["a", 5], "prompt_2"), TypeError, "`prompt_2`"),
        (lambda: inputs.as_prompts([]), ValueError, "`prompt` is an empty list"),
        (lambda: inputs.as_negatives(["a", "b"], 3), ValueError, "`negative_prompt` has 2 items"),
        (lambda: inputs.as_negatives([], 3, "negative_prior_prompt"), ValueError, "`negative_prior_prompt`"),
        (lambda: inputs.as_negatives(5, 3), TypeError, "`negative_prompt` is 5"),
    ],
)
def test_wrong_texts_are_named(check: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check()


# ----------------------------------------------------------------------------------------------------- rows and images
def test_embeddings_may_be_a_tensor_or_a_list_of_rows_and_of_blocks_of_rows() -> None:
    rows = torch.arange(12.0).view(3, 4)
    for given_as in (rows, [rows[0], rows[1], rows[2]], (rows[:1], rows[1:]), [rows[0], rows[1:]]):
        assert torch.equal(inputs.as_rows(given_as, 4, "image_embeds"), rows)


@pytest.mark.parametrize(
    ("embeds", "error"),
    [
        (None, ValueError),
        ([], TypeError),
        ("cat", TypeError),
        ([1.0, 2.0], TypeError),
        (torch.zeros(1, 2, 4), ValueError),
        (torch.zeros(2, 5), ValueError),
        ([torch.zeros(2, 4), torch.zeros(1, 5)], ValueError),
    ],
)
def test_wrong_embeddings_are_named(embeds: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`image_embeds`"):
        inputs.as_rows(embeds, 4, "image_embeds")


@given(prompts=st.integers(1, 5), each=st.integers(1, 4), data=st.data())
def test_rows_are_repeated_to_one_for_each_image_and_those_of_a_prompt_stay_together(
    prompts: int, each: int, data: st.DataObject
) -> None:
    images = prompts * each
    count = data.draw(st.sampled_from([1, prompts, images]))
    rows = torch.arange(count)[:, None].expand(count, 3)
    expanded = inputs.expand(rows, prompts, images, "image_embeds")
    assert expanded.shape == (images, 3)
    assert expanded[:, 0].tolist() == [image * count // images for image in range(images)]


@given(prompts=st.integers(1, 5), each=st.integers(1, 4), count=st.integers(0, 30))
def test_another_number_of_rows_is_refused(prompts: int, each: int, count: int) -> None:
    if count in (1, prompts, prompts * each):
        return
    with pytest.raises(ValueError, match=rf"`mask_image` has {count} rows; .* for {prompts * each} images"):
        inputs.expand(torch.zeros(count, 3), prompts, prompts * each, "mask_image")


@pytest.mark.parametrize(
    ("prompts", "each", "rows", "images"),
    [
        (1, 1, 1, 1),
        (2, 3, 2, 6),
        (2, 3, 6, 6),
        (1, 3, 1, 3),
        (1, 3, 3, 3),
        (1, 1, 5, 5),  # one prompt for five embeddings
    ],
)
def test_number_of_images(prompts: int, each: int, rows: int, images: int) -> None:
    assert inputs.count_images(prompts, each, rows) == images


# -------------------------------------------------------------------------------------------------------------- checks
def test_what_is_right_passes() -> None:
    inputs.check_counts(height=1, width=768)
    inputs.check_at_most("num_inference_steps", 1000, 1000)
    inputs.check_choice("output_type", "pt", ("pil", "pt"))
    generators = [torch.Generator() for _ in range(3)]
    for generator in (None, generators[0], generators):
        inputs.check_generators(generator, 3)
    inputs.check_shape(torch.zeros(1, 4, 8, 8), (1, 4, 8, 8), "latents")
    for strength in (0, 0.0, 0.3, 1, 1.0):
        inputs.check_strength(strength)


@pytest.mark.parametrize(
    ("count", "error"),
    [(0, ValueError), (-64, ValueError), (64.0, TypeError), ("64", TypeError), (None, TypeError), (True, TypeError)],
)
def test_a_count_is_a_positive_int(count: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`width` is {count!r}; accepted is"):
        inputs.check_counts(height=64, width=count)


@pytest.mark.parametrize(
    ("check", "error", "says"),
    [
        (lambda: inputs.check_at_most("steps", 1001, 1000), ValueError, "`steps` is 1001; accepted is up to 1000"),
        (
            lambda: inputs.check_choice("output_type", "jpg", ("pil", "pt")),
            ValueError,
            "`output_type` is 'jpg'; accepted is 'pil' or 'pt'",
        ),
        (
            lambda: inputs.check_generators([torch.Generator()] * 2, 3),
            ValueError,
            "`generator` is a list of 2; accepted is one for each of 3",
        ),
        (
            lambda: inputs.check_shape(torch.zeros(1, 4, 9, 9), (1, 4, 8, 8), "latents"),
            ValueError,
            r"`latents` has the shape \[1, 4, 9, 9\]; accepted is \[1, 4, 8, 8\]",
        ),
        (lambda: inputs.check_strength(-0.01), ValueError, r"`strength` is -0\.01"),
        (lambda: inputs.check_strength(1.01), ValueError, r"`strength` is 1\.01"),
        (lambda: inputs.check_strength(float("nan")), ValueError, "`strength` is nan"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_accepted(
    check: Callable[[], None], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        check()
