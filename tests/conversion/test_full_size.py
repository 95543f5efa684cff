"""The published release, as lists of keys and shapes: everything is accounted for, forwards and backwards."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kandinsky_diffusers.conversion import ConversionError, plan, plan_source


INVENTORIES = Path(__file__).parents[1] / "data" / "inventory"
FILES = sorted(path.name for path in INVENTORIES.glob("k21_*.json.gz"))
FILES_20 = sorted(path.name for path in INVENTORIES.glob("k20_*.json.gz"))
FILES_3 = sorted(path.name for path in INVENTORIES.glob("k3_*.json.gz"))
FILES_SUPERRES = sorted(path.name for path in INVENTORIES.glob("kandisuperres_*.json.gz"))


def shapes_of(name: str) -> dict[str, list[int]]:
    return json.loads(gzip.decompress((INVENTORIES / name).read_bytes()))["tensors"]


@pytest.mark.parametrize("name", FILES + FILES_3 + FILES_SUPERRES)
def test_every_key_is_used_and_comes_back(name):
    found, plans = plan_source(INVENTORIES / name)
    (model,) = plans
    (file,) = found.inputs.files.values()
    assert not model.plan.dropped
    assert model.plan.inverse.target_shapes == file.shapes


def test_all_files_together_make_whole_models():
    _, plans = plan_source(INVENTORIES, version="2.1")
    assert {model.component.class_name for model in plans} == {
        "UNet2DConditionModel",
        "PriorTransformer",
        "VQModel",
        "MultilingualCLIP",
    }
    for model in plans:
        assert not model.notes
        assert model.plan.target_shapes.keys() == model.model.state_dict().keys()


def test_nothing_is_allocated():
    _, plans = plan_source(INVENTORIES / "k21_decoder_fp16.ckpt.json.gz")
    assert all(tensor.is_meta for tensor in plans[0].model.state_dict().values())


def test_the_published_sizes_are_found():
    config = plan(shapes_of("k21_inpainting_fp16.ckpt.json.gz"))[0].config
    assert config["in_channels"] == 9
    assert config["block_out_channels"] == [384, 768, 1152, 1536]
    assert config["layers_per_block"] == 3
    prior = plan(shapes_of("k21_prior_fp16.ckpt.json.gz"))[0].config
    assert (prior["num_layers"], prior["num_attention_heads"], prior["attention_head_dim"]) == (20, 32, 64)


def test_the_original_config_tells_what_shapes_cannot():
    config = {"model_config": {"num_head_channels": 32}, "prior": {"params": {"model": {"hparams": {"xf_heads": 16}}}}}
    unet = plan(shapes_of("k21_decoder_fp16.ckpt.json.gz"), original_config=config)[0]
    prior = plan(shapes_of("k21_prior_fp16.ckpt.json.gz"), original_config=config)[0]
    assert unet.config["attention_head_dim"] == 32
    assert (prior.config["num_attention_heads"], prior.config["attention_head_dim"]) == (16, 128)


@pytest.mark.parametrize("head_dim", [-1, 0, 80])
def test_heads_that_do_not_fit_are_refused_with_a_hint(head_dim):
    config = {"model_config": {"num_head_channels": head_dim}}
    with pytest.raises(ConversionError, match="original-config"):
        plan(shapes_of("k21_decoder_fp16.ckpt.json.gz"), original_config=config)


@pytest.mark.parametrize("name", [name for name in FILES if "stats" not in name])
def test_one_key_too_many_is_named(name):
    shapes = {**shapes_of(name), "loss.discriminator.weight": [4, 4]}
    with pytest.raises(ConversionError, match=r"loss\.discriminator\.weight"):
        plan(shapes)
    assert "loss.discriminator.weight" in plan(shapes, drop=["loss.*"])[0].plan.dropped


@pytest.mark.parametrize("name", FILES_20)
def test_every_key_of_kandinsky_2_0_is_used_or_dropped_with_a_reason(name):
    found, plans = plan_source(INVENTORIES / name, version="2.0")
    (model,) = plans
    (file,) = found.inputs.files.values()
    assert all(model.plan.dropped.values())
    assert {*model.plan.inverse.target_shapes, *model.plan.dropped} == file.shapes.keys()


def test_all_files_of_kandinsky_2_0_together_make_whole_models(tmp_path):
    for name in FILES_20:
        (tmp_path / name).symlink_to(INVENTORIES / name)
    _, plans = plan_source(tmp_path, version="2.0")
    names = [model.component.name for model in plans]
    assert sorted(names) == ["text_encoder", "text_encoder_2", "unet", "unet", "vae"]
    unet = next(model for model in plans if model.component.name == "unet")
    assert unet.config["block_out_channels"] == [384, 768, 1152, 1536]
    assert (unet.config["text_dim"], unet.config["text_dim_2"]) == (1024, 512)
    assert (unet.config["pooled_text_dim"], unet.config["cross_attention_dim"]) == (640, 768)


def test_old_files_with_position_numbers_convert_too():
    shapes = {
        **shapes_of("k21_text_encoder__pytorch_model.bin.json.gz"),
        "transformer.embeddings.position_ids": [1, 514],
    }
    assert list(plan(shapes)[0].plan.dropped) == ["transformer.embeddings.position_ids"]


def test_of_a_text_encoder_only_the_tied_copy_is_dropped():
    found, plans = plan_source(INVENTORIES / "flan_ul2_encoder.json.gz")
    (file,) = found.inputs.files.values()
    assert list(plans[0].plan.dropped) == ["encoder.embed_tokens.weight"]
    assert {*plans[0].plan.inverse.target_shapes, "encoder.embed_tokens.weight"} == file.shapes.keys()


@pytest.mark.parametrize("version", ["3.0", "3.1"])
def test_all_files_of_kandinsky_3_together_make_whole_models(version, tmp_path):
    others = {"3.0": ("k3_flash_unet", "k3_text_projection"), "3.1": ("k3_text_projection_30",)}[version]
    for path in (*INVENTORIES.glob("k3_*.json.gz"), INVENTORIES / "flan_ul2_encoder.json.gz"):
        if path.name.removesuffix(".json.gz") not in others:
            (tmp_path / path.name).symlink_to(path)
    _, plans = plan_source(tmp_path, version=version)
    unets = [model for model in plans if model.component.name == "unet"]
    assert len(unets) == {"3.0": 2, "3.1": 3}[version]
    assert {model.component.name for model in plans} == {"unet", "movq", "text_encoder"}
    for model in unets:
        assert model.config["block_out_channels"] == [384, 768, 1536, 3072]
        assert (model.config["attention_head_dim"], model.config["groups"]) == (64, 32)
        assert model.config["layers_per_block"] == 3


def test_a_head_that_does_not_fit_a_unet_of_kandinsky_3_is_refused_with_a_hint():
    config = {"weights/kandinsky3.pt": {"head_dim": 80}}
    with pytest.raises(ConversionError, match="original-config"):
        plan(shapes_of("k3_unet.json.gz"), original_config=config)


def test_the_controlnet_of_kandinsky_3_has_the_published_sizes():
    (model,) = plan(shapes_of("k3_controlnet.json.gz"))
    assert model.component.class_name == "Kandinsky3ControlNetModel"
    assert model.config["block_out_channels"] == [384, 768, 1536]
    assert model.config["conditioning_embedding_out_channels"] == [16, 32, 96, 256]
    assert model.plan.target_shapes.keys() == model.model.state_dict().keys()


def test_the_files_of_kandisuperres_together_make_whole_models(tmp_path):
    for name in FILES_SUPERRES:
        (tmp_path / name).symlink_to(INVENTORIES / name)
    _, plans = plan_source(tmp_path, version="superres")
    assert {model.component.name for model in plans} == {"unet", "movq"}
    for model in plans:
        assert not model.notes
        assert model.plan.target_shapes.keys() == model.model.state_dict().keys()
    unet = next(model for model in plans if model.component.name == "unet")
    assert unet.config == {
        "sample_channels": 3,
        "init_channels": 128,
        "block_out_channels": [128, 256, 512, 1024],
        "layers_per_block": [2, 4, 8, 8],
        "time_embedding_dim": 512,
        "groups": 32,
    }
