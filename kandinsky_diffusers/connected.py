"""Combined pipelines: a prior and a decoder that act as one, and how a decoder's repo finds its prior."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .front_matter import read_front_matter
from .inputs import as_prompts, as_weights, beautified, check_counts
from .lora import KandinskyLoraMixin
from .options import Pictures
from .prior_call import check_mixable
from .step_cache import StepCacheMixin


LOADING_OPTIONS = (
    "cache_dir",
    "disable_mmap",
    "dtype",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "proxies",
    "token",
    "torch_dtype",
    "use_safetensors",
    "variant",
)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision")

EMBEDS = ("image_embeds", "negative_image_embeds")
PICTURES = ("image", "mask_image", "hint")
FOR_PRIOR = (
    "prompt",
    "negative_prompt",
    "negative_prior_prompt",
    "prompt_beautifier",
    "num_images_per_prompt",
    "generator",
)

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

_prior_is_given: ContextVar[bool] = ContextVar("prior_is_given", default=False)


class _LoadsConnectedPipes:
    """diffusers' `_load_connected_pipes`, off while we load a decoder whose prior we have found ourselves.

    Left on, diffusers would load what the card names even where a prior is given or lies beside the decoder.
    """

    def __get__(self, instance: Any, owner: type) -> bool:
        return not _prior_is_given.get()


@contextmanager
def _given_prior() -> Iterator[None]:
    token = _prior_is_given.set(True)
    try:
        yield
    finally:
        _prior_is_given.reset(token)


class ConnectedPriorMixin(StepCacheMixin, KandinskyLoraMixin):
    """Mixed in before a stock combined pipeline, whose components of the prior are named `prior_...`."""

    _load_connected_pipes = _LoadsConnectedPipes()
    _lora_loadable_modules: ClassVar = ["unet", "prior_prior"]
    _prior_class: type
    _decoder_class: type

    progress_bar = DiffusionPipeline.progress_bar
    set_progress_bar_config = DiffusionPipeline.set_progress_bar_config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, prior: Any = None, **kwargs: Any) -> Self:
        """Load a decoder's repo with its prior, or a repo that holds both.

        The prior is, in this order: `prior=` or `prior_...=` components, those in the repo itself, a sibling folder
        named like the decoder's with `-prior` at the end, the one under `prior:` in the repo's card.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the decoder.
            prior: a prior pipeline, or the folder or Hub id of one.
            kwargs: as for [`DiffusionPipeline.from_pretrained`].

        Raises:
            ValueError: no prior is found; the message says how to give one.
            OSError: the prior that was found cannot be loaded.
        """
        kwargs = {**cls._prior_components(pretrained_model_name_or_path, prior, kwargs), **kwargs}
        with _given_prior():
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _prior_components(cls, repo: Any, prior: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in cls._get_signature_keys(cls)[0] if name.startswith("prior_")]
        passed = {name.removeprefix("prior_"): kwargs[name] for name in names if name in kwargs}
        if len(passed) == len(names):
            return {}
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        if prior is None:
            index = cls.load_config(repo, **hub_options)
            if all(f"prior_{name}" in passed or name in index for name in names):
                return {}
            prior = find_prior(repo, **hub_options)
        if not isinstance(prior, DiffusionPipeline):
            options = {name: kwargs[name] for name in LOADING_OPTIONS if name in kwargs}
            prior = _load_prior(prior, repo, {**_dtypes_of_prior(options), **passed})
        return {f"prior_{name}": component for name, component in prior.components.items()}

    @property
    def prior_pipe(self) -> Any:
        """The prior pipeline, on this pipeline's components as they are now."""
        return self._inner("_prior_pipe", self._prior_class, prefix="prior_")

    @property
    def decoder_pipe(self) -> Any:
        """The decoder pipeline, on this pipeline's components as they are now."""
        return self._inner("_decoder_pipe", self._decoder_class, prefix="")

    @property
    def guidance_scale(self) -> float:
        """That of the decoder."""
        return self.decoder_pipe.guidance_scale

    @property
    def num_timesteps(self) -> int:
        """That of the decoder."""
        return self.decoder_pipe.num_timesteps

    def _draw(self, arguments: Mapping[str, Any]) -> Pictures:
        """Image embeddings from the prior, a picture from the decoder; nothing runs before all arguments are checked.

        The decoder's text side has no negative prompt: as in stock, and as the original's `negative_decoder_prompt`,
        the one given here is for the image embeddings.

        Args:
            arguments: of `__call__`, by their names. Those that begin with `prior_` are for the prior.
        """
        for_prior, for_decoder = self._plan(arguments)
        if (beautifier := arguments["prompt_beautifier"]) is not None:
            better = {"prompt": beautified(as_prompts(arguments["prompt"]), beautifier), "prompt_beautifier": None}
            for_prior |= better
            for_decoder |= {name: value for name, value in better.items() if name in for_decoder}
        embeds = self.prior_pipe(**for_prior)
        output = self.decoder_pipe(**for_decoder, **dict(zip(EMBEDS, embeds, strict=True)))
        self.maybe_free_model_hooks()
        return output

    def _plan(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments for the prior and for the decoder, checked; no model runs."""
        prior, decoder = self.prior_pipe, self.decoder_pipe
        check_counts(num_images_per_prompt=arguments["num_images_per_prompt"])
        prompts, each = len(as_prompts(arguments["prompt"])), arguments["num_images_per_prompt"]
        for_decoder = {name: value for name, value in arguments.items() if name in _parameters_of(decoder)}
        for_decoder.pop("negative_prompt", None)
        if "prompt" not in for_decoder:  # it counts embeddings, of which there is one for each picture
            for_decoder["num_images_per_prompt"] = 1
            pictures = {name: for_decoder[name] for name in PICTURES if name in for_decoder}
            for_decoder |= {name: _repeat_each(value, prompts, each) for name, value in pictures.items()}
        _check_decoder(decoder, for_decoder, prompts * each)

        own = {name.removeprefix("prior_"): arguments[name] for name in arguments if name.startswith("prior_")}
        for_prior = {name: arguments[name] for name in FOR_PRIOR} | own | {"return_dict": False}
        prior.check_call(**for_prior)
        return for_prior, for_decoder

    @torch.no_grad()
    def mix(
        self,
        images_and_prompts: Sequence[str | PIL.Image.Image | torch.Tensor],
        weights: Sequence[float] | Sequence[Sequence[float]],
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        return_dict: bool = True,
        **decoder_arguments: Any,
    ) -> Pictures:
        """Draw a mixture of prompts and pictures, or a series of mixtures (`mix_images` of the original).

        All pictures of a series start from the same noise, so that only the mixture changes from one to the next, and
        each is what its list of weights gives alone. `diffusers.utils.make_image_grid` puts them side by side.

        Args:
            images_and_prompts: what to mix, see [`PriorPipeline.interpolate`].
            weights: one for each of these, or a list of such lists for a series.
            negative_prior_prompt: see [`PriorPipeline.interpolate`].
            negative_prompt: likewise.
            num_images_per_prompt: pictures for each list of weights.
            generator: one, or one for each of these pictures.
            prior_guidance_scale: `guidance_scale` of the prior.
            prior_num_inference_steps: `num_inference_steps` of the prior.
            return_dict: return a tuple if False.
            decoder_arguments: all else that the decoder takes, `image` or `height` for example. A decoder with a text
                side gets the empty prompt, as in the original, if `prompt` is not given.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        prior, decoder = self.prior_pipe, self.decoder_pipe
        series = as_weights(weights, len(images_and_prompts))
        check_mixable(images_and_prompts)
        check_counts(num_images_per_prompt=num_images_per_prompt)
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        arguments = {**decoder_arguments, "generator": generator, "return_dict": False}
        if "prompt" in _parameters_of(decoder):
            arguments.setdefault("prompt", "")
        _check_decoder(decoder, arguments, num_images_per_prompt)

        embeds = prior.interpolate(
            images_and_prompts,
            series,
            num_images_per_prompt,
            prior_num_inference_steps,
            generator,
            negative_prior_prompt=negative_prior_prompt,
            negative_prompt=negative_prompt,
            guidance_scale=prior_guidance_scale,
        )
        generators = generator if isinstance(generator, list) else [generator]
        states = [each.get_state() for each in generators]
        parts = []
        for rows in zip(*(embeds[name].chunk(len(series)) for name in EMBEDS), strict=True):
            for each, state in zip(generators, states, strict=True):
                each.set_state(state)
            parts += decoder(**arguments, **dict(zip(EMBEDS, rows, strict=True)))
        self.maybe_free_model_hooks()
        images = _joined(parts)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _inner(self, attribute: str, pipeline_class: type, prefix: str) -> Any:
        names = pipeline_class._get_signature_keys(pipeline_class)[0]
        components = {name: getattr(self, prefix + name) for name in names}
        inner = self.__dict__.get(attribute)
        if inner is None:
            inner = self.__dict__[attribute] = pipeline_class(**components)
        for name, component in components.items():
            if getattr(inner, name) is not component:
                setattr(inner, name, component)
        if not prefix:  # the decoder's repo is this pipeline's, for the schedulers that lie beside its own
            inner.register_to_config(_name_or_path=self.config.get("_name_or_path"))
        inner.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return inner.exact_reference(self._exact_reference)


def components_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The components among the `locals()` of a pipeline's `__init__`."""
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}


def _parameters_of(pipeline: Any) -> Sequence[str]:
    return list(inspect.signature(type(pipeline).__call__).parameters)[1:]


def _check_decoder(decoder: Any, arguments: dict[str, Any], images: int) -> None:
    """Check what the decoder will be called with, when there are no embeddings yet."""
    embeds = dict.fromkeys(EMBEDS, torch.empty(images, decoder._embeds_width))
    decoder.check_call(**(arguments | embeds))


def _repeat_each(pictures: Any, prompts: int, times: int) -> Any:
    """Pictures of which there is one for each prompt, for several pictures of each."""
    if isinstance(pictures, (list, tuple)) and len(pictures) == prompts:
        return [picture for picture in pictures for _ in range(times)]
    if isinstance(pictures, torch.Tensor) and pictures.ndim == 4 and len(pictures) == prompts:
        return pictures.repeat_interleave(times, dim=0)
    if isinstance(pictures, np.ndarray) and pictures.ndim == 4 and len(pictures) == prompts:
        return pictures.repeat(times, axis=0)
    return pictures


def _joined(parts: list[Any]) -> Any:
    """Pictures of several calls: lists, arrays or tensors."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [picture for part in parts for picture in part]


def find_prior(repo: Any, **hub_options: Any) -> str:
    """Folder or Hub id of the prior that belongs to a decoder's repo: a sibling folder, or what its card names.

    Args:
        repo: folder or Hub id of the decoder.
        hub_options: `revision`, `token`, `cache_dir` and the like, for the card.

    Raises:
        ValueError: there is none.
    """
    folder = Path(repo)
    if folder.is_dir():
        found = _sibling(folder) or _named_by_card(folder / "README.md")
    else:
        found = _named_by_card_on_hub(repo, hub_options)
    if found is None:
        raise ValueError(
            f"{str(repo)!r} is a decoder and no prior was found for it. Give one with `prior=` (a prior pipeline, its"
            " folder or Hub id) or with `prior_...=` components; or put its folder beside the decoder's, named like"
            f" {_sibling_names(folder.name)[-1]!r}; or name it in the decoder's README.md: `prior: [name]`."
        )
    return str(found)


def _sibling_names(name: str) -> list[str]:
    """`kandinsky-2-1-inpaint` -> that with `-prior`, then `kandinsky-2-1-prior`; the version's numbers stay."""
    parts = name.split("-")
    names = ["-".join([*parts, "prior"])]
    while len(parts) > 1 and not parts[-1].isdigit():
        parts = parts[:-1]
        names.append("-".join([*parts, "prior"]))
    return names


def _sibling(folder: Path) -> Path | None:
    places = dict.fromkeys((folder.absolute(), folder.resolve()))  # a link has its siblings where it lies
    candidates = (place.parent / name for place in places for name in _sibling_names(place.name))
    return next((path for path in candidates if (path / "model_index.json").is_file()), None)


def _named_by_card(card: Path) -> str | None:
    if not card.is_file():
        return None
    named = read_front_matter(card).get("prior")
    first = next(iter(named), None) if isinstance(named, list) else named
    if first is not None and not isinstance(first, str):
        raise ValueError(f"{card} has a {type(first).__name__} as `prior`; accepted is a name, or a list of names.")
    return first or None


def _named_by_card_on_hub(repo: str, hub_options: dict[str, Any]) -> str | None:
    options = {name: value for name, value in hub_options.items() if name != "proxies"}
    try:
        named = _named_by_card(Path(hf_hub_download(repo, "README.md", **options)))
    except EntryNotFoundError:
        return None
    if named is not None and not _HUB_ID.fullmatch(named):
        raise ValueError(f"the card of {repo} names {named!r:.80} as `prior`; accepted is the id of a Hub repository.")
    return named


def _dtypes_of_prior(options: dict[str, Any]) -> dict[str, Any]:
    """Loading options for the prior: dtypes given by component lose their prefix."""
    renamed = dict(options)
    for name in ("dtype", "torch_dtype"):
        if isinstance(options.get(name), dict):
            renamed[name] = {
                key.removeprefix("prior_"): dtype
                for key, dtype in options[name].items()
                if key.startswith("prior_") or key == "default"
            }
    return renamed


def _load_prior(prior: Any, repo: Any, options: dict[str, Any]) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(str(prior), **options)
    except (OSError, ValueError) as error:
        raise OSError(
            f"The prior {str(prior)!r} of {str(repo)!r} cannot be loaded: {error}. `prior=` takes a prior pipeline,"
            " its folder or its Hub id."
        ) from error
