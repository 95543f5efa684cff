"""Proof that a written repository is what its source was, or what another repository is, and that it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from .comparison import compare_models, compare_with_source
from .errors import ConversionError
from .hub_source import INDEX
from .json_files import read_json
from .layout import layouts_of
from .matching import LEFT_OUT
from .planning import ModelPlan, plan_models
from .recipe import Inputs, Repo
from .releases import guess_version, releases
from .reports import GOOD, ComponentReport, Verification
from .repository import RepoWriter
from .soundness import check_files, check_index, check_model, files_of, run_once
from .sources import SMALL_FILES, WEIGHT_ENDINGS, find_folder, find_for_planning, read_config
from .weight_sets import models_of, open_model, variant_of, weight_sets


_FILES = (*SMALL_FILES, *(f"*{ending}" for ending in WEIGHT_ENDINGS))
RECORD = "conversion.json"


# ------------------------------------------------------------------------------------------------ while converting
def verify_repo(repo: Repo, place: Path, writer: RepoWriter) -> dict[str, Any]:
    """Map every written tensor back, compare it with its source bit for bit, then load the repository and run it once.

    Returns:
        Per model the number of compared tensors, what was run, and size and SHA-256 of the written weight files.

    Raises:
        ConversionError: a tensor differs, or the repository does not load or run.
    """
    compared = {model.label: _proven(writer.plans[model], place / model.name, writer.inputs) for model in repo.models}
    ran = run_once(repo, place, writer.output.variant)
    return {"bit_identical_tensors": compared, "loaded_and_run": ran, "files": files_of(place)}


def _proven(plan: ModelPlan, place: Path, inputs: Inputs) -> int:
    """How many source tensors a written model has in it."""
    for tensor in compare_with_source(plan, open_model(place), inputs):
        if tensor.outcome not in GOOD:
            raise ConversionError(f"{place}: {tensor.key} differs from its source after writing.")
    return len(plan.plan.inverse.target_shapes)


# ------------------------------------------------------------------------------------------------ afterwards
def verify(
    repo: str | Path,
    against: str | Path | None = None,
    *,
    version: str = "auto",
    original_config: str | Path | Mapping[str, Any] | None = None,
    clip: str | Path | None = None,
    text_encoder: str | Path | None = None,
    refiner: str | Path | None = None,
    run: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Look whether a repository is sound; or compare it, tensor by tensor, with another one or with an original.

    Alone it is sound if every weight file can be read and is complete (header, size, checksums of pickled files, the
    index of several against these), all numbers are finite, everything that ``model_index.json`` lists is there, and
    it loads with ``from_pretrained`` in float32 and gives finite results once. Where ``conversion.json`` says how many
    tensors and parameters a model has, they are so many; where it says, after ``convert --verify``, what sizes and
    SHA-256 the files have, they have these.

    Compared with another repository it is equal if both have the same models (the folders with weights), these have
    the same names and shapes of tensors, and the tensors are equal, or equal after a cast as a variant is; see
    :func:`~.comparison.compare_models`. How the weights are stored does not matter: sharded or not, pickled or not.

    Compared with an original checkpoint it is equal if its tensors, mapped back with the inverse rules, are those of
    the checkpoint; see :func:`~.comparison.compare_with_source`. A file of the original is compared with the models
    that are made from it.

    Only tensors are compared: no configurations, tokenizers or cards. Nothing is written, no pickle is executed, and
    memory holds a tensor of each side at a time; only running takes as much as using the repository.

    Args:
        repo: folder or Hub id of a repository in the Hub's format, or the folder of one of its models.
        against: the same; or folder or Hub id of an original release, or a file of it.
        version: ``auto``, or the version of the original; with a version ``against`` is one, whatever it looks like.
        original_config: see :func:`~.engine.convert`, as are the next three; they are for comparing with an original.
        clip: folder or Hub id.
        text_encoder: folder or Hub id.
        refiner: folder or Hub id.
        run: whether to load and run the repository where it is compared with nothing.
        tell: called with a text that says what is being done.

    Raises:
        ConversionError: there is nothing to verify or to compare with. What is wrong with weights is in the result.
    """
    folder = find_folder(repo, "repo", _FILES)
    name = folder.resolve().name if Path(repo).is_dir() else Path(repo).name
    if against is None:
        return _check(str(repo), folder, name, run, tell)
    other = Path(against) if Path(against).is_file() else find_folder(against, "against", _FILES)
    known = _known(folder, name)
    if version == "auto" and not _is_original(other, known):
        return Verification(str(repo), str(against), tuple(_compare_repos(folder, other, tell)))
    if known is None:
        raise ConversionError(
            f"against is the original {against}, but neither {RECORD} nor its name tells that {repo} is a repository "
            "that a conversion writes."
        )
    companions = {"clip": clip, "text_encoder": text_encoder, "refiner": refiner}
    folders = {root: find_folder(place, root, _FILES) for root, place in companions.items() if place is not None}
    chosen = known.version if version == "auto" else version
    inputs = find_for_planning(other, chosen, folders, read_config(original_config)).inputs
    return Verification(str(repo), str(against), tuple(_compare_with_original(folder, known.repo, inputs, tell)))


class Known(NamedTuple):
    """A repository that a conversion writes, and the version that it is of."""

    version: str
    repo: Repo


def _all_known(folder: Path) -> list[Known]:
    """Those that have the pipeline which ``folder`` names."""
    pipeline = _pipeline(folder)
    every = (Known(known.version, repo) for one in releases() for known in layouts_of(one) for repo in known.repos)
    return [known for known in every if known.repo.pipeline == pipeline]


def _pipeline(folder: Path) -> str | None:
    return read_json(folder / INDEX).get("_class_name") if (folder / INDEX).is_file() else None


def _known(folder: Path, name: str) -> Known | None:
    """What ``folder`` is by its record, or by its name."""
    candidates = {known.repo.name: known for known in _all_known(folder)}
    return candidates.get(str(_record(folder).get("repository")), candidates.get(name))


def _record(folder: Path) -> dict[str, Any]:
    return read_json(folder / RECORD) if (folder / RECORD).is_file() else {}


def _recorded(folder: Path, *path: str) -> dict[str, dict[str, Any]]:
    """The objects in the object at ``path`` of the record; only what has this form, since the file may be anyone's."""
    found: Any = _record(folder)
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    items = found.items() if isinstance(found, dict) else ()
    return {name: facts for name, facts in items if isinstance(facts, dict)}


def _is_original(other: Path, known: Known | None) -> bool:
    if other.is_file():
        return True
    return known is not None and not (other / INDEX).is_file() and guess_version(other) is not None


# ------------------------------------------------------------------------------------------------ alone
def _check(title: str, folder: Path, name: str, run: bool, tell: Callable[[str], None]) -> Verification:
    known = _known(folder, name)
    labels = {model.name: model.label for model in known.repo.models} if known else {}
    recorded = _recorded(folder, "components")
    components: list[ComponentReport] = []
    for model, place in models_of(folder).items():
        tell(f"reading {place}")
        components += check_model(model or folder.name, place, recorded.get(labels.get(model, model), {}))
    problems = (*check_index(folder), *check_files(folder, _recorded(folder, "verification", "files")))
    report = Verification(title, None, tuple(components), problems)
    if not run or not report.passed:
        return report
    tell(f"running {folder}")
    return _run(report, folder, known)


def _run(report: Verification, folder: Path, known: Known | None) -> Verification:
    """The report, with what came out when the repository was loaded and, if one of ours is like it, run."""
    alike = known or next(iter(_all_known(folder)), None)
    pipeline = _pipeline(folder)
    if pipeline is None and known is None:
        return replace(report, notes=("not loaded: it has no model_index.json, and no conversion writes such a name",))
    repo = alike.repo if alike else Repo(report.repo, pipeline, "", (), smoke=lambda pipe: ())
    try:
        loaded = run_once(replace(repo, name=report.repo), folder, _variant(folder))
    except ConversionError as error:
        return replace(report, problems=(str(error),))
    if alike is None:
        return replace(report, notes=(f"loaded as {loaded}, but not run: no conversion writes such a pipeline",))
    return replace(report, loaded_and_run=loaded)


def _variant(folder: Path) -> str | None:
    """That of the weights, if there are none without."""
    best = (weight_sets(place)[0] for place in models_of(folder).values())
    return next(filter(None, map(variant_of, best)), None)


# ------------------------------------------------------------------------------------------------ with another
def _compare_repos(folder: Path, other: Path, tell: Callable[[str], None]) -> Iterator[ComponentReport]:
    ours, theirs = models_of(folder), models_of(other)
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in ours or name not in theirs:
            owner = folder if name in ours else other
            yield ComponentReport(name or owner.name, problems=(f"it is only in {owner}",))
        else:
            tell(f"comparing {ours[name]}")
            yield _compare_models(name or folder.name, ours[name], theirs[name])


def _compare_models(name: str, place: Path, other: Path) -> ComponentReport:
    try:
        return ComponentReport(name, tuple(compare_models(open_model(place), open_model(other))))
    except ConversionError as error:
        return ComponentReport(name, problems=(str(error),))


def _compare_with_original(
    folder: Path, repo: Repo, inputs: Inputs, tell: Callable[[str], None]
) -> Iterator[ComponentReport]:
    models = [model for model in repo.models if any(part.file in inputs.files for part in model.parts)]
    if not models:
        raise ConversionError(f"against holds nothing that {repo.name} is made from.")
    plans = {plan.component: plan for plan in plan_models(models, inputs, _left_out(folder, inputs))}
    for model in repo.models:
        if model not in plans:
            files = " and ".join(part.file for part in model.parts)
            yield ComponentReport(model.label, notes=(f"not compared: its source, {files}, is not there",))
        elif model in repo.optional_models and not (folder / model.name).is_dir():
            yield ComponentReport(model.label, notes=("not compared: the repository is one without it",))
        else:
            tell(f"comparing {folder / model.name}")
            yield _compare_with_source(folder / model.name, plans[model], inputs)


def _compare_with_source(place: Path, plan: ModelPlan, inputs: Inputs) -> ComponentReport:
    try:
        tensors = tuple(compare_with_source(plan, open_model(place), inputs))
    except ConversionError as error:
        return ComponentReport(plan.component.label, problems=(str(error),))
    return ComponentReport(plan.component.label, tensors, notes=plan.notes)


def _left_out(folder: Path, inputs: Inputs) -> list[str]:
    """Globs for the keys that were left out of the conversion with ``--drop``."""
    recorded = [facts.get("dropped") for facts in _recorded(folder, "components").values()]
    reasons = [pair for dropped in recorded if isinstance(dropped, dict) for pair in dropped.items()]
    keys = {key for key, reason in reasons if reason == LEFT_OUT}
    return sorted(escape(key) for file in inputs.files.values() for key in keys & file.shapes.keys())
