"""What setup.cfg says of other libraries.

Run as a module it prints pins for pip's `-c`: of the oldest versions that setup.cfg admits, or of torch alone, so that
pip takes the newest of the others.

    python -m tests.support.dependencies oldest | newest
"""

from __future__ import annotations

import sys
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[2]


def requirements(*extras: str) -> list[Requirement]:
    """What the package needs, and what these extras add."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lists = [settings["options"]["install_requires"], *(settings["options.extras_require"][name] for name in extras)]
    lines = [line for text in lists for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def lower_bound(requirement: Requirement) -> str:
    """The version after `>=`; every requirement has one."""
    (version,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    return version


def pins(end: str) -> list[str]:
    """Constraints that lead pip to the `oldest` or the `newest` versions; torch is that of constraints.txt in both."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = [line for line in constraints if line.startswith("torch==")]
    oldest = [f"{needed.name}=={lower_bound(needed)}" for needed in requirements("test") if needed.name != "torch"]
    return {"oldest": [*torch, *oldest], "newest": torch}[end]


if __name__ == "__main__":
    sys.stdout.write("\n".join(pins(sys.argv[1])) + "\n")
