"""The edge detector: against the formula of the published network, in any size, and from `ControlNetHED.pth`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard

from kandinsky_diffusers import KandinskyHEDDetector
from kandinsky_diffusers.conversion import convert, inspect, plan, releases
from kandinsky_diffusers.conversion.planning import expected_shapes
from kandinsky_diffusers.conversion.recipe import Release
from kandinsky_diffusers.k3.hed_weights import HED_FILE, HED_REPO
from tests.support.hed import TINY, published_shapes, random_weights
from tests.support.parity import MODULE, assert_close


PUBLISHED = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
RELEASE = Release("hed", "the edge detector alone", (HED_FILE,), (HED_REPO,))


def edges_of(weights: dict[str, torch.Tensor], picture: np.ndarray) -> np.ndarray:
    """What the published network makes of bytes `[height, width, 3]`, written down once more from its keys."""
    size = picture.shape[:2]
    features = torch.from_numpy(picture.copy()).float().permute(2, 0, 1)[None] - weights["norm"]
    votes = []
    for level in range(1, 6):
        if level > 1:
            features = F.max_pool2d(features, 2, 2)
        for layer in range(3):
            if f"block{level}.convs.{layer}.weight" in weights:
                name = f"block{level}.convs.{layer}"
                features = F.relu(F.conv2d(features, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1))
        name = f"block{level}.projection"
        vote = F.conv2d(features, weights[f"{name}.weight"], weights[f"{name}.bias"])
        votes.append(F.interpolate(vote, size, mode="bilinear", align_corners=False)[0, 0].numpy())
    return 1.0 / (1.0 + np.exp(-np.mean(votes, axis=0, dtype=np.float64)))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights()


@pytest.fixture(scope="module")
def repos(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder that a verified conversion has written, and its report."""
    source = tmp_path_factory.mktemp("annotators")
    torch.save(weights, source / "ControlNetHED.pth")
    output = tmp_path_factory.mktemp("repos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(releases.CONVERTIBLE, "hed", f"{__name__}:RELEASE")
        report = convert(source, output, version="hed", verify=True)
        (described,) = inspect(source)
    return output / HED_REPO.name, report, described


@pytest.fixture
def detector(repos: Any) -> KandinskyHEDDetector:
    return KandinskyHEDDetector.from_pretrained(repos[0])


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(64, 96), (33, 50), (16, 16)])
def test_edges_are_those_of_the_published_network(detector: Any, weights: Any, size: tuple[int, int]) -> None:
    picture = noise(*size)
    reference = edges_of(weights, picture)
    assert reference.std() > 0.05

    pixels = torch.from_numpy(picture).float().permute(2, 0, 1)[None] / 127.5 - 1.0
    with torch.no_grad():
        assert_close(detector.forward(pixels)[0, 0], reference, MODULE)
    edges = np.asarray(detector(PIL.Image.fromarray(picture))).astype(int)
    levels = np.abs(edges - (reference * 255.0).astype(int)[..., None])
    assert edges.shape == (*size, 3)
    assert levels.max() <= 1
    assert (levels == 0).mean() > 0.99


def test_safe_edges_have_three_levels(detector: Any) -> None:
    picture = PIL.Image.fromarray(noise(64, 64))
    edges, safe = np.asarray(detector(picture)), np.asarray(detector(picture, safe=True))
    assert set(np.unique(safe)) == {0, 127, 255}
    clear = np.minimum(edges % 85, 84 - edges % 85) > 1  # away from the thresholds, which are 85 apart
    assert (safe == (edges // 85 * 127.5).astype(int))[clear].all()


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (7, 3), (15, 16), (17, 31)])
def test_edges_are_as_large_as_the_picture(detector: Any, size: tuple[int, int]) -> None:
    edges = detector(PIL.Image.fromarray(noise(*size)))
    assert (edges.height, edges.width) == size


def test_a_list_may_mix_kinds_and_sizes_and_each_is_as_if_alone(detector: Any) -> None:
    picture = PIL.Image.fromarray(noise(20, 30))
    tensor = torch.from_numpy(noise(40, 24, seed=1)).permute(2, 0, 1)
    grey = PIL.Image.fromarray(noise(18, 18, seed=2)[..., 0])
    together = detector([picture, tensor, grey])
    assert [np.asarray(edges).shape for edges in together] == [(20, 30, 3), (40, 24, 3), (18, 18, 3)]
    for edges, alone in zip(together, (picture, tensor, grey), strict=True):
        assert np.array_equal(edges, detector(alone))
    batch = detector(np.stack([noise(20, 30), noise(20, 30, seed=3)]))
    assert np.array_equal(batch[0], together[0])
    assert len(batch) == 2


@pytest.mark.parametrize(
    ("image", "message"),
    [("cat.png", "`image` is a str"), ([], "`image` is an empty list"), (np.zeros((4, 4)), "`image` has the shape")],
)
def test_what_is_no_picture_is_refused(detector: Any, image: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        detector(image)


def test_levels_need_their_numbers_of_layers() -> None:
    with pytest.raises(ValueError, match="`layers_per_block` has 1 items"):
        KandinskyHEDDetector([4, 4], [1])


def test_group_offload_half_precision_and_compile_change_nothing_that_is_seen(detector: Any, repos: Any) -> None:
    picture = PIL.Image.fromarray(noise(32, 48))
    edges = np.asarray(detector(picture)).astype(int)
    half = KandinskyHEDDetector.from_pretrained(repos[0], torch_dtype=torch.bfloat16)
    assert np.abs(np.asarray(half(picture)).astype(int) - edges).max() <= 6
    detector.compile(fullgraph=True, backend="eager")
    assert np.array_equal(detector(picture), edges)
    offloaded = KandinskyHEDDetector.from_pretrained(repos[0])
    offloaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert np.array_equal(offloaded(picture), edges)


def test_a_saved_detector_is_the_same(detector: Any, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path)
    again = KandinskyHEDDetector.from_pretrained(tmp_path)
    picture = PIL.Image.fromarray(noise(24, 24))
    assert np.array_equal(again(picture), detector(picture))


# ------------------------------------------------------------------------------------------------ conversion
def test_the_repository_is_the_model_alone_with_card_and_record(repos: Any) -> None:
    folder, report, _ = repos
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "conversion.json",
        "diffusion_pytorch_model.safetensors",
    }
    check = report.verified[HED_REPO.name]
    assert check["bit_identical_tensors"] == {"KandinskyHEDDetector": len(published_shapes(TINY))}
    assert check["loaded_and_run"] == "KandinskyHEDDetector"
    card, facts = ModelCard.load(folder / "README.md"), json.loads((folder / "conversion.json").read_text())
    assert "controlnet" in card.data.tags
    assert facts["sources"]["hed_detector"]["sha256"] in card.text


def test_inspect_tells_the_file(repos: Any) -> None:
    assert repos[2].part == "hed_detector"


def test_the_published_layout_is_used_whole_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(releases.CONVERTIBLE, "hed", f"{__name__}:RELEASE")
    shapes = published_shapes(PUBLISHED)
    (model,) = plan(shapes, version="hed")
    assert not model.plan.dropped
    assert model.plan.inverse.target_shapes == shapes
    assert model.plan.target_shapes.keys() == model.model.state_dict().keys()
    assert sum(1 for key in shapes if key.endswith("weight")) == 13 + 5
    assert expected_shapes(model.model) == expected_shapes(KandinskyHEDDetector())
