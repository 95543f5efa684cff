"""The IP-Adapter of 3.1, as the original saves it together with a UNet, becomes a folder for `load_ip_adapter`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from kandinsky_diffusers.conversion import ConversionError, convert, inspect, plan, plan_source
from kandinsky_diffusers.conversion.matching import match
from kandinsky_diffusers.k3.ip_adapter_weights import ip_adapter_rules, ip_adapter_shapes
from tests.conversion.test_full_size import INVENTORIES, shapes_of


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", ["fork_ip_adapter_unet", "fork_ip_adapter_only"])
def test_at_full_size_the_adapter_is_used_and_only_the_unet_is_left_out(name: str) -> None:
    found, (model,) = plan_source(INVENTORIES / f"{name}.json.gz")
    (file,) = found.inputs.files.values()
    assert found.release.version == "3-ip-adapter"
    of_adapter = {key for key in file.shapes if key.startswith("image_") or ".processor." in key}
    assert model.plan.inverse.target_shapes == {key: file.shapes[key] for key in of_adapter}
    assert model.plan.dropped.keys() == file.shapes.keys() - of_adapter
    assert (model.config["image_embed_dim"], model.config["num_image_text_embeds"]) == (768, 4)


@pytest.mark.parametrize(("channels", "layers", "tokens"), [([6, 6, 10, 4], 2, 1), ([16, 16, 8, 24], 4, 7)])
def test_adapters_of_any_size_are_understood(channels: list[int], layers: int, tokens: int) -> None:
    config = {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "cross_attention_dim": 9,
        "image_embed_dim": 5,
        "num_image_text_embeds": tokens,
    }
    original = match(ip_adapter_rules(config).inverse, ip_adapter_shapes(config)).target_shapes
    (model,) = plan(original)
    assert model.config == config
    assert model.plan.target_shapes == ip_adapter_shapes(config)


def test_a_key_of_neither_adapter_nor_unet_is_named() -> None:
    shapes = {**shapes_of("fork_ip_adapter_unet.json.gz"), "time_cond.weight": [4, 4]}
    with pytest.raises(ConversionError, match=r"time_cond\.weight"):
        plan(shapes)


def test_an_adapter_with_a_layer_missing_is_refused() -> None:
    layer = "up_samples.0.resnet_attn_blocks.1.1.attention.processor.to_v_ip.bias"
    shapes = {key: shape for key, shape in shapes_of("fork_ip_adapter_only.json.gz").items() if key != layer}
    with pytest.raises(ConversionError, match=r"up_blocks\.0\.attentions\.2\.attention\.to_v_ip\.bias"):
        plan(shapes)


def test_the_repository_has_adapter_and_image_encoder(release_ip_adapter: Path, tmp_path: Path) -> None:
    """The version is told by the class that the UNet's configuration names."""
    report = convert(release_ip_adapter, tmp_path, verify=True, variant="fp16")
    (repo,) = report.repos
    assert repo.name == "kandinsky-3-ip-adapter"
    assert not (repo / "model_index.json").exists()
    written, source = load_file(repo / "ip_adapter.safetensors"), load_file(release_ip_adapter / WEIGHTS)
    assert len(written) + len(report.dropped) == len(source)
    assert torch.equal(written["image_proj.proj.weight"], source["image_proj.weight"].half())
    assert report.verified[repo.name]["bit_identical_tensors"]["IPAdapter"] == len(written)
    folder = repo / "image_encoder"
    assert CLIPVisionModelWithProjection.from_pretrained(folder, variant="fp16").config.projection_dim
    assert CLIPImageProcessor.from_pretrained(folder).do_center_crop
    assert 'variant="fp16"' in (repo / "README.md").read_text()


def test_what_is_wrong_with_the_source_is_said(release_ip_adapter: Path, tmp_path: Path) -> None:
    source = shutil.copytree(release_ip_adapter, tmp_path / "source")
    (source / "image_processor" / "preprocessor_config.json").unlink()
    with pytest.raises(ConversionError, match="image_processor has no preprocessor_config"):
        convert(source, tmp_path / "out")
    shutil.rmtree(source / "image_encoder")
    with pytest.raises(ConversionError, match="image_encoder"):
        convert(source, tmp_path / "out")
    tensors = load_file(source / WEIGHTS)
    save_file({key: t for key, t in tensors.items() if ".processor." not in key}, source / WEIGHTS)
    with pytest.raises(ConversionError, match="is not the adapter"):
        convert(source, tmp_path / "out", version="3-ip-adapter")
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_it_is(release_ip_adapter: Path) -> None:
    (report,) = inspect(release_ip_adapter / WEIGHTS)
    assert (report.version, report.part) == ("3-ip-adapter", "adapter")


def test_the_record_names_sources_and_reasons(ip_adapter: Path) -> None:
    record = json.loads((ip_adapter / "conversion.json").read_text())
    assert {source["file"] for source in record["sources"].values()} == {WEIGHTS, "image_encoder/model.safetensors"}
    assert set(record["components"]["IPAdapter"]["dropped"].values()) == {
        "of the UNet that the adapter was trained with; it is loaded into the one of a pipeline"
    }
