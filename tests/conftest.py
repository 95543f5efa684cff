"""How a test run is set up: the environment of its processes and their imports. Fixtures are in `fixtures.py`."""

from __future__ import annotations

import os


# read by the libraries when they are imported, so before any other import
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
from importlib.metadata import version

import pytest


UPSTREAM = ("torch", "diffusers", "transformers", "huggingface_hub", "accelerate", "safetensors", "peft")
COSTLY = {"on_hub", "stock", "ladder"}  # fixtures: processes with imports of their own, measurements


def pytest_configure(config: pytest.Config) -> None:
    """Spare the process that only hands out tests to others what their fixtures import, which takes seconds."""
    if config.option.dist == "no" or config.option.collectonly:
        gc.disable()  # until all is imported: nothing of that is garbage
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_report_header() -> str:
    """The versions that a run speaks of; `make drift` varies them."""
    return ", ".join(f"{name} {version(name)}" for name in UPSTREAM)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what needs something costly that is made for each worker: the first tests all go to one of them."""
    items.sort(key=lambda item: COSTLY.isdisjoint(getattr(item, "fixturenames", ())))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is imported, millions of objects: it takes a fifth of the time else."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
