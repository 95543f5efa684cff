"""MoVQ computes what stock's VQModel does, in slices, in tiles and offloaded."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import VQModel
from diffusers.models.attention_processor import SpatialNorm
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky_diffusers.components import adopt
from kandinsky_diffusers.measuring import peak_bytes
from kandinsky_diffusers.movq import AtLatentSize, LatentSizedNorm, MoVQ
from tests.support.parity import MODULE, assert_close


SCALE = 4  # pixels per latent pixel of the tiny model
TILE = 32


def random_vq(**config: Any) -> VQModel:
    sizes: dict[str, Any] = {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 50,
        "norm_type": "spatial",
    }
    model = VQModel(**{**sizes, **config}).eval()
    model.quantize.embedding.weight.data.normal_()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def stock() -> VQModel:
    torch.manual_seed(0)
    return random_vq()


@pytest.fixture
def movq(stock: VQModel) -> MoVQ:
    model = MoVQ.from_config(stock.config).eval().requires_grad_(False)
    model.load_state_dict(stock.state_dict())
    return model


def pixels(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, height, width) * 2 - 1


def latents(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, height, width)


def norms(model: VQModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, SpatialNorm)]


def assert_equals_stock(movq: MoVQ, stock: VQModel, image: torch.Tensor, code: torch.Tensor) -> None:
    assert torch.equal(movq.encode(image).latents, stock.encode(image).latents)
    for unquantized in (True, False):
        actual, expected = movq.decode(code, unquantized), stock.decode(code, unquantized)
        assert_close(actual.sample, expected.sample, MODULE)
        torch.testing.assert_close(actual.commit_loss, expected.commit_loss)
        assert torch.equal(movq.decode(code, unquantized, exact_reference=True).sample, expected.sample)


def test_equals_stock(movq: MoVQ, stock: VQModel) -> None:
    image, code = pixels(24, 40, 2), latents(6, 11, 2)
    assert_equals_stock(movq, stock, image, code)
    assert_close(movq(image).sample, stock(image).sample, MODULE)
    assert torch.equal(movq.encode(image, return_dict=False)[0], stock.encode(image).latents)
    assert torch.equal(movq.decode(code, return_dict=False, exact_reference=True)[0], stock.decode(code).sample)


def test_codebook_indices_are_decoded_as_in_stock() -> None:
    stock = random_vq(lookup_from_codebook=True)
    movq = adopt(stock)
    indices = torch.randint(0, 50, (1, 6, 5))
    expected = VQModel.decode(stock, indices, force_not_quantize=True, shape=(1, 6, 5, 4)).sample
    movq.enable_tiling(8)
    assert torch.equal(movq.decode(indices, force_not_quantize=True, shape=(1, 6, 5, 4)).sample, expected)


def test_quantizing_in_parts_changes_nothing(movq: MoVQ, stock: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kandinsky_diffusers.movq.QUANTIZED_AT_ONCE", 40)
    assert_equals_stock(movq, stock, pixels(8, 8), latents(9, 11, 2))


# ------------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("size", [(6, 11), (1, 5), (1, 1)])
def test_scale_and_shift_are_made_at_the_size_of_the_latents(movq: MoVQ, size: tuple[int, int]) -> None:
    code = latents(*size, 2)
    sizes, stretched = [], []
    convolutions = [conv for norm in norms(movq) for conv in (norm.conv_y, norm.conv_b)]
    for conv in convolutions:
        conv.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-2:]))
        conv.register_forward_hook(lambda module, inputs, output: stretched.append(output.shape[-2:]))
    movq.decode(code)
    assert sizes == stretched == [size] * len(convolutions)
    movq.decode(code, exact_reference=True)
    assert max(sizes) == (SCALE * size[0], SCALE * size[1])


def test_norms_in_any_layout(stock: VQModel) -> None:
    ours: Any = norms(adopt(deepcopy(stock)))[0]
    code = latents(3, 5, 2)
    for n in (1, 2, 4):
        picture = torch.randn(2, 64, 3 * n, 5 * n)
        expected = ours(picture, code)
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = picture.contiguous(memory_format=layout)
            normed = ours(laid_out, AtLatentSize(code))
            assert_close(normed, expected, MODULE)
            assert normed.stride() == laid_out.stride(), "the layers after it would run on another layout"


def test_the_stock_object_that_shares_the_layers_computes_as_ever(stock: VQModel) -> None:
    code = latents(6, 8)
    shared = deepcopy(stock)
    movq = adopt(shared)
    assert torch.equal(shared.decode(code).sample, stock.decode(code).sample)
    assert not torch.equal(movq.decode(code).sample, stock.decode(code).sample), "this would show nothing"


def test_a_stock_decoder_that_is_swapped_in_runs(movq: MoVQ, stock: VQModel) -> None:
    movq.decoder = deepcopy(stock.decoder)
    code = latents(6, 8)
    assert torch.equal(movq.decode(code).sample, stock.decode(code).sample)


@torch.no_grad()
def test_norms_copy_nothing_where_a_group_norm_changes_the_layout() -> None:
    """As on CUDA, where it takes and gives channels one after the other, whatever the layout was."""

    class OnCuda(torch.nn.GroupNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden.contiguous())

    norm = LatentSizedNorm(32, 4)
    norm.norm_layer = OnCuda(32, 32)
    hidden = torch.randn(1, 32, 64, 64).contiguous(memory_format=torch.channels_last)
    given = AtLatentSize(torch.randn(1, 4, 8, 8))
    assert norm(hidden, given).is_contiguous()
    assert peak_bytes(lambda: norm(hidden, given)) < 2.1 * hidden.nbytes


def test_norms_of_another_kind_stay() -> None:
    stock = random_vq(norm_type="group")
    code = latents(6, 8)
    expected = stock.decode(code).sample
    assert torch.equal(adopt(stock).decode(code).sample, expected)


def test_norms_compile_whole(movq: MoVQ) -> None:
    norm, picture, code = movq.decoder.conv_norm_out, torch.randn(1, 32, 6, 10), AtLatentSize(latents(3, 5))
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(picture, code), norm(picture, code))


def test_gradients_are_those_of_stock(movq: MoVQ, stock: VQModel) -> None:
    def gradient(model: VQModel) -> torch.Tensor:
        code = latents(6, 8).requires_grad_()
        return torch.autograd.grad(model.decode(code, force_not_quantize=True).sample.square().sum(), code)[0]

    torch.manual_seed(0)
    expected = gradient(stock)
    torch.manual_seed(0)
    assert_close(gradient(movq), expected, MODULE)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("widths", [(128, 256, 256, 512), (256, 512, 512, 1024)], ids=["2.x", "3.x"])
def test_decoding_needs_less_memory_than_in_stock_at_the_published_size(widths: tuple[int, ...]) -> None:
    with FakeTensorMode(), torch.no_grad():
        movq = MoVQ(
            block_out_channels=widths,
            down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
            layers_per_block=2,
            latent_channels=4,
            vq_embed_dim=4,
            norm_type="spatial",
        ).requires_grad_(False)
        code = torch.randn(1, 4, 256, 256)  # 2048 x 2048 pixels
        stock = peak_bytes(lambda: movq.decode(code, force_not_quantize=True, exact_reference=True))
        assert peak_bytes(lambda: movq.decode(code, force_not_quantize=True)) <= 0.61 * stock
        if widths[0] == 128:  # the same in the wider one, where it takes seconds more
            movq.enable_tiling(overlap=0)  # tiles of the default size; fewer of them, which takes less time here
            assert peak_bytes(lambda: movq.decode(code, force_not_quantize=True)) <= 0.16 * stock, "asked is 0.25"


# ------------------------------------------------------------------------------------------------ slices


def test_slicing_handles_one_picture_at_a_time(movq: MoVQ, monkeypatch: pytest.MonkeyPatch) -> None:
    image, code = pixels(16, 24, 3), latents(4, 6, 3)
    encoded, decoded = movq.encode(image).latents, movq.decode(code)
    movq.enable_slicing()
    batches = []
    for part in (movq.encoder, movq.decoder):
        part.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    torch.testing.assert_close(movq.encode(image).latents, encoded)
    torch.testing.assert_close(movq.decode(code).sample, decoded.sample)
    torch.testing.assert_close(movq.decode(code).commit_loss, decoded.commit_loss)
    assert set(batches) == {1}
    movq.disable_slicing()
    movq.encode(image)
    assert batches[-1] == 3


# ------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize("size", [(TILE, TILE), (TILE, 20), (7, TILE)])
def test_what_fits_into_a_tile_is_not_cut(movq: MoVQ, stock: VQModel, size: tuple[int, int]) -> None:
    movq.enable_tiling(TILE)
    assert_equals_stock(movq, stock, pixels(*size), latents(size[0] // SCALE, size[1] // SCALE))


@pytest.mark.parametrize("size", [(64, 32), (33, 70), (10, 130), (67, 65)])
def test_tiled_sizes_are_those_of_the_whole(movq: MoVQ, stock: VQModel, size: tuple[int, int]) -> None:
    image = pixels(*size)
    code = stock.encode(image).latents
    whole = stock.decode(code).sample
    for tile, overlap in itertools.product([TILE, 35, 16], [0.0, 0.25, 0.4]):
        movq.enable_tiling(tile, overlap)
        assert movq.encode(image).latents.shape == code.shape
        assert movq.decode(code).sample.shape == whole.shape


def test_encoded_tiles_are_independent(movq: MoVQ, stock: VQModel) -> None:
    image = pixels(40, 64, 2)
    movq.enable_tiling(TILE)
    tiled = movq.encode(image).latents
    for rows, latent_rows in ((slice(0, 32), slice(0, 8)), (slice(32, 40), slice(8, 10))):
        for columns, latent_columns in ((slice(0, 32), slice(0, 8)), (slice(32, 64), slice(8, 16))):
            alone = stock.encode(image[..., rows, columns]).latents
            torch.testing.assert_close(tiled[..., latent_rows, latent_columns], alone)


def test_decoded_tiles_fade_into_each_other(movq: MoVQ, stock: VQModel) -> None:
    code = latents(6, 14)  # tiles of 8, one every 6: columns 0 to 8, 6 to 14 and 12 to 14
    movq.enable_tiling(TILE, overlap=0.25)
    tiled = movq.decode(code, force_not_quantize=True).sample
    first, second, third = (
        stock.decode(code[..., left : left + 8], force_not_quantize=True).sample for left in (0, 6, 12)
    )
    torch.testing.assert_close(tiled[..., :24], first[..., :24])
    torch.testing.assert_close(tiled[..., 32:48], second[..., 8:24])
    for x in range(8):
        at_second = first[..., 24 + x] * (1 - x / 8) + second[..., x] * (x / 8)
        at_third = second[..., 24 + x] * (1 - x / 8) + third[..., x] * (x / 8)
        torch.testing.assert_close(tiled[..., 24 + x], at_second)
        torch.testing.assert_close(tiled[..., 48 + x], at_third)


def test_rows_of_tiles_fade_like_columns(movq: MoVQ) -> None:
    # a model whose convolutions are symmetric treats a turned picture like the picture
    for parameter in movq.parameters():
        if parameter.ndim == 4:
            parameter.data = (parameter + parameter.transpose(-1, -2)) / 2
    code = latents(10, 21)
    movq.enable_tiling(TILE)
    turned = movq.decode(code.transpose(-1, -2), force_not_quantize=True).sample.transpose(-1, -2)
    upright = movq.decode(code, force_not_quantize=True).sample
    assert turned.shape == upright.shape
    # only where four tiles meet does the order of fading show
    torch.testing.assert_close(turned[..., :24, :24], upright[..., :24, :24], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[..., 32:, 32:48], upright[..., 32:, 32:48], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[..., 24:32, :24], upright[..., 24:32, :24], atol=1e-4, rtol=1e-4)


def test_no_part_sees_more_than_a_tile(movq: MoVQ) -> None:
    movq.enable_tiling(TILE)
    seen = []
    movq.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(max(inputs[0].shape[-2:])))
    movq.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(max(inputs[0].shape[-2:]) * SCALE))
    movq(pixels(90, 70))
    assert max(seen) == TILE
    movq.disable_tiling()
    movq(pixels(90, 70))
    assert max(seen) == 90


def test_default_tile_is_that_of_kandisuperres(movq: MoVQ) -> None:
    movq.enable_tiling()
    assert (movq.tile_sample_min_size, movq.tile_overlap) == (1024, 0.25)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(3, 0.25, "tile_sample_min_size"), (32, 1.0, "overlap"), (32, -0.1, "overlap"), (4, 0.5, "overlap")],
)
def test_refuses_impossible_tiles(movq: MoVQ, tile: int, overlap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        movq.enable_tiling(tile, overlap)
    assert not movq.use_tiling


# ------------------------------------------------------------------------------------------------ offload, loading


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(level: str, movq: MoVQ, stock: VQModel, tmp_path: Path) -> None:
    movq.enable_group_offload(
        torch.device("cpu"), offload_type=level, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert_equals_stock(movq, stock, pixels(24, 32), latents(6, 8))


def test_sequential_offload(movq: MoVQ, stock: VQModel) -> None:
    cpu_offload(movq, torch.device("cpu"))
    assert movq.encoder.conv_in.weight.is_meta, "weights are there only while a layer runs"
    assert_equals_stock(movq, stock, pixels(24, 32), latents(6, 8))


def test_loads_from_a_stock_folder_without_a_warning(
    stock: VQModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock.save_pretrained(tmp_path)
    caplog.clear()
    movq = MoVQ.from_pretrained(tmp_path).requires_grad_(False)
    assert_equals_stock(movq, stock, pixels(24, 32), latents(6, 8))
    assert not caplog.records
