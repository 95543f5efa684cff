"""What every test gets: no network, fixed seeds, few threads, and a converted tiny release to work with."""

from __future__ import annotations

import os


# read by the libraries when they are imported, so before any other import
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.goldens import GoldenFamily, golden_family
from tests.support.release import build_release
from tests.support.stock import StockProcess


LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Turn every attempt to leave this machine into an error (tests of the Hub run a server on 127.0.0.1)."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise RuntimeError(f"a test tried to reach {address}; tests use this machine alone")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", connect_locally)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same state of the global random generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stock() -> Iterator[StockProcess]:
    """A Python process without this package."""
    process = StockProcess()
    yield process
    process.close()


@pytest.fixture(scope="session")
def goldens_21() -> GoldenFamily:
    """The family `kandinsky-2.1` of the golden set in use."""
    return golden_family("kandinsky-2.1")


@pytest.fixture(scope="session")
def release_21(goldens_21: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kandinsky 2.1 release with the published file names, and CLIP in its folder ``clip``. Read only."""
    return build_release(goldens_21.path, tmp_path_factory.mktemp("release") / "kandinsky-2.1")


@pytest.fixture(scope="session")
def converted_21(goldens_21: GoldenFamily, release_21: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the converted repositories of `release_21`. Read only: copy what a test changes."""
    from kandinsky_diffusers.conversion import convert

    output = tmp_path_factory.mktemp("repos")
    convert(
        release_21,
        output,
        version="2.1",
        clip=release_21 / "clip",
        original_config=goldens_21.path / "hyperparameters.json",
    )
    return output


@pytest.fixture(scope="session")
def goldens_20() -> GoldenFamily:
    """The family `kandinsky-2.0` of the golden set in use."""
    return golden_family("kandinsky-2.0")


@pytest.fixture(scope="session")
def release_20(goldens_20: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kandinsky 2.0 release, and its VAE once more in ``variants``. Read only."""
    return build_release(goldens_20.path, tmp_path_factory.mktemp("release") / "kandinsky-2.0")


@pytest.fixture(scope="session")
def converted_20(goldens_20: GoldenFamily, release_20: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the converted repositories of `release_20`. Read only."""
    from kandinsky_diffusers.conversion import convert

    output = tmp_path_factory.mktemp("repos")
    convert(release_20, output, version="2.0", original_config=goldens_20.path / "hyperparameters.json")
    return output


@pytest.fixture(scope="session")
def goldens_30() -> GoldenFamily:
    """The family `kandinsky-3.0` of the golden set in use."""
    return golden_family("kandinsky-3.0")


@pytest.fixture(scope="session")
def goldens_31() -> GoldenFamily:
    """The family `kandinsky-3.1` of the golden set in use."""
    return golden_family("kandinsky-3.1")


@pytest.fixture(scope="session")
def release_30(goldens_30: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kandinsky 3.0 release, and a whole T5 in its folder ``flan-ul2``. Read only."""
    return build_release(goldens_30.path, tmp_path_factory.mktemp("release") / "kandinsky-3.0")


@pytest.fixture(scope="session")
def release_31(goldens_31: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kandinsky 3.1 release. Read only."""
    return build_release(goldens_31.path, tmp_path_factory.mktemp("release") / "kandinsky-3.1")


@pytest.fixture(scope="session")
def release_ip_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny IP-Adapter of 3.1 in the original's layout. Read only."""
    goldens = golden_family("kandinsky-3-ip-adapter")
    return build_release(goldens.path, tmp_path_factory.mktemp("release") / "ip-adapter")


@pytest.fixture(scope="session")
def ip_adapter(release_ip_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted repository of `release_ip_adapter`, a folder for `load_ip_adapter`. Read only."""
    from kandinsky_diffusers.conversion import convert

    (repo,) = convert(release_ip_adapter, tmp_path_factory.mktemp("repos")).repos
    return repo


@pytest.fixture(scope="session")
def converted_30(goldens_30: GoldenFamily, release_30: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the converted repositories of `release_30`. Read only."""
    from kandinsky_diffusers.conversion import convert

    output = tmp_path_factory.mktemp("repos")
    config = goldens_30.path / "hyperparameters.json"
    convert(release_30, output, version="3.0", text_encoder=release_30 / "flan-ul2", original_config=config)
    return output


@pytest.fixture(scope="session")
def converted_31(goldens_31: GoldenFamily, release_31: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the converted repositories of `release_31`. Read only."""
    from kandinsky_diffusers.conversion import convert

    output = tmp_path_factory.mktemp("repos")
    convert(release_31, output, version="3.1", original_config=goldens_31.path / "hyperparameters.json")
    return output


@pytest.fixture(scope="session")
def goldens_controlnet() -> GoldenFamily:
    """The family `kandinsky-3-controlnet` of the golden set in use."""
    return golden_family("kandinsky-3-controlnet")


@pytest.fixture(scope="session")
def release_controlnet(goldens_controlnet: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ControlNet for the tiny Kandinsky 3.1, with that one's UNet beside it. Read only."""
    return build_release(goldens_controlnet.path, tmp_path_factory.mktemp("release") / "kandinsky-3-controlnet")


@pytest.fixture(scope="session")
def converted_controlnet(release_controlnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the converted `release_controlnet`. Read only."""
    from kandinsky_diffusers.conversion import convert

    output = tmp_path_factory.mktemp("repos")
    convert(release_controlnet, output, version="3-controlnet")
    return output / "kandinsky-3-controlnet-hed"


@pytest.fixture(scope="session")
def goldens_lora() -> GoldenFamily:
    """The family `kandinsky-3-lora` of the golden set in use."""
    return golden_family("kandinsky-3-lora")


@pytest.fixture(scope="session")
def release_lora(goldens_lora: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LoRA as the fork's training saves it. Read only."""
    return build_release(goldens_lora.path, tmp_path_factory.mktemp("release") / "kandinsky-3-lora")


@pytest.fixture(scope="session")
def converted_lora(release_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the converted repository of `release_lora`. Read only."""
    from kandinsky_diffusers.conversion import convert

    output = tmp_path_factory.mktemp("repos")
    convert(release_lora, output, version="3-lora", verify=True)
    return output


@pytest.fixture(scope="session")
def goldens_superres() -> GoldenFamily:
    """The family `kandisuperres` of the golden set in use."""
    return golden_family("kandisuperres")


@pytest.fixture(scope="session")
def release_superres(goldens_superres: GoldenFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny KandiSuperRes release. Read only."""
    return build_release(goldens_superres.path, tmp_path_factory.mktemp("release") / "kandisuperres")


@pytest.fixture(scope="session")
def converted_superres(
    goldens_superres: GoldenFamily,
    goldens_31: GoldenFamily,
    release_superres: Path,
    release_31: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder with the converted repositories of `release_superres`, refined by `release_31`. Read only."""
    from kandinsky_diffusers.conversion import convert

    output = tmp_path_factory.mktemp("repos")
    config = {**goldens_31.hyperparameters, **goldens_superres.hyperparameters}
    convert(release_superres, output, version="superres", refiner=release_31, original_config=config)
    return output
