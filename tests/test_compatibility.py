"""The versions of other libraries: what is stated of them is the same everywhere, and another diffusers is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from kandinsky_diffusers.compatibility import SUPPORTED_DIFFUSERS
from tests.support.dependencies import pins, requirements


ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = {needed.name: needed for needed in requirements("test")}


def test_setup_cfg_states_the_diffusers_that_the_package_accepts() -> None:
    assert REQUIREMENTS["diffusers"].specifier == SUPPORTED_DIFFUSERS


@pytest.mark.parametrize("name", ["diffusers", "transformers", "huggingface_hub"])
def test_the_readme_states_the_range_of_setup_cfg(name: str) -> None:
    stated = re.findall(rf"`{name}(>=[\d.]+,<[\d.]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))

    assert [SpecifierSet(text) for text in stated] == [REQUIREMENTS[name].specifier]


def test_make_and_ci_install_versions_that_setup_cfg_admits() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pinned.items()}

    refused = [str(it) for it in REQUIREMENTS.values() if versions[canonicalize_name(it.name)] not in it.specifier]
    assert not refused


def test_the_oldest_environment_has_every_lower_bound_of_setup_cfg() -> None:
    torch, *others = pins("oldest")

    assert [torch] == pins("newest")
    assert len(others) == len(REQUIREMENTS) - 1
    stated = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert all(pin.replace("==", ">=") in stated for pin in others)


IMPORT_WITH_ANOTHER_DIFFUSERS = """
import sys, types
sys.modules["diffusers"] = types.ModuleType("diffusers")  # without a single class
sys.modules["diffusers"].__version__ = sys.argv[1]
import kandinsky_diffusers
"""


@pytest.mark.parametrize("version", ["0.41.0", "0.43.0", "0.43.0.dev0"])
def test_another_diffusers_is_named_before_anything_is_missing(version: str) -> None:
    command = [sys.executable, "-c", IMPORT_WITH_ANOTHER_DIFFUSERS, version]
    error = subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert f"supports diffusers {SUPPORTED_DIFFUSERS}, but {version} is installed" in error.splitlines()[-1]
