"""Model cards: templates, filled with the facts of a conversion, and the cards of pipelines that are pushed.

A template is a Markdown file with front matter. Its entry `layout` names the template whose blocks it fills in; along
the layouts front matter adds up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .front_matter import load_card


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from jinja2 import Environment, Template


CARDS = Path(__file__).parent / "model_cards"
HERE = "  # this folder, or its id on the Hub"
COPY = "## This copy\n"

# Layouts and parts are found by a loader, which `from_template` does not take: its template includes a loaded one.
CARD = "---\n{{ card_data }}\n---\n\n{% include body %}"

DECODERS_21 = {4: "kandinsky-2-1", 9: "kandinsky-2-1-inpaint"}
DECODERS_22 = {4: "kandinsky-2-2-decoder", 8: "kandinsky-2-2-controlnet-depth", 9: "kandinsky-2-2-decoder-inpaint"}
# Class of the scheduler, or an ancestor of the pipeline -> channels that the UNet sees (0 without one) -> card.
# A mask makes nine of four channels, a depth map eight.
CARDS_BY_CHANNELS: dict[str, dict[int, str]] = {
    "Kandinsky3FlashScheduler": {4: "kandinsky-3-1-flash", 6: "kandisuperres-flash-x2", 9: "kandinsky-3-1-inpaint"},
    "Kandinsky3AncestralScheduler": {4: "kandinsky-3-1", 9: "kandinsky-3-1-inpaint"},
    "Kandinsky3Pipeline": {4: "kandinsky-3", 9: "kandinsky-3-inpaint"},
    "KandinskyV20Pipeline": {4: "kandinsky-2-0", 9: "kandinsky-2-0-inpaint"},
    "KandinskyPipeline": DECODERS_21,
    "KandinskyCombinedPipeline": DECODERS_21,
    "KandinskyPriorPipeline": {0: "kandinsky-2-1-prior"},
    "KandinskyV22Pipeline": DECODERS_22,
    "KandinskyV22CombinedPipeline": DECODERS_22,
    "KandinskyV22PriorPipeline": {0: "kandinsky-2-2-prior"},
    "KandinskyV22PriorEmb2EmbPipeline": {0: "kandinsky-2-2-prior"},
}
SUPERRES_CARDS = {2: "kandisuperres-x2", 4: "kandisuperres-x4"}  # by scale


def versions() -> dict[str, str]:
    """Of this package (``unknown`` for a source tree that is not installed) and of what it builds on."""
    return {name: _version(name) for name in ("kandinsky-diffusers", "diffusers", "transformers", "torch")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


# ------------------------------------------------------------------------------------------------ from templates
def render_card(name: str, facts: Mapping[str, Any]) -> ModelCard:
    """The card of a repository, from ``model_cards/<name>.md`` and the facts of ``conversion.json``.

    Raises:
        FileNotFoundError: there is no card of that name.
    """
    if not (CARDS / f"{name}.md").is_file():
        raise FileNotFoundError(f"there is no model card {name}.md in {CARDS}")
    data = _front_matter(f"{name}.md")
    if facts["options"]["layout"] == "combined":
        data.pop("prior", None)
    dropped = {key: reason for model in facts["components"].values() for key, reason in model["dropped"].items()}
    return ModelCard.from_template(
        ModelCardData(**data),
        template_str=CARD,
        body=_template(f"{name}.md"),
        facts=facts,
        dropped=by_reason(dropped),
        loading=_loading_options(facts["options"]["variant"]),
    )


def by_reason(dropped: Mapping[str, str]) -> dict[str, str]:
    """For each reason which keys were left out, in words: up to three by name, of more the number and the first.

    Args:
        dropped: key to reason.
    """
    groups: dict[str, list[str]] = {}
    for key, reason in dropped.items():
        groups.setdefault(reason, []).append(f"`{key}`")
    return {
        reason: ", ".join(keys) if len(keys) <= 3 else f"{len(keys)} tensors such as {keys[0]}"
        for reason, keys in groups.items()
    }


def _template(name: str) -> Template:
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(_source),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the cards are Markdown
    )


def _source(name: str) -> str:
    """The text of a template without front matter, which says what it extends."""
    text = (CARDS / name).read_text(encoding="utf-8")
    if not text.startswith("---\n"):
        return text  # a part that others include
    card = ModelCard(text)
    layout = card.data.get("layout")
    return f'{{% extends "{layout}" %}}\n{card.text}' if layout else card.text


def _front_matter(name: str) -> dict[str, Any]:
    own = ModelCard.load(CARDS / name).data.to_dict()
    layout = own.pop("layout", None)
    common = _front_matter(layout) if layout else {}
    return {**common, **own, "tags": [*common.get("tags", ()), *own.get("tags", ())]}


def _loading_options(variant: str | None) -> str:
    """What the examples of a card pass to ``from_pretrained``."""
    dtype = "bfloat16" if variant == "bf16" else "float16"
    return f"torch_dtype=torch.{dtype}" + (f', variant="{variant}"' if variant else "")


# ------------------------------------------------------------------------------------------------ for a push
def renamed(card: ModelCard, ids: Mapping[str, str]) -> ModelCard:
    """The card with other ids for repositories: in its examples, its links and its list `prior:`.

    `base_model` stays, for it says where the weights come from.

    Args:
        card: is not changed.
        ids: repository -> its id on the Hub from now on. A repository is an id, or a name such as ``kandinsky-2-1``,
            which stands for that folder, and for repositories of that name in every namespace.
    """
    changed = ModelCard(str(card))
    for name, new in ids.items():
        old = re.escape(name) if "/" in name else rf"(?:[\w.-]+/)?{re.escape(name)}"
        text = re.sub(rf"([\"']){old}\1([,)]*)(?:{HERE})?", rf"\g<1>{new}\1\2", changed.text)
        changed.text = re.sub(rf"huggingface\.co/{old}(?![\w./-])", f"huggingface.co/{new}", text)
    if priors := _listed(card.data.get("prior")):
        changed.data["prior"] = [ids.get(prior) or ids.get(prior.split("/")[-1], prior) for prior in priors]
    return changed


def pipeline_card(
    pipeline: DiffusionPipeline, repo_id: str, *, variant: str | None = None, token: bool | str | None = None
) -> ModelCard:
    """The card for a pipeline that is pushed, with which AutoPipelines load the repository.

    If the repository that the pipeline was loaded from has a card, its text and front matter are kept: what has to be
    another in the new repository is corrected, and a section says of what this is a copy. Otherwise it is the card of
    the converted repository with such models.

    The card of a decoder names a prior, the one that the other card names or else the community's; that of a pipeline
    with its prior inside names none.

    Args:
        pipeline: one of this package, or of a subclass.
        repo_id: the new repository.
        variant: in the names of its weight files.
        token: to read the other card, if that is on the Hub.

    Raises:
        TypeError: `pipeline` is no pipeline of this package.
    """
    name, source = _card_name(pipeline), str(pipeline.config.get("_name_or_path") or "")
    facts = _facts_of(pipeline, name, variant)
    fresh, kept = render_card(name, facts), _card_of(source, token)
    if "controlnet" in facts["components"]:
        fresh.data.tags.append("controlnet")
    card = kept or ModelCard(str(fresh))
    own_names = {name: repo_id}
    if _is_hub_id(source):
        own_names[source] = repo_id
        card.data.base_model = source
    if kept is not None:
        own_names |= dict.fromkeys(_names_itself(kept), repo_id)
        _correct(kept, fresh, facts)
    copied = {"source": _shown(source), "is_kept": kept is not None}
    described = _template("_copy.md").render(facts=facts, repo_id=repo_id, **copied)
    card.text = f"{card.text.rstrip()}\n\n{COPY}\n{described}"
    return renamed(card, own_names)


def _card_name(pipeline: DiffusionPipeline) -> str:
    """Of the converted repository that has such models."""
    ancestors = [cls.__name__ for cls in type(pipeline).__mro__]
    scheduler, unet = type(getattr(pipeline, "scheduler", None)).__name__, getattr(pipeline, "unet", None)
    cards = next((CARDS_BY_CHANNELS[key] for key in (scheduler, *ancestors) if key in CARDS_BY_CHANNELS), None)
    if cards is None and "KandiSuperResPipeline" in ancestors:
        return SUPERRES_CARDS.get(pipeline.config["scale"], SUPERRES_CARDS[4])
    if cards is None:
        raise TypeError(f"`pipeline` is a {ancestors[0]}; accepted are pipelines of kandinsky_diffusers.")
    return cards.get(0 if unet is None else unet.config.in_channels, next(iter(cards.values())))


def _facts_of(pipeline: DiffusionPipeline, name: str, variant: str | None) -> dict[str, Any]:
    """What of the facts of a conversion is known of a pipeline."""
    cls, has_prior = type(pipeline), any(component.startswith("prior_") for component in pipeline.components)
    return {
        "repository": name,
        "options": {"layout": "combined" if has_prior else "split", "variant": variant},
        "components": {name: {"dropped": {}} for name, part in pipeline.components.items() if part is not None},
        "pipeline": {"class": cls.__name__, "is_ours": cls.__module__.split(".")[0] == __package__},
        "versions": versions(),
    }


def _correct(kept: ModelCard, fresh: ModelCard, facts: Mapping[str, Any]) -> None:
    """Make of the card of one repository that of another with such models."""
    kept.data.library_name = fresh.data.library_name
    kept.data.pipeline_tag = kept.data.pipeline_tag or fresh.data.pipeline_tag
    priors = [prior for prior in _listed(kept.data.get("prior")) if _is_hub_id(prior)]
    kept.data["prior"] = fresh.data.get("prior") and (priors or fresh.data.get("prior"))
    # a pipeline that has been given a ControlNet is not called as the card says
    has_other_inputs = "controlnet" in fresh.data.tags and "controlnet" not in _listed(kept.data.tags)
    text = fresh.text if has_other_inputs else kept.text.split(COPY)[0]
    text = re.sub(r"torch_dtype=torch\.\w+(, variant=\"\w+\")?", _loading_options(facts["options"]["variant"]), text)
    text = re.sub(r"^## Without an import\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)  # is not saved
    where = {layout: _template("_prior.md").render(layout=layout) for layout in ("split", "combined")}
    for said in where.values():
        text = text.replace(said, where[facts["options"]["layout"]])
    kept.text = text
    kept.data.tags = list(dict.fromkeys([*_listed(kept.data.tags), *fresh.data.tags]))


def _card_of(source: str, token: bool | str | None) -> ModelCard | None:
    """The card of a folder, or of a repository on the Hub, if it can be read."""
    if not source:
        return None
    card = Path(source, "README.md")
    if not Path(source).is_dir():
        try:
            card = Path(hf_hub_download(source, "README.md", token=token))
        except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
            return None
    return load_card(card) if card.is_file() else None


def _names_itself(card: ModelCard) -> list[str]:
    """The id under which a card was pushed before, if it tells."""
    return re.findall(rf"^{COPY}\n`(.+?)`", card.text, re.MULTILINE)


def _shown(source: str) -> str:
    """Where a pipeline comes from, without the path of a folder."""
    return source if _is_hub_id(source) else Path(source).name


def _is_hub_id(name: str) -> bool:
    if "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _listed(value: Any) -> list[Any]:
    """What front matter may hold as a list, as one value, or not at all."""
    return value if isinstance(value, list) else [] if value is None else [value]
