"""Which diffusers this package knows from the inside.

Imported before everything else of the package, so that another diffusers is named as the cause, and not some class
that it happens to lack.
"""

from __future__ import annotations

import diffusers
from packaging.specifiers import SpecifierSet


SUPPORTED_DIFFUSERS = SpecifierSet(">=0.42,<0.43")


class UnsupportedDiffusersError(ImportError):
    """The installed diffusers is not one that this package knows from the inside."""


def check_diffusers() -> None:
    """Compare the version of the installed diffusers with those that are supported.

    Raises:
        UnsupportedDiffusersError: it is outside the supported range.
    """
    if diffusers.__version__ not in SUPPORTED_DIFFUSERS:
        raise UnsupportedDiffusersError(
            f"kandinsky_diffusers supports diffusers {SUPPORTED_DIFFUSERS}, but {diffusers.__version__} is installed."
        )


check_diffusers()
