"""Records that describe a release: its files, the repositories made from them, and the components of these.

A family fills these records in; the engine reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .json_files import read_json
from .matching import Shapes
from .reader import RenamedFile, WeightFile
from .rules import RuleTable
from .smoke import load_pipeline


Config = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class SourceFile:
    """A weight file of a release.

    Args:
        name: how components refer to it.
        paths: where it may lie, below ``root``; the first that exists is taken.
        recognises: tells from keys and shapes whether a file is this one.
        root: ``"release"``, or the name of another folder, see :class:`Release`.
        names: names of the tensors, for a file that holds them without.
        renamed: how keys may begin, and what is put in the place of that; the first that fits counts.  None leaves the
            key to another source file with the same path.  So a dict in the file can be a source file of its own.
    """

    name: str
    paths: tuple[str, ...]
    recognises: Callable[[Shapes], bool]
    root: str = "release"
    names: tuple[str, ...] = ()
    renamed: Mapping[str, str | None] = field(default_factory=dict)

    def recognises_all(self, shapes: Shapes) -> bool:
        """Whether a file with these keys has this one in it."""
        return self.recognises({own: shapes[key] for own, key in self._own_names(shapes).items()})

    def view(self, file: WeightFile) -> WeightFile:
        """What of ``file`` is this one, under the names that rules use."""
        return RenamedFile(file, self._own_names(file.shapes)) if self.renamed else file

    def _own_names(self, keys: Iterable[str]) -> dict[str, str]:
        names: dict[str, str] = {}
        for key in keys:
            start = next((start for start in self.renamed if key.startswith(start)), "")
            new = self.renamed.get(start, "")
            if new is not None:
                names[new + key.removeprefix(start)] = key
        return names


@dataclass
class Inputs:
    """What a conversion has to work with.

    Args:
        folders: the roots of the source files that are there.
        files: the opened files, by name.
        original_config: settings of the original code that shapes do not tell; may be empty.
    """

    folders: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, WeightFile] = field(default_factory=dict)
    original_config: Config = field(default_factory=dict)

    def json(self, root: str, path: str) -> dict[str, Any]:
        """The JSON file ``path`` below ``root``, or an empty dict where there is none.

        Raises:
            ConversionError: it is not a JSON object.
        """
        file = self.folders[root] / path if root in self.folders else None
        return read_json(file) if file is not None and file.is_file() else {}

    def label(self, name: str) -> str:
        """How messages call the file ``name``: its path in the release, or its file name."""
        path, release = self.files[name].path, self.folders.get("release")
        if release is None or not path.is_relative_to(release):
            return path.name
        return path.relative_to(release).as_posix()

    def argument(self, file: str, name: str, default: Any) -> Any:
        """What the original configuration gives the constructor for a published file, or ``default``.

        Raises:
            ConversionError: it is of another kind than ``default``.
        """
        arguments = self.original_config.get(file)
        given = arguments.get(name, default) if isinstance(arguments, Mapping) else default
        return _like(default, given, name)

    def setting(self, path: str, default: Any) -> Any:
        """An entry of the original configuration, by a dotted path, or ``default``.

        Raises:
            ConversionError: it is of another kind than ``default``.
        """
        node: Any = self.original_config
        for name in path.split("."):
            if not isinstance(node, Mapping) or name not in node:
                return default
            node = node[name]
        return _like(default, node, path)


def _like(default: Any, given: Any, name: str) -> Any:
    kinds = (int, float) if isinstance(default, float) else type(default)
    if isinstance(given, bool) or not isinstance(given, kinds):
        raise ConversionError(f"original_config: {name} is {given!r:.80}; a number such as {default} is expected.")
    return given


@dataclass(frozen=True, eq=False)
class Part:
    """The share of one source file in a model: ``rules`` makes its table from the model's configuration."""

    file: str
    rules: Callable[[Config], RuleTable]


@dataclass(frozen=True, eq=False)
class Component:
    """A folder of a repository, and its entry ``[library, class_name]`` in ``model_index.json``.

    Args:
        name: the folder; empty for the repository's own, where the repository is that one model.
        library: as in ``model_index.json``; it may also be a pipeline folder of diffusers.
        class_name: likewise.
    """

    name: str
    library: str
    class_name: str

    @property
    def label(self) -> str:
        """How records and messages call it."""
        return self.name or self.class_name

    def entry(self, inputs: Inputs) -> list[str]:
        """Library and class, as ``model_index.json`` has them."""
        return [self.library, self.class_name]


@dataclass(frozen=True, eq=False)
class ModelComponent(Component):
    """A model made from weight files.

    Args:
        parts: its files; the first one tells the configuration.
        configure: the model's configuration from the shapes of the first part and the other inputs; None where the
            file that tells it is not among them.
        keep_float32: whether a ``variant`` leaves this model in float32.
        module: where the class lies, if not in the library.
    """

    parts: tuple[Part, ...] = ()
    configure: Callable[[Shapes, Inputs], dict[str, Any] | None] = lambda shapes, inputs: {}
    keep_float32: bool = False
    module: str = ""

    def load_class(self) -> Any:
        """The class."""
        folder = f"diffusers.pipelines.{self.library}"
        module = self.module or (folder if find_spec(folder) else self.library)
        return getattr(import_module(module), self.class_name)


@dataclass(frozen=True, eq=False)
class WeightsComponent(ModelComponent):
    """Weights that are no model of their own, such as an adapter's: a single file, without a configuration.

    Args:
        stem: its name without ending.
        shapes: key to shape of what it has to hold, from the configuration.
    """

    stem: str = "weights"
    shapes: Callable[[Config], Shapes] = lambda config: {}


@dataclass(frozen=True, eq=False)
class ConfigComponent(Component):
    """A scheduler or another object that a class can write from a ``config``.

    Args:
        config: arguments of the class.
        module: where the class lies.
        writer: the class, if it is another than the one that is to load what it writes.
    """

    config: Config = field(default_factory=dict)
    module: str = "diffusers"
    writer: str = ""

    def write(self, folder: Path) -> None:
        """Write the configuration of a fresh object."""
        cls = getattr(import_module(self.module), self.writer or self.class_name)
        cls(**self.config).save_pretrained(folder)


@dataclass(frozen=True, eq=False)
class FilesComponent(Component):
    """Small files that are copied or adapted: tokenizers, image processors, configurations.

    Args:
        write: fills the folder.
        check: raises :class:`ConversionError` when the files it needs are not there.
        named: the class, where the files tell it.
    """

    write: Callable[[Inputs, Path], None] = lambda inputs, folder: None
    check: Callable[[Inputs], None] = lambda inputs: None
    named: Callable[[Inputs], str] | None = None

    def entry(self, inputs: Inputs) -> list[str]:
        """Library and class, as ``model_index.json`` has them."""
        return [self.library, self.named(inputs) if self.named else self.class_name]


@dataclass(frozen=True, eq=False)
class Joined:
    """How a repository takes in another one, in the layout ``combined``.

    Args:
        repo: the name of the other.
        prefix: put before the names of its components.
        pipeline: class name of the pipeline that has the components of both.
        smoke: runs that pipeline once.
    """

    repo: str
    prefix: str
    pipeline: str
    smoke: Callable[[Any], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Repo:
    """A repository to write.

    Args:
        name: its folder.
        pipeline: class name of its pipeline; None where it is for other pipelines to load, and has no index.
        main: the source file without which this repository is left out.
        components: what ``model_index.json`` lists.
        smoke: runs what was loaded once, as small as possible, and returns the resulting tensors or arrays.
        extras: folders that it does not list.
        joined: the repository without which this one is of no use, if there is such a one.
        load: loads the written repository for ``smoke``, from its folder and the variant of its weights.
        settings: of the pipeline, beside its components in ``model_index.json``.
        optional: those of ``components`` that are left out together where a source file of one of them is missing.
    """

    name: str
    pipeline: str | None
    main: str
    components: tuple[Component, ...]
    smoke: Callable[[Any], Sequence[Any]]
    extras: tuple[Component, ...] = ()
    joined: Joined | None = None
    load: Callable[[Path, str | None], Any] = load_pipeline
    settings: Config = field(default_factory=dict)
    optional: tuple[Component, ...] = ()

    @property
    def models(self) -> list[ModelComponent]:
        """Its components that are made from weight files."""
        return _models(self.components)

    @property
    def optional_models(self) -> list[ModelComponent]:
        """Those of them that are optional."""
        return _models(self.optional)

    @property
    def without_optional(self) -> Repo:
        """It without its optional components."""
        return replace(self, components=tuple(c for c in self.components if c not in self.optional), optional=())


def _models(components: Iterable[Component]) -> list[ModelComponent]:
    return [component for component in components if isinstance(component, ModelComponent)]


@dataclass(frozen=True, eq=False)
class Release:
    """All that is known of a published release.

    Args:
        version: as in ``--version``.
        title: for messages and cards.
        files: its weight files.
        repos: what is made from them.
        roots: the folders that the files lie in, from the folder that the user gives; ``"release"`` is that folder.
        layout: ``split``, or ``combined``; see :mod:`.layout`.
        left_out: what may lie in the release without being converted, by its path, and why.
    """

    version: str
    title: str
    files: tuple[SourceFile, ...]
    repos: tuple[Repo, ...]
    roots: Callable[[Path], Mapping[str, Path]] = lambda folder: {"release": folder}
    layout: str = "split"
    left_out: Mapping[str, str] = field(default_factory=dict)

    def file(self, name: str) -> SourceFile:
        """The source file called ``name``."""
        return next(file for file in self.files if file.name == name)

    def recognise(self, shapes: Shapes) -> list[SourceFile]:
        """The files of this release that a file with these keys may be; see :meth:`parts_of` for all that is in it."""
        return [file for file in self.files if file.recognises_all(shapes)]

    def parts_of(self, file: WeightFile, chosen: SourceFile) -> dict[str, WeightFile]:
        """By name, what is in ``file`` if it is ``chosen``: this, and others that are published in the same file."""
        place = (chosen.root, chosen.paths)
        others = [other for other in self.recognise(file.shapes) if (other.root, other.paths) == place]
        return {source.name: source.view(file) for source in dict.fromkeys((chosen, *others))}

    @property
    def models(self) -> list[ModelComponent]:
        """Every model of any repository, once."""
        return list(dict.fromkeys(model for repo in self.repos for model in repo.models))
