"""Kandinsky 2.2, prior and decoder as one pipeline: from a prompt to a picture."""

from __future__ import annotations

from typing import Unpack

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    VQModel,
)
from diffusers import UNet2DConditionModel as StockUNet2DConditionModel
from diffusers.pipelines.kandinsky2_2 import KandinskyV22CombinedPipeline as StockKandinskyV22CombinedPipeline
from diffusers.pipelines.kandinsky2_2 import (
    KandinskyV22Img2ImgCombinedPipeline as StockKandinskyV22Img2ImgCombinedPipeline,
)
from diffusers.pipelines.kandinsky2_2 import (
    KandinskyV22InpaintCombinedPipeline as StockKandinskyV22InpaintCombinedPipeline,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ..connected import ConnectedPriorMixin, components_among
from ..images import Images
from ..movq import MoVQ
from ..options import CombinedImg2ImgOptions, CombinedInpaintOptions, CombinedOptions, Pictures, Prompts, accepts
from ..pipeline_base import KandinskyPipelineMixin
from ..prior import CachedPriorTransformer
from ..unet import UNet2DConditionModel
from .pipeline import KandinskyV22ControlnetPipeline, KandinskyV22Pipeline
from .pipeline_img2img import KandinskyV22ControlnetImg2ImgPipeline, KandinskyV22Img2ImgPipeline
from .pipeline_inpaint import KandinskyV22InpaintPipeline
from .pipeline_prior import KandinskyV22PriorPipeline


class KandinskyV22CombinedPipeline(ConnectedPriorMixin, KandinskyPipelineMixin, StockKandinskyV22CombinedPipeline):
    """Text to image with Kandinsky 2.2, prior and decoder in one.

    Args: the components of [`KandinskyV22Pipeline`], and with `prior_` in front those of its prior.
    """

    model_cpu_offload_seq = "prior_text_encoder->prior_prior->prior_image_encoder->unet->movq"
    _orders_of_use = (  # a negative prompt needs no image encoder
        "prior_text_encoder->prior_prior->prior_image_encoder->movq->unet->movq",
        "prior_text_encoder->prior_prior->movq->unet->movq",
    )
    _exclude_from_cpu_offload = ()
    _callback_tensor_inputs = KandinskyV22Pipeline._callback_tensor_inputs
    _prior_class = KandinskyV22PriorPipeline
    _decoder_class = KandinskyV22Pipeline

    def __init__(
        self,
        unet: StockUNet2DConditionModel | UNet2DConditionModel,
        scheduler: DDPMScheduler,
        movq: VQModel | MoVQ,
        prior_prior: PriorTransformer | CachedPriorTransformer,
        prior_image_encoder: CLIPVisionModelWithProjection,
        prior_text_encoder: CLIPTextModelWithProjection,
        prior_tokenizer: CLIPTokenizer,
        prior_scheduler: UnCLIPScheduler,
        prior_image_processor: CLIPImageProcessor,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(**components_among(locals()))

    @torch.no_grad()
    @accepts(CombinedOptions, stock=StockKandinskyV22CombinedPipeline)
    def __call__(self, prompt: Prompts, **options: Unpack[CombinedOptions]) -> Pictures:
        """Draw.

        Args:
            prompt: one or several, in English.
            options: [`CombinedOptions`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._draw({**options, **locals()})


class KandinskyV22Img2ImgCombinedPipeline(KandinskyV22CombinedPipeline, StockKandinskyV22Img2ImgCombinedPipeline):
    """Image to image with Kandinsky 2.2, prior and decoder in one."""

    _decoder_class = KandinskyV22Img2ImgPipeline

    @torch.no_grad()
    @accepts(CombinedImg2ImgOptions, stock=StockKandinskyV22Img2ImgCombinedPipeline)
    def __call__(self, prompt: Prompts, image: Images, **options: Unpack[CombinedImg2ImgOptions]) -> Pictures:
        """Draw anew what is in a picture; see [`KandinskyV22Img2ImgPipeline.__call__`] and [`CombinedOptions`]."""
        return self._draw({**options, **locals()})


class KandinskyV22InpaintCombinedPipeline(KandinskyV22CombinedPipeline, StockKandinskyV22InpaintCombinedPipeline):
    """Inpainting with Kandinsky 2.2, prior and decoder in one."""

    _callback_tensor_inputs = KandinskyV22InpaintPipeline._callback_tensor_inputs
    _decoder_class = KandinskyV22InpaintPipeline

    @torch.no_grad()
    @accepts(CombinedInpaintOptions, stock=StockKandinskyV22InpaintCombinedPipeline)
    def __call__(
        self, prompt: Prompts, image: Images, mask_image: Images, **options: Unpack[CombinedInpaintOptions]
    ) -> Pictures:
        """Repaint a region of a picture; see [`KandinskyV22InpaintPipeline.__call__`] and [`CombinedOptions`]."""
        return self._draw({**options, **locals()})


class KandinskyV22ControlnetCombinedPipeline(KandinskyV22CombinedPipeline):
    """Text to image with Kandinsky 2.2 and a depth map, prior and decoder in one."""

    _decoder_class = KandinskyV22ControlnetPipeline

    @torch.no_grad()
    @accepts(CombinedOptions)
    def __call__(self, prompt: Prompts, hint: Images, **options: Unpack[CombinedOptions]) -> Pictures:
        """Draw; see [`KandinskyV22ControlnetPipeline.__call__`] and [`CombinedOptions`]."""
        return self._draw({**options, **locals()})


class KandinskyV22ControlnetImg2ImgCombinedPipeline(KandinskyV22CombinedPipeline):
    """Image to image with Kandinsky 2.2 and a depth map, prior and decoder in one."""

    _decoder_class = KandinskyV22ControlnetImg2ImgPipeline

    @torch.no_grad()
    @accepts(CombinedImg2ImgOptions)
    def __call__(
        self, prompt: Prompts, image: Images, hint: Images, **options: Unpack[CombinedImg2ImgOptions]
    ) -> Pictures:
        """Draw anew what is in a picture; see [`KandinskyV22ControlnetImg2ImgPipeline.__call__`]."""
        return self._draw({**options, **locals()})
