"""Kandinsky 2.1, prior and decoder as one pipeline: from a prompt to a picture."""

from __future__ import annotations

from typing import Unpack

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    VQModel,
)
from diffusers import UNet2DConditionModel as StockUNet2DConditionModel
from diffusers.pipelines.kandinsky import KandinskyCombinedPipeline as StockKandinskyCombinedPipeline
from diffusers.pipelines.kandinsky import KandinskyImg2ImgCombinedPipeline as StockKandinskyImg2ImgCombinedPipeline
from diffusers.pipelines.kandinsky import KandinskyInpaintCombinedPipeline as StockKandinskyInpaintCombinedPipeline
from diffusers.pipelines.kandinsky import MultilingualCLIP
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizer,
)

from ..connected import ConnectedPriorMixin, components_among
from ..images import Images
from ..movq import MoVQ
from ..options import CombinedImg2ImgOptions, CombinedInpaintOptions, CombinedOptions, Pictures, Prompts, accepts
from ..pipeline_base import KandinskyPipelineMixin
from ..prior import CachedPriorTransformer
from ..schedulers import KandinskyUnCLIPScheduler
from ..unet import UNet2DConditionModel
from .pipeline import KandinskyPipeline
from .pipeline_img2img import KandinskyImg2ImgPipeline
from .pipeline_inpaint import KandinskyInpaintPipeline
from .pipeline_prior import KandinskyPriorPipeline


class KandinskyCombinedPipeline(ConnectedPriorMixin, KandinskyPipelineMixin, StockKandinskyCombinedPipeline):
    """Text to image with Kandinsky 2.1, prior and decoder in one.

    Args: the components of [`KandinskyPipeline`], and those of [`KandinskyPriorPipeline`] with `prior_` in front.
    """

    model_cpu_offload_seq = "prior_text_encoder->prior_prior->prior_image_encoder->text_encoder->unet->movq"
    _orders_of_use = (  # a negative prompt needs no image encoder
        "prior_text_encoder->prior_prior->prior_image_encoder->text_encoder->movq->unet->movq",
        "prior_text_encoder->prior_prior->text_encoder->movq->unet->movq",
    )
    _exclude_from_cpu_offload = ()
    _adopted_schedulers = ("prior_scheduler",)
    _callback_tensor_inputs = KandinskyPipeline._callback_tensor_inputs
    _prior_class = KandinskyPriorPipeline
    _decoder_class = KandinskyPipeline

    def __init__(
        self,
        prior_tokenizer: CLIPTokenizer,
        prior_text_encoder: CLIPTextModelWithProjection,
        prior_image_processor: CLIPImageProcessor,
        prior_image_encoder: CLIPVisionModelWithProjection,
        prior_scheduler: UnCLIPScheduler | KandinskyUnCLIPScheduler,
        prior_prior: PriorTransformer | CachedPriorTransformer,
        tokenizer: XLMRobertaTokenizer,
        text_encoder: MultilingualCLIP,
        unet: StockUNet2DConditionModel | UNet2DConditionModel,
        scheduler: DDIMScheduler | DDPMScheduler,
        movq: VQModel | MoVQ,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(**components_among(locals()))

    @torch.no_grad()
    @accepts(CombinedOptions, stock=StockKandinskyCombinedPipeline)
    def __call__(self, prompt: Prompts, **options: Unpack[CombinedOptions]) -> Pictures:
        """Draw.

        Args:
            prompt: one or several, in any language for the decoder, in English for the prior.
            options: [`CombinedOptions`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._draw({**options, **locals()})


class KandinskyImg2ImgCombinedPipeline(KandinskyCombinedPipeline, StockKandinskyImg2ImgCombinedPipeline):
    """Image to image with Kandinsky 2.1, prior and decoder in one."""

    _decoder_class = KandinskyImg2ImgPipeline

    @torch.no_grad()
    @accepts(CombinedImg2ImgOptions, stock=StockKandinskyImg2ImgCombinedPipeline)
    def __call__(self, prompt: Prompts, image: Images, **options: Unpack[CombinedImg2ImgOptions]) -> Pictures:
        """Draw anew what is in a picture; see [`KandinskyImg2ImgPipeline.__call__`] and [`CombinedOptions`]."""
        return self._draw({**options, **locals()})


class KandinskyInpaintCombinedPipeline(KandinskyCombinedPipeline, StockKandinskyInpaintCombinedPipeline):
    """Inpainting with Kandinsky 2.1, prior and decoder in one."""

    _decoder_class = KandinskyInpaintPipeline

    @torch.no_grad()
    @accepts(CombinedInpaintOptions, stock=StockKandinskyInpaintCombinedPipeline)
    def __call__(
        self, prompt: Prompts, image: Images, mask_image: Images, **options: Unpack[CombinedInpaintOptions]
    ) -> Pictures:
        """Repaint a region of a picture; see [`KandinskyInpaintPipeline.__call__`] and [`CombinedOptions`]."""
        return self._draw({**options, **locals()})
