"""The released Kandinsky 2.2: community repositories in the Hub's format, partly pickled, as data.

There is no other original.  The source is one such repository or a folder that holds several, under any names: what a
repository is for is told by its ``model_index.json`` and, for decoders, by the configuration of their UNet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..clip_weights import half_rules
from ..conversion import smoke
from ..conversion.errors import ConversionError
from ..conversion.files import copy_clip_image_processor, copy_tokenizer, image_processor_check, tokenizer_check
from ..conversion.hub_source import copied_scheduler, find_pipelines, published_config, weight_paths
from ..conversion.json_files import read_json
from ..conversion.matching import Shapes
from ..conversion.recipe import Config, FilesComponent, Joined, ModelComponent, Part, Release, Repo, SourceFile
from ..conversion.rules import RuleTable
from . import weights


PRIOR = "prior"
PRIOR_REPO = "kandinsky-2-2-prior"
PRIOR_PIPELINES = ("KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
DECODER_PIPELINES = (
    "KandinskyV22Pipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
)


# ------------------------------------------------------------------------------------------------ the source
def find_roots(folder: Path) -> dict[str, Path]:
    """The folder of each repository by its role: ``prior``, ``decoder``, ``decoder-inpaint``, ``controlnet``.

    Raises:
        ConversionError: two repositories have the same role, or one has none.
    """
    roots = {"release": folder}
    for place, pipeline in find_pipelines(folder).items():
        if not pipeline.startswith("KandinskyV22"):
            continue
        role = _role(place, pipeline)
        if role in roots:
            raise ConversionError(f"{roots[role]} and {place} are both the {role} of Kandinsky 2.2; one is expected.")
        roots[role] = place
    return roots


def _role(place: Path, pipeline: str) -> str:
    if pipeline in PRIOR_PIPELINES:
        return PRIOR
    if pipeline not in DECODER_PIPELINES:
        accepted = ", ".join((*PRIOR_PIPELINES, *DECODER_PIPELINES))
        raise ConversionError(f"{place} is a {pipeline}, which cannot be converted; accepted are {accepted}.")
    config = read_json(place / "unet" / "config.json")
    kind = (config.get("in_channels"), config.get("addition_embed_type") == "image_hint")
    for role, known in weights.UNETS.items():
        if kind == known:
            return role
    raise ConversionError(
        f"{place / 'unet' / 'config.json'}: a UNet with in_channels {kind[0]} and addition_embed_type "
        f"{config.get('addition_embed_type')!r} is not one of Kandinsky 2.2."
    )


# ------------------------------------------------------------------------------------------------ files and models
def _file(role: str, part: str, library: str, recognises: Callable[[Shapes], bool]) -> SourceFile:
    return SourceFile(f"{role}/{part}", weight_paths(part, library), recognises, root=role)


def _model(
    role: str, part: str, library: str, class_name: str, rules: Callable[[Config], RuleTable], **options: Any
) -> ModelComponent:
    return ModelComponent(
        part,
        library,
        class_name,
        parts=(Part(f"{role}/{part}", rules),),
        configure=partial(published_config, root=role, folder=part),
        **options,
    )


FILES = (
    *(_file(role, "unet", "diffusers", partial(weights.is_unet, role=role)) for role in weights.UNETS),
    *(_file(role, "movq", "diffusers", weights.is_movq) for role in weights.UNETS),
    _file(PRIOR, "prior", "diffusers", weights.is_prior),
    _file(PRIOR, "text_encoder", "transformers", weights.is_text_encoder),
    _file(PRIOR, "image_encoder", "transformers", weights.is_image_encoder),
)

TOKENIZER = FilesComponent(
    "tokenizer",
    "transformers",
    "CLIPTokenizer",
    write=partial(copy_tokenizer, root=PRIOR, folder="tokenizer", class_name="CLIPTokenizer"),
    check=partial(tokenizer_check, root=PRIOR, folder="tokenizer"),
)

IMAGE_PROCESSOR = FilesComponent(
    "image_processor",
    "transformers",
    "CLIPImageProcessor",
    write=partial(copy_clip_image_processor, root=PRIOR, folder="image_processor"),
    check=partial(image_processor_check, root=PRIOR, folder="image_processor"),
)


# ------------------------------------------------------------------------------------------------ repositories
def _decoder(role: str, repo: str, pipeline: str, inputs: Callable[[], dict[str, Any]] = dict) -> Repo:
    def run_decoder(pipe: Any) -> list[Any]:
        return smoke.run_decoder(pipe, pipe.unet.config.encoder_hid_dim, **inputs())

    def run_combined(pipe: Any) -> list[Any]:
        return smoke.run_combined(pipe, **inputs())

    return Repo(
        repo,
        f"{pipeline}Pipeline",
        main=f"{role}/unet",
        components=(
            _model(role, "unet", "diffusers", "UNet2DConditionModel", weights.same_names),
            _model(role, "movq", "diffusers", "VQModel", weights.movq_rules, keep_float32=True),
            copied_scheduler("DDPMScheduler", root=role),
        ),
        smoke=run_decoder,
        joined=Joined(PRIOR_REPO, "prior_", f"{pipeline}CombinedPipeline", run_combined),
    )


RELEASE = Release(
    version="2.2",
    title="Kandinsky 2.2",
    files=FILES,
    repos=(
        Repo(
            PRIOR_REPO,
            "KandinskyV22PriorPipeline",
            main=f"{PRIOR}/prior",
            components=(
                _model(PRIOR, "prior", "diffusers", "PriorTransformer", weights.same_names),
                _model(PRIOR, "text_encoder", "transformers", "CLIPTextModelWithProjection", half_rules),
                _model(PRIOR, "image_encoder", "transformers", "CLIPVisionModelWithProjection", half_rules),
                TOKENIZER,
                IMAGE_PROCESSOR,
                copied_scheduler("UnCLIPScheduler", root=PRIOR),
            ),
            smoke=smoke.run_prior,
        ),
        _decoder("decoder", "kandinsky-2-2-decoder", "KandinskyV22"),
        _decoder("decoder-inpaint", "kandinsky-2-2-decoder-inpaint", "KandinskyV22Inpaint", smoke.hole),
        _decoder("controlnet", "kandinsky-2-2-controlnet-depth", "KandinskyV22Controlnet", smoke.hint),
    ),
    roots=find_roots,
)
