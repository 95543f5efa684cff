"""What every test gets: no network, fixed seeds, and a converted tiny release to work with."""

from __future__ import annotations

import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from tests.support.community22 import write_community
from tests.support.fake_hub import FakeHub
from tests.support.goldens import GoldenFamily, golden_family
from tests.support.processes import PythonProcess
from tests.support.release import build_release
from tests.support.shallow import shallow_3
from tests.support.tiny_repos import write_tiny_repos


Built = Callable[[str, Callable[[Path], Any]], Path]
Recorded = Callable[[str], Path]

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
FAMILIES_3 = {
    "3.0": "kandinsky-3.0",
    "3.1": "kandinsky-3.1",
    "3-controlnet": "kandinsky-3-controlnet",
    "3-ip-adapter": "kandinsky-3-ip-adapter",
    "3-lora": "kandinsky-3-lora",
    "superres": "kandisuperres",
}


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
def stock(on_hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonProcess]:
    """A Python process without this package; `hub` is the Hub for it."""
    process = PythonProcess(on_hub[0].environment(tmp_path_factory.mktemp("cache")), is_stock=True)
    yield process
    process.close()


@pytest.fixture(scope="session")
def on_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeHub, PythonProcess]]:
    """A Hub without repositories, and a process that fetches from it; use `hub` and `from_hub`."""
    with FakeHub({}, tmp_path_factory.mktemp("pushed")) as hub:
        process = PythonProcess(hub.environment(tmp_path_factory.mktemp("cache")))
        yield hub, process
        process.close()


@pytest.fixture
def hub(on_hub: tuple[FakeHub, PythonProcess]) -> FakeHub:
    """A Hub to which a test adds repositories."""
    hub = on_hub[0]
    hub.forget()
    hub.requests.clear()
    hub.fault = None
    return hub


@pytest.fixture
def from_hub(on_hub: tuple[FakeHub, PythonProcess]) -> PythonProcess:
    """A Python process for which `hub` is the Hub. Its cache is that of all tests: what has a name stays the same."""
    return on_hub[1]


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """`built(name, build)`: the folder that `build(folder)` has filled, once for all workers of a run. Read only."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if hasattr(request.config, "workerinput") else root) / "built"
    root.mkdir(exist_ok=True)

    def once(name: str, build: Callable[[Path], Any]) -> Path:
        done = root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                build(root / name)
                done.touch()
        return root / name

    return once


@pytest.fixture(scope="session")
def goldens_21() -> GoldenFamily:
    """The family `kandinsky-2.1` of the golden set in use."""
    return golden_family("kandinsky-2.1")


@pytest.fixture(scope="session")
def release_21(goldens_21: GoldenFamily, built: Built) -> Path:
    """A tiny Kandinsky 2.1 release with the published file names, and CLIP in its folder ``clip``. Read only."""
    return built("kandinsky-2.1", lambda folder: build_release(goldens_21.path, folder))


@pytest.fixture(scope="session")
def converted_21(goldens_21: GoldenFamily, release_21: Path, built: Built) -> Path:
    """The folder with the converted repositories of `release_21`. Read only: copy what a test changes."""
    return converted(
        built,
        release_21,
        version="2.1",
        clip=release_21 / "clip",
        original_config=goldens_21.path / "hyperparameters.json",
    )


@pytest.fixture(scope="session")
def config_21(goldens_21: GoldenFamily) -> Path:
    """The original's configuration of `release_21`."""
    return goldens_21.path / "hyperparameters.json"


@pytest.fixture(scope="session")
def prior_release(release_21: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest release: the prior, and CLIP in its folder ``clip``. Read only."""
    folder = tmp_path_factory.mktemp("release")
    for name in ("prior_fp16.ckpt", "ViT-L-14_stats.th"):
        shutil.copyfile(release_21 / name, folder / name)
    shutil.copytree(release_21 / "clip", folder / "clip")
    return folder


@pytest.fixture(scope="session")
def prior_in_shards(prior_release: Path, config_21: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prior's repository as ``convert --verify`` writes it, in several files for a model. Read only."""
    output = tmp_path_factory.mktemp("sharded")
    from kandinsky_diffusers.conversion import convert

    options: dict[str, Any] = {"original_config": config_21, "clip": prior_release / "clip"}
    convert(prior_release, output, max_shard_size="10KB", verify=True, **options)
    return output / "kandinsky-2-1-prior"


@pytest.fixture
def prior_repo(converted_21: Path, tmp_path: Path) -> Path:
    """A copy of the prior's repository, one file for a model."""
    return shutil.copytree(converted_21 / "kandinsky-2-1-prior", tmp_path / "kandinsky-2-1-prior")


@pytest.fixture(scope="session")
def goldens_20() -> GoldenFamily:
    """The family `kandinsky-2.0` of the golden set in use."""
    return golden_family("kandinsky-2.0")


@pytest.fixture(scope="session")
def release_20(goldens_20: GoldenFamily, built: Built) -> Path:
    """A tiny Kandinsky 2.0 release, and its VAE once more in ``variants``. Read only."""
    return built("kandinsky-2.0", lambda folder: build_release(goldens_20.path, folder))


@pytest.fixture(scope="session")
def converted_20(goldens_20: GoldenFamily, release_20: Path, built: Built) -> Path:
    """The folder with the converted repositories of `release_20`. Read only."""
    return converted(built, release_20, version="2.0", original_config=goldens_20.path / "hyperparameters.json")


@pytest.fixture(scope="session")
def community_22(built: Built) -> Path:
    """Tiny Kandinsky 2.2 repositories as the community's, see `write_community`. Read only."""
    return built("community-2.2", write_community)


@pytest.fixture(scope="session")
def converted_22(community_22: Path, built: Built) -> Path:
    """The folder with the converted repositories of `community_22`. Read only."""
    return converted(built, community_22, version="2.2")


@pytest.fixture(scope="session")
def goldens_30() -> GoldenFamily:
    """The family `kandinsky-3.0` of the golden set in use."""
    return golden_family("kandinsky-3.0")


@pytest.fixture(scope="session")
def goldens_31() -> GoldenFamily:
    """The family `kandinsky-3.1` of the golden set in use."""
    return golden_family("kandinsky-3.1")


@pytest.fixture(scope="session")
def release_30(built: Built) -> Path:
    """A tiny Kandinsky 3.0 release, and a whole T5 in its folder ``flan-ul2``. Read only."""
    return release_3(built, "3.0")


@pytest.fixture(scope="session")
def release_31(built: Built) -> Path:
    """A tiny Kandinsky 3.1 release. Read only."""
    return release_3(built, "3.1")


@pytest.fixture(scope="session")
def converted_30(built: Built) -> Path:
    """The folder with the converted repositories of `release_30`. Read only."""
    return converted_3(built, "3.0")


@pytest.fixture(scope="session")
def converted_31(built: Built) -> Path:
    """The folder with the converted repositories of `release_31`. Read only."""
    return converted_3(built, "3.1")


@pytest.fixture(scope="session")
def goldens_controlnet() -> GoldenFamily:
    """The family `kandinsky-3-controlnet` of the golden set in use."""
    return golden_family("kandinsky-3-controlnet")


@pytest.fixture(scope="session")
def release_controlnet(built: Built) -> Path:
    """A tiny ControlNet for the tiny Kandinsky 3.1, with that one's UNet beside it. Read only."""
    return release_3(built, "3-controlnet")


@pytest.fixture(scope="session")
def converted_controlnet(built: Built) -> Path:
    """The folder of the converted `release_controlnet`. Read only."""
    return converted_3(built, "3-controlnet") / "kandinsky-3-controlnet-hed"


@pytest.fixture(scope="session")
def release_ip_adapter(built: Built) -> Path:
    """A tiny IP-Adapter of 3.1 in the original's layout. Read only."""
    return release_3(built, "3-ip-adapter")


@pytest.fixture(scope="session")
def ip_adapter(built: Built) -> Path:
    """The converted repository of `release_ip_adapter`, a folder for `load_ip_adapter`. Read only."""
    return converted_3(built, "3-ip-adapter") / "kandinsky-3-ip-adapter"


@pytest.fixture(scope="session")
def goldens_lora() -> GoldenFamily:
    """The family `kandinsky-3-lora` of the golden set in use."""
    return golden_family("kandinsky-3-lora")


@pytest.fixture(scope="session")
def release_lora(built: Built) -> Path:
    """A tiny LoRA as the fork's training saves it. Read only."""
    return release_3(built, "3-lora")


@pytest.fixture(scope="session")
def converted_lora(built: Built) -> Path:
    """The folder with the converted repository of `release_lora`. Read only."""
    return converted_3(built, "3-lora")


@pytest.fixture(scope="session")
def goldens_superres() -> GoldenFamily:
    """The family `kandisuperres` of the golden set in use."""
    return golden_family("kandisuperres")


@pytest.fixture(scope="session")
def release_superres(built: Built) -> Path:
    """A tiny KandiSuperRes release. Read only."""
    return release_3(built, "superres")


@pytest.fixture(scope="session")
def converted_superres(built: Built) -> Path:
    """The folder with the converted repositories of `release_superres`, refined by `release_31`. Read only."""
    return converted_3(built, "superres")


@pytest.fixture(scope="session")
def tiny_repos(built: Built) -> Path:
    """The repositories of Kandinsky 3.1 and all that belongs to it, see `write_tiny_repos`. Read only."""
    return built("tiny-repos", write_tiny_repos)


@pytest.fixture(scope="session")
def recorded(built: Built) -> Recorded:
    """`recorded("3.1")`: as `converted_31`, in the sizes of the goldens, which parity needs. Read only."""
    return lambda version: converted_3(built, version, shallow=False)


def release_3(built: Built, version: str, *, shallow: bool = True) -> Path:
    """A tiny release of Kandinsky 3 or of what belongs to it; most tests need no more layers than if `shallow`."""
    family = golden_family(FAMILIES_3[version])
    name, change = (f"{family.path.name}-shallow", shallow_3) if shallow else (family.path.name, None)
    return built(name, lambda folder: build_release(family.path, folder, change))


def converted_3(built: Built, version: str, *, shallow: bool = True) -> Path:
    """The folder with the converted repositories of what `release_3` makes."""
    release = release_3(built, version, shallow=shallow)
    settings = golden_family(FAMILIES_3[version]).hyperparameters
    options: dict[str, Any] = {}
    match version:
        case "3.0":
            options = {"text_encoder": release / "flan-ul2", "original_config": settings}
        case "3.1":
            options = {"original_config": settings}
        case "3-lora":
            options = {"verify": True}
        case "superres":
            settings |= golden_family(FAMILIES_3["3.1"]).hyperparameters
            options = {"refiner": release_3(built, "3.1", shallow=shallow), "original_config": settings}
    return converted(built, release, version=version, **options)


def converted(built: Built, release: Path, *, version: str, **options: Any) -> Path:
    """The folder with the converted repositories of a release."""
    from kandinsky_diffusers.conversion import convert

    return built(f"{release.name}-repos", lambda folder: convert(release, folder, version=version, **options))
