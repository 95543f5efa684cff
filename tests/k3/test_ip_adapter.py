"""IP-Adapters of 3.x: pictures as prompts, alone and mixed; they come and go without a trace."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file

from kandinsky_diffusers import Kandinsky3Img2ImgPipeline, Kandinsky3InpaintPipeline, Kandinsky3Pipeline
from kandinsky_diffusers.attention import DispatchedAttnProcessor, IPAdapterAttnProcessor
from tests.k3.conftest import SIZE, copies, float64, seeded
from tests.support.parity import assert_close


QUICK = {**SIZE, "num_inference_steps": 1, "output_type": "latent"}
BATCH = 1e-5
EMBEDS = "ip_adapter_image_embeds"


@pytest.fixture(scope="module")
def pictures() -> list[PIL.Image.Image]:
    rng = np.random.default_rng(1)
    sizes = [(40, 30), (33, 64), (50, 50), (64, 20)]
    return [PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def models(components: Any) -> dict[str, Any]:
    """Copies of the models of 3.1, so that no other test sees an adapter."""
    return {name: deepcopy(part) for name, part in components("3.1").items()}


@pytest.fixture
def bare(models: dict[str, Any]) -> Any:
    """3.1 without an adapter, and after the test again."""
    pipe = Kandinsky3Pipeline(**models)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    models["unet"].unload_ip_adapters()


@pytest.fixture
def pipe(bare: Any, ip_adapter: Path) -> Any:
    """3.1 with the converted adapter."""
    bare.load_ip_adapter(ip_adapter)
    return bare


@pytest.fixture(scope="module")
def other(ip_adapter: Path) -> dict[str, torch.Tensor]:
    """Weights of another adapter, with two tokens for a picture."""
    weights = load_file(ip_adapter / "ip_adapter.safetensors")
    noisy = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in weights.items()}
    rows = 2 * len(weights["image_proj.norm.weight"])
    first = ("image_proj.proj.weight", "image_proj.proj.bias")
    return {key: tensor[:rows].clone() if key in first else tensor for key, tensor in noisy.items()}


def draw(pipe: Any, prompt: Any = "a fox", seeds: Any = (0,), **given: Any) -> torch.Tensor:
    return pipe(prompt, generator=seeded(*seeds), **{**QUICK, **given}).images


# ------------------------------------------------------------------------------------------------ coming and going
def test_a_damaged_file_and_one_that_is_not_there_are_told_apart(bare: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ip_adapter\.safetensors"):
        bare.load_ip_adapter(tmp_path)
    (tmp_path / "ip_adapter.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(ValueError, match="damaged"):
        bare.load_ip_adapter(tmp_path)


def test_loading_and_unloading_leaves_no_trace(bare: Any, ip_adapter: Path, pictures: Any) -> None:
    def facts() -> tuple[Any, ...]:
        unet = bare.unet
        return repr(unet), repr(bare), dict(unet.config), unet.attn_processors, dict(bare.config), bare.components

    before, tensors, latents = facts(), deepcopy(bare.unet.state_dict()), draw(bare)
    bare.load_ip_adapter(ip_adapter)
    bare.set_ip_adapter_scale(0.5)
    assert not torch.equal(draw(bare, ip_adapter_image=pictures[0]), latents)
    assert "IPAdapter" in repr(bare.unet)
    bare.unload_ip_adapter()
    assert facts() == before
    after = bare.unet.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())
    assert torch.equal(draw(bare), latents)


def test_a_scale_of_zero_is_no_adapter(bare: Any, ip_adapter: Path, pictures: Any) -> None:
    without = draw(bare)
    bare.load_ip_adapter(ip_adapter)
    bare.set_ip_adapter_scale(0)
    assert torch.equal(draw(bare, ip_adapter_image=pictures[0]), without)


def test_the_image_encoder_of_the_user_stays(bare: Any, ip_adapter: Path) -> None:
    bare.load_ip_adapter(ip_adapter)
    encoder, processor = bare.image_encoder, bare.feature_extractor
    own = Kandinsky3Pipeline(**{**bare.components, "image_encoder": deepcopy(encoder)})
    mine = own.image_encoder
    own.load_ip_adapter(ip_adapter)
    assert own.image_encoder is mine
    own.unload_ip_adapter()
    assert own.image_encoder is mine
    assert bare.image_encoder is encoder
    assert bare.feature_extractor is processor


def test_an_adapter_that_does_not_fit_changes_nothing(pipe: Any, other: Any) -> None:
    before, shown = repr(pipe.unet), {"ip_adapter_image_embeds": torch.ones(pipe.unet.ip_adapter_widths[0])}
    latents = draw(pipe, **shown)
    layer = next(key for key in other if "to_k_ip.weight" in key)
    faults = {
        "are missing": {key: tensor for key, tensor in other.items() if key != layer},
        "are unknown": {**other, "ip_adapter.1.to_k_ip.weight": other[layer]},
        "other shapes": {**other, layer: other[layer][1:]},
        "have to be converted": {"image_proj.weight": other[layer]},
    }
    for message, weights in faults.items():
        with pytest.raises(ValueError, match=message):
            pipe.load_ip_adapter([other, weights])
    with pytest.raises(OSError, match="nowhere"):
        pipe.load_ip_adapter("/nowhere")
    with pytest.raises(ValueError, match="`subfolder`"):
        pipe.load_ip_adapter([other] * 2, subfolder=["a", "b", "c"])
    with pytest.raises(ValueError, match="`weight_name`"):
        pipe.load_ip_adapter("/nowhere", weight_name="ip_adapter.bin")
    assert repr(pipe.unet) == before
    assert torch.equal(draw(pipe, **shown), latents)


def test_saving_leaves_the_adapter_out(pipe: Any, pictures: Any, tmp_path: Path) -> None:
    before = draw(pipe, ip_adapter_image=pictures[0])
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "image_encoder").exists()
    assert "image_encoder" not in (tmp_path / "model_index.json").read_text()
    assert torch.equal(draw(pipe, ip_adapter_image=pictures[0]), before)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    saved, unet = again.unet.state_dict(), pipe.unet
    pipe.unload_ip_adapter()
    assert saved.keys() == unet.state_dict().keys()
    assert "image_encoder" not in AutoPipelineForInpainting.from_pipe(pipe).to_json_string()


# ------------------------------------------------------------------------------------------------ what is shown
def test_pictures_are_mixed_by_their_weights(pipe: Any, pictures: Any) -> None:
    first, second = pictures[:2]
    alone = draw(pipe, ip_adapter_image=first)
    assert_close(draw(pipe, ip_adapter_image=[first, second], ip_adapter_weights=[1.0, 0.0]), alone, BATCH)
    mixed = draw(pipe, ip_adapter_image=[first, second], ip_adapter_weights=[0.7, 0.3])
    assert not torch.allclose(mixed, alone, atol=1e-3)
    assert_close(draw(pipe, ip_adapter_image=[second, first], ip_adapter_weights=[0.3, 0.7]), mixed, BATCH)
    assert_close(
        draw(pipe, ip_adapter_image=[[first, first, second, first]], ip_adapter_weights=[0.2, 0.2, 0.3, 0.3]),
        mixed,
        BATCH,
    )
    halves = draw(pipe, ip_adapter_image=[first, second], ip_adapter_weights=[0.5, 0.5])
    assert_close(draw(pipe, ip_adapter_image=[[first, second]]), halves, BATCH)


def test_embeddings_are_as_good_as_pictures(pipe: Any, pictures: Any) -> None:
    mixed = {"ip_adapter_weights": [0.7, 0.3]}
    from_pictures = draw(pipe, ip_adapter_image=pictures[:2], **mixed)
    embeds, negative = pipe.encode_image(pictures[:2])
    assert_close(draw(pipe, ip_adapter_image_embeds=embeds, **mixed), from_pictures, BATCH)
    pipe.image_encoder = None
    given = {"ip_adapter_image_embeds": list(embeds), "negative_ip_adapter_image_embeds": negative, **mixed}
    assert_close(draw(pipe, **given), from_pictures, BATCH)
    del given["negative_ip_adapter_image_embeds"]
    assert draw(pipe, **given, guidance_scale=0.0).isfinite().all()
    with pytest.raises(ValueError, match="`negative_ip_adapter_image_embeds` is missing"):
        draw(pipe, **given)


def test_arrays_and_tensors_are_pictures(pipe: Any, pictures: Any) -> None:
    reference, array = pipe.encode_image(pictures[0])[0], np.asarray(pictures[0])
    pixels = torch.tensor(array).permute(2, 0, 1)
    for same in (array, array / 255.0, pixels, pixels[None] / 127.5 - 1.0, pictures[0].convert("RGBA")):
        assert torch.equal(pipe.encode_image(same)[0], reference)


def test_a_picture_of_a_batch_is_the_picture_alone(pipe: Any, pictures: Any) -> None:
    exact = float64(pipe)
    prompts, seeds = ["a fox", "a lazy dog jumps"], (0, 1, 2, 3)
    shown = [pictures[:2], pictures[1:2], pictures[2:], pictures[:3]]
    weights = [[0.7, 0.3], [0.8], [0.1, 0.2], [0.2, 0.3, 0.4]]
    mixed = {"ip_adapter_image": shown, "ip_adapter_weights": weights, "num_images_per_prompt": 2}
    batch = draw(exact, prompts, seeds, **mixed)
    for index in (0, 3):
        one = {"ip_adapter_image": [shown[index]], "ip_adapter_weights": [weights[index]]}
        alone = draw(exact, prompts[index // 2], (seeds[index],), **one)
        assert_close(batch[index : index + 1], alone, BATCH)

    for_each = {"ip_adapter_image": pictures[:2], "num_images_per_prompt": 2, "guidance_scale": 0.0}
    batch = draw(exact, prompts, seeds, **for_each)
    alone = draw(exact, prompts[1], seeds[3:], ip_adapter_image=pictures[1], guidance_scale=0.0)
    assert_close(batch[3:], alone, BATCH)


def test_two_adapters_in_any_order(bare: Any, ip_adapter: Path, other: Any, pictures: Any) -> None:
    first, second = pictures[0], {"ip_adapter_weights": [None, [0.6, 0.4]]}
    bare.load_ip_adapter([ip_adapter, other])
    bare.set_ip_adapter_scale([0.9, 0.4])
    both = draw(bare, ip_adapter_image=[first, pictures[1:3]], **second)
    bare.load_ip_adapter([other, ip_adapter])
    bare.set_ip_adapter_scale([0.4, 0.9])
    swapped = draw(bare, ip_adapter_image=[pictures[1:3], first], ip_adapter_weights=[[0.6, 0.4], None])
    assert_close(swapped, both, BATCH)
    bare.set_ip_adapter_scale([0, 0.9])
    only = draw(bare, ip_adapter_image=[first, first])
    bare.load_ip_adapter(ip_adapter)
    bare.set_ip_adapter_scale(0.9)
    assert_close(only, draw(bare, ip_adapter_image=first), BATCH)


def test_nested_weights_are_those_of_diffusers(bare: Any, other: Any) -> None:
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in other.items():
        place, _, name = key.partition(".")
        nested[place][name] = tensor
    shown = {"ip_adapter_image_embeds": torch.ones(other["image_proj.proj.weight"].shape[1]), "guidance_scale": 0.0}
    bare.load_ip_adapter(other)
    reference = draw(bare, **shown)
    bare.load_ip_adapter(nested)
    assert torch.equal(draw(bare, **shown), reference)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "`ip_adapter_image` and `ip_adapter_image_embeds` are missing"),
        ({"ip_adapter_image": "cat.png"}, "`ip_adapter_image` is a str"),
        ({"ip_adapter_image": []}, "`ip_adapter_image` has an empty list"),
        ({"ip_adapter_image": torch.zeros(2, 8, 8)}, "`ip_adapter_image` has the shape"),
        ({"ip_adapter_image": "ppp"}, "`ip_adapter_image` has 3 items.*`ip_adapter_weights`"),
        ({"ip_adapter_image": "pp", "ip_adapter_weights": [1.0]}, "`ip_adapter_weights` has 1 numbers"),
        ({"ip_adapter_image": "pp", "ip_adapter_weights": 0.5}, "`ip_adapter_weights` is 0.5"),
        ({"ip_adapter_image": "pp", "ip_adapter_weights": [float("nan"), 1.0]}, "`ip_adapter_weights` is"),
        ({"ip_adapter_image": "p", "ip_adapter_image_embeds": torch.zeros(1, 16)}, "are both given"),
        ({"ip_adapter_image_embeds": torch.zeros(1, 3)}, "`ip_adapter_image_embeds` has the shape"),
        ({"ip_adapter_image": "p", "negative_ip_adapter_image_embeds": [1.0]}, "`negative_ip_adapter_image_embeds`"),
    ],
)
def test_bad_input_is_refused_before_any_model_runs(
    pipe: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch, given: Any, message: str
) -> None:
    if set(given.get("ip_adapter_image", "")) == {"p"}:  # so many pictures
        given = {**given, "ip_adapter_image": pictures[: len(given["ip_adapter_image"])]}
    states = {"prompt_embeds": torch.zeros(2, 3, pipe.unet.config.encoder_hid_dim), "attention_mask": torch.ones(2, 3)}
    monkeypatch.setattr(pipe, "_encode", lambda *_: pytest.fail("models run"))
    with pytest.raises((TypeError, ValueError), match=message):
        pipe(**states, **QUICK, **given)


def test_several_adapters_want_lists(bare: Any, other: Any, pictures: Any) -> None:
    bare.load_ip_adapter([other, other])
    for given in ({"ip_adapter_image_embeds": torch.zeros(16)}, {"ip_adapter_image": pictures[:3]}):
        with pytest.raises(ValueError, match="one item for each of 2 IP-Adapters"):
            draw(bare, **given)


def test_without_an_adapter_its_arguments_are_refused(bare: Any, pictures: Any) -> None:
    with pytest.raises(ValueError, match="`ip_adapter_image` is given, and no IP-Adapter is loaded"):
        draw(bare, ip_adapter_image=pictures[0])
    with pytest.raises(ValueError, match="`scale`"):
        bare.set_ip_adapter_scale(1.0)


@pytest.mark.parametrize(("scale", "error"), [([1.0, 1.0], ValueError), ({"down": 1.0}, TypeError), ("1", TypeError)])
def test_a_scale_that_is_none_is_refused(pipe: Any, scale: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`scale`"):
        pipe.set_ip_adapter_scale(scale)


# ------------------------------------------------------------------------------------------------ with other things
def test_the_adapter_goes_along_to_other_tasks(pipe: Any, pictures: Any, inputs: Any) -> None:
    for auto, cls in (
        (AutoPipelineForImage2Image, Kandinsky3Img2ImgPipeline),
        (AutoPipelineForInpainting, Kandinsky3InpaintPipeline),
    ):
        task = auto.from_pipe(pipe)
        assert type(task) is cls
        task.set_progress_bar_config(disable=True)
        given = inputs(cls.__name__, output_type="latent", generator=seeded(0)[0])
        one, two = (task(**{**given, "generator": seeded(0)[0]}, ip_adapter_image=p).images for p in pictures[:2])
        assert not torch.allclose(one, two, atol=1e-3)


def test_an_inpainting_unet_takes_the_adapter(components: Any, ip_adapter: Path, pictures: Any, inputs: Any) -> None:
    pipe = Kandinsky3InpaintPipeline(**{name: deepcopy(part) for name, part in components("3.1 inpaint").items()})
    pipe.load_ip_adapter(ip_adapter)
    given = inputs("Kandinsky3InpaintPipeline", output_type="latent")
    one, two = (pipe(**given, generator=seeded(0)[0], ip_adapter_image=p).images for p in pictures[:2])
    assert not torch.allclose(one, two, atol=1e-3)


def test_a_stock_unet_takes_the_adapter(make: Any, components: Any, ip_adapter: Path, pictures: Any) -> None:
    pipe = make(Kandinsky3Pipeline, "stock", **copies(components("stock")))
    before = draw(pipe)
    pipe.load_ip_adapter(ip_adapter)
    assert not torch.allclose(draw(pipe, ip_adapter_image=pictures[0]), before, atol=1e-3)
    again = Kandinsky3Pipeline(**pipe.components)
    assert again.unet.ip_adapter_widths
    again.unload_ip_adapter()
    assert torch.equal(draw(pipe), before)


def test_lora_and_adapter_come_and_go_in_any_order(bare: Any, ip_adapter: Path, pictures: Any) -> None:
    before, shown = draw(bare), {"ip_adapter_image": pictures[0]}
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(0)
    bare.unet.add_adapter(lora)
    bare.load_ip_adapter(ip_adapter)
    both = draw(bare, **shown)
    bare.unet.delete_adapters("default")
    bare.unet.unload_lora()
    only = draw(bare, **shown)
    assert not torch.allclose(only, both, atol=1e-3)
    torch.manual_seed(0)
    bare.unet.add_adapter(lora)
    assert_close(draw(bare, **shown), both, BATCH)
    bare.unload_ip_adapter()
    bare.unet.unload_lora()
    assert_close(draw(bare), before, BATCH)


def test_regions_and_adapter_work_together(bare: Any, ip_adapter: Path, pictures: Any, mask: Any) -> None:
    regions = {"regions": [("a dog", mask)]}
    without = draw(bare, **regions)
    bare.load_ip_adapter(ip_adapter)
    assert not torch.allclose(draw(bare, ip_adapter_image=pictures[0], **regions), without, atol=1e-3)
    bare.set_ip_adapter_scale(0)
    assert_close(draw(bare, ip_adapter_image=pictures[0], **regions), without, BATCH)


def test_processors_for_the_text_can_be_replaced(pipe: Any, pictures: Any) -> None:
    before = draw(pipe, ip_adapter_image=pictures[0])
    new = DispatchedAttnProcessor()
    pipe.unet.set_attn_processor(new)
    adapted = [p for p in pipe.unet.attn_processors.values() if isinstance(p, IPAdapterAttnProcessor)]
    assert adapted
    assert all(processor.text is new for processor in adapted)
    pipe.unet.set_attn_processor(pipe.unet.attn_processors)
    assert torch.equal(draw(pipe, ip_adapter_image=pictures[0]), before)


def test_the_unet_says_what_it_misses(pipe: Any) -> None:
    unet = pipe.unet
    given = (torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 2, unet.config.cross_attention_dim), torch.ones(1, 2))
    with pytest.raises(ValueError, match="`image_embeds` for 0 IP-Adapters"):
        unet(*given, projected=True)


def test_embeddings_have_the_width_of_their_adapter(bare: Any, ip_adapter: Path, other: Any, pictures: Any) -> None:
    """One adapter has another image encoder, so the pipeline's is of no use for it."""
    bare.load_ip_adapter(ip_adapter)
    width = bare.unet.ip_adapter_widths[0]
    wide = {**other, "image_proj.proj.weight": torch.cat([other["image_proj.proj.weight"]] * 2, dim=1)}
    bare.load_ip_adapter([ip_adapter, wide])
    embeds = {name: [torch.ones(w) for w in (width, 2 * width)] for name in (EMBEDS, f"negative_{EMBEDS}")}
    assert draw(bare, **embeds).isfinite().all()
    for given in ({"ip_adapter_image": pictures[:2]}, {EMBEDS: embeds[EMBEDS]}):
        with pytest.raises(ValueError, match=f"image encoder are {width} wide"):
            draw(bare, **given)
