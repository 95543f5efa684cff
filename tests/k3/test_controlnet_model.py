"""What Kandinsky3ControlNetModel computes, as the original does, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image, attention_backend

from kandinsky_diffusers import Kandinsky3ControlNetModel, Kandinsky3UNet
from tests.fixtures import Recorded
from tests.k3.test_unet import unet
from tests.support.goldens import GoldenFamily
from tests.support.parity import MODULE, assert_close


TINY: dict[str, Any] = {
    "time_embedding_dim": 12,
    "groups": 2,
    "attention_head_dim": 4,
    "block_out_channels": (8, 16),
    "cross_attention_dim": 12,
}


def controlnet(**changed: Any) -> Any:
    model = Kandinsky3ControlNetModel(**{**TINY, **changed}).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
    return model


def inputs(batch: int = 2) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, 4, 8, 12, generator=rng),
        "timestep": 300,
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=rng),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])[:batch],
        "controlnet_cond": torch.rand(batch, 3, 64, 96, generator=rng),
    }


@torch.no_grad()
def residuals(model: Any, **arguments: Any) -> tuple[torch.Tensor, ...]:
    return model(**arguments).down_block_res_samples


@torch.no_grad()
def test_golden_controlnet(goldens_controlnet: GoldenFamily, recorded: Recorded) -> None:
    case = goldens_controlnet.case("controlnet")
    model: Any = Kandinsky3ControlNetModel.from_pretrained(recorded("3-controlnet") / "kandinsky-3-controlnet-hed")
    base: Any = AutoPipelineForText2Image.from_pretrained(recorded("3.1") / "kandinsky-3-1").unet
    seen = (case["x"], case["t"], case["context"], case["context_mask"])
    assert_close(model.controlnet_cond_embedding(case["hint"]), case["hint_embed"], MODULE, "hint")
    found = residuals(model, **dict(zip(inputs(), (*seen, case["hint"]), strict=True)))
    for level, residual in enumerate(found):
        assert_close(residual, case[f"residual_{level}"], MODULE, f"residual {level}")
    assert f"residual_{len(found)}" not in case.tensors
    for scale, name in ((1.0, "out"), (0.6, "out_scale_0_6")):
        scaled = model(*seen, case["hint"], scale, return_dict=False)[0]
        out = base(*seen, projected=True, down_block_additional_residuals=scaled).sample
        assert_close(out, case[name], MODULE, name)


def test_what_a_level_adds_to_the_unet_also_feeds_the_next_level() -> None:
    """Elsewhere the zero convolutions are side branches, and each acts on its own residual alone."""
    model, arguments = controlnet(), inputs()
    before = residuals(model, **arguments)
    with torch.no_grad():
        model.controlnet_down_blocks[0].weight.mul_(2.0)
    after = residuals(model, **arguments)
    assert not torch.allclose(before[1], after[1])


def test_the_scale_acts_on_what_is_added_but_not_on_what_feeds_the_next_level() -> None:
    model, arguments = controlnet(), inputs()
    for whole, half in zip(
        residuals(model, **arguments), residuals(model, **arguments, conditioning_scale=0.5), strict=True
    ):
        assert_close(half, whole * 0.5, 1e-6)


def test_a_map_scales_each_place_with_the_nearest_value() -> None:
    """That of the pixel under the place's middle (`nearest-exact` in the original's picture-to-picture pipeline)."""
    model, arguments = controlnet(), inputs()
    scale = torch.rand(1, 1, 64, 96)
    for whole, mapped in zip(
        residuals(model, **arguments), residuals(model, **arguments, conditioning_scale=scale), strict=True
    ):
        height, width = whole.shape[-2:]
        rows, columns = (torch.arange(height) * 2 + 1) * 32 // height, (torch.arange(width) * 2 + 1) * 48 // width
        assert_close(mapped, whole * scale[..., rows, :][..., columns], 1e-6)


def test_a_sample_that_attends_to_nothing_takes_the_mean_as_the_original_does() -> None:
    """So it does not matter how well the tokens, all of them masked, would fit."""
    model, arguments = controlnet(), {**inputs(), "encoder_attention_mask": torch.zeros(2, 5)}
    before = residuals(model, **arguments)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "to_k" in name and weight.shape[1] == 12:  # the width of the context
                weight.mul_(3.0)
    for first, second in zip(before, residuals(model, **arguments), strict=True):
        assert_close(second, first, 1e-6)


def test_one_image_serves_all_samples_and_a_row_both_halves_of_guidance() -> None:
    model, arguments = controlnet(), inputs()
    one = {**arguments, "controlnet_cond": arguments["controlnet_cond"][:1]}
    two = {**arguments, "controlnet_cond": arguments["controlnet_cond"][:1].repeat(2, 1, 1, 1)}
    for first, second in zip(residuals(model, **one), residuals(model, **two), strict=True):
        assert_close(first, second, 1e-6)
    twice = {
        name: torch.cat([rows] * 2) if isinstance(rows, torch.Tensor) else rows for name, rows in arguments.items()
    }
    kept = {**twice, "controlnet_cond": arguments["controlnet_cond"]}
    for first, second in zip(residuals(model, **kept), residuals(model, **twice), strict=True):
        assert_close(first, second, 1e-6)


def test_each_sample_pools_over_its_own_rows() -> None:
    model, arguments = controlnet(), inputs()
    both = residuals(model, **arguments, context_lengths=torch.tensor([5, 3]))
    alone = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    alone |= {name: alone[name][:, :3] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    for residual, expected in zip(both, residuals(model, **alone), strict=True):
        assert_close(residual[1], expected[0], 1e-5)


@pytest.mark.parametrize("of_unet", [{}, {"in_channels": 9, "out_channels": 4}], ids=["pictures", "inpainting"])
def test_one_made_from_a_unet_has_its_weights_and_no_effect_before_training(of_unet: dict[str, Any]) -> None:
    base = unet(**of_unet)
    model: Any = Kandinsky3ControlNetModel.from_unet(base)
    assert model.config.block_out_channels == base.config.block_out_channels[:-1]
    of_base = base.state_dict()
    for key, tensor in model.state_dict().items():
        if not key.startswith("controlnet_"):
            expected = of_base[key]
            assert torch.equal(tensor, expected[:, :4] if key == "conv_in.weight" else expected)
    assert not any(residual.any() for residual in residuals(model, **inputs()))


def test_one_made_from_a_unet_trains_with_gradient_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = Kandinsky3ControlNetModel.from_unet(unet()).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        arguments = inputs()
        added = model(**arguments).down_block_res_samples
        seen = [arguments[name] for name in list(arguments)[:4]]
        out = unet()(*seen, projected=True, down_block_additional_residuals=added).sample
        out.square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]["controlnet_down_blocks.0.weight"].any()
    for key, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], plain)


def test_it_is_saved_and_loaded_again(tmp_path: Path) -> None:
    model, arguments = controlnet(), inputs()
    model.save_pretrained(tmp_path)
    again = Kandinsky3ControlNetModel.from_pretrained(tmp_path)
    for first, second in zip(residuals(model, **arguments), residuals(again, **arguments), strict=True):
        assert torch.equal(first, second)


def test_its_attention_runs_on_the_chosen_backend() -> None:
    model, arguments = controlnet(), inputs()
    before = residuals(model, **arguments)
    with attention_backend("native"):  # takes back that the choice becomes everybody's default
        model.set_attention_backend("_native_math")
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {"_native_math"}
    for first, second in zip(before, residuals(model, **arguments), strict=True):
        assert_close(first, second, 1e-5)
    with pytest.raises(ValueError, match="`backend` is 'flash'"):
        model.set_attention_backend("flash")


def test_a_compiled_model_gives_the_same() -> None:
    model, arguments = controlnet(layers_per_block=1), {**inputs(), "conditioning_scale": torch.ones(1, 1, 64, 96)}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for first, second in zip(residuals(compiled, **arguments), residuals(model, **arguments), strict=True):
        assert_close(first, second, 1e-5)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"sample": torch.zeros(2, 4, 10, 12)}, "10 latents high"),
        ({"controlnet_cond": torch.zeros(2, 3, 64, 64)}, r"`controlnet_cond` has the shape \[2, 3, 64, 64\]"),
        ({"controlnet_cond": torch.zeros(2, 1, 64, 96)}, "`controlnet_cond`"),
        ({"controlnet_cond": torch.zeros(3, 3, 64, 96)}, "`controlnet_cond`"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        controlnet()(**{**inputs(), **changed})


def test_a_unet_refuses_residuals_for_other_levels() -> None:
    model: Any = Kandinsky3UNet(**{**TINY, "block_out_channels": (8, 16, 24), "encoder_hid_dim": 10})
    seen = [inputs()[name] for name in list(inputs())[:4]]
    with pytest.raises(ValueError, match="`down_block_additional_residuals` has 1 items"):
        model(*seen, projected=True, down_block_additional_residuals=[torch.zeros(2, 8, 4, 6)])
