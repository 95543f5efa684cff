"""What keeps the tree in shape: who may import whom, and what may be written where."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from diffusers import pipelines
from packaging.utils import canonicalize_name

from tests.support.dependencies import requirements


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kandinsky_diffusers"
FAMILIES = {"k20", "k21", "k22", "k3", "superres"}
ALLOWED_BETWEEN_FAMILIES = {("superres", "k3")}  # its refiner is the Flash UNet of 3.1
PRIVATE_TABLES = re.compile(r"SUPPORTED_TASKS_MAPPINGS|AUTO_\w+_PIPELINES_MAPPING|(LOADABLE|ALL_IMPORTABLE)_CLASSES")
OPTIONAL_LIBRARIES = {"peft", "xformers"}  # extras
MOST_LINES = 450
MOST_LINES_OF_A_SCRIPT = 30

MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "conversion_scripts").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))


def imported(path: Path) -> Iterator[str]:
    """Everything that a module imports, as absolute dotted names, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for such an expression, ``""`` for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    return ((dotted(node.func), node) for node in nodes(path) if isinstance(node, ast.Call))


def test_families_do_not_import_each_other() -> None:
    crossings = set()
    for family in FAMILIES:
        for path in (PACKAGE / family).rglob("*.py"):
            others = {name.split(".")[1] for name in imported(path) if name.startswith("kandinsky_diffusers.")}
            crossings |= {(family, other) for other in others & FAMILIES - {family}}

    assert crossings <= ALLOWED_BETWEEN_FAMILIES, "what two families need moves up into the package"


def test_the_conversion_engine_knows_no_family() -> None:
    engine = PACKAGE / "conversion"
    known = {name for path in engine.rglob("*.py") for name in imported(path) if FAMILIES & set(name.split("."))}

    assert not known


def reaches_into_diffusers(path: Path) -> Iterator[str]:
    for name in imported(path):
        if name.startswith("diffusers.") and (re.search(r"\._", name) or PRIVATE_TABLES.search(name)):
            yield f"imports {name}"
    for node in nodes(path):
        name = dotted(node)
        if PRIVATE_TABLES.search(name) or re.match(r"diffusers\.(.*\.)?_(?!_version__)", name):
            yield f"uses {name}"
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
        yield from (f"changes {dotted(t)}" for t in targets if dotted(t).startswith("diffusers."))
    for function, call in calls(path):
        if function in ("setattr", "delattr", "vars") and dotted(call.args[0]).split(".")[0] == "diffusers":
            yield f"calls {function} on diffusers"


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "registry.py"], ids=name_of)
def test_only_the_registry_touches_private_parts_of_diffusers(path: Path) -> None:
    assert not list(reaches_into_diffusers(path))


def test_no_folder_is_called_like_a_part_of_diffusers_pipelines() -> None:
    """Diffusers takes the parent folder of a component's module for a folder of its own if it has one so called."""
    folders = {path.parent.name for path in MODULES if path.parent != PACKAGE}

    assert not {folder for folder in folders if hasattr(pipelines, folder)}


def test_checkpoints_are_read_in_one_place() -> None:
    readers = {name_of(path) for path in MODULES for function, _ in calls(path) if function == "torch.load"}

    assert readers <= {"kandinsky_diffusers/conversion/torch_file.py"}


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_nothing_is_printed_or_loaded_loosely(path: Path) -> None:
    for function, call in calls(path):
        assert function != "print", f"line {call.lineno}: raise, return or log instead"
        for keyword in call.keywords:
            loose = keyword.arg == "strict" and isinstance(keyword.value, ast.Constant) and not keyword.value.value
            assert not loose, f"line {call.lineno}: strict=False hides what does not fit"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_conversion_scripts_stay_thin(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_SCRIPT


def test_every_imported_library_is_a_declared_dependency() -> None:
    """What another library happens to bring along is missing one day, or on another machine."""
    declared = {canonicalize_name(needed.name) for needed in requirements()}
    libraries = {name.split(".")[0] for path in MODULES for name in imported(path)}
    libraries -= sys.stdlib_module_names | {"kandinsky_diffusers"}
    installed = packages_distributions()

    missing = {name for name in libraries if declared.isdisjoint(map(canonicalize_name, installed.get(name, [])))}
    assert missing <= OPTIONAL_LIBRARIES


def test_files_stay_readable() -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*MODULES, *TESTS]}

    assert not {name: count for name, count in lines.items() if count > MOST_LINES}, "split by meaning"
