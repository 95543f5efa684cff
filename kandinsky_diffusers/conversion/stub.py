"""Small modules that let diffusers load a repository where `kandinsky_diffusers` has not been imported.

diffusers runs ``pipeline.py`` when a user asks for it with ``custom_pipeline=repo, trust_remote_code=True``.  Before
that, of a repository on the Hub, it looks for a module beside each component whose library it does not know, here
``scheduler/kandinsky_diffusers.py`` for example; so there is one, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


LIBRARY = "kandinsky_diffusers"
PIPELINE_FILE = "pipeline.py"  # the name that diffusers looks for

# diffusers executes the files of several folders in one module, and takes the only pipeline class that is in it: with
# one name for all of them, the class of a prior gives way to that of its decoder.
_PIPELINE_NAME = "Pipeline"

_PIPELINE = '''\
"""Loads {repo} with diffusers where kandinsky_diffusers has not been imported:

DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
"""

try:
    from kandinsky_diffusers import {class_name} as {name}
except ModuleNotFoundError as error:
    raise ImportError(
        "{repo} needs a package that is not installed: pip install kandinsky-diffusers"
    ) from error

__all__ = ["{name}"]
'''

_COMPONENT = '''\
"""Where diffusers finds a class of kandinsky_diffusers that has not been imported; see ../pipeline.py."""

from kandinsky_diffusers import {class_name}

__all__ = ["{class_name}"]
'''


def write_stubs(folder: Path, repo: str, pipeline: str, components: Mapping[str, Sequence[str]]) -> None:
    """Write ``pipeline.py``, and a module beside each component whose class is one of this package.

    Args:
        folder: of the repository.
        repo: its name.
        pipeline: class name of its pipeline, which stays what ``model_index.json`` names.
        components: by name, library and class of each component.
    """
    stubs = {
        Path(PIPELINE_FILE): _PIPELINE.format(repo=repo, class_name=pipeline, name=_PIPELINE_NAME),
        **{
            Path(name, f"{LIBRARY}.py"): _COMPONENT.format(class_name=class_name)
            for name, (library, class_name) in components.items()
            if library == LIBRARY
        },
    }
    for path, text in stubs.items():
        (folder / path).write_text(text, encoding="utf-8")
