"""Kandinsky 2.1, prior and decoder as one pipeline: from a prompt to a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky import KandinskyCombinedPipeline as StockKandinskyCombinedPipeline
from diffusers.pipelines.kandinsky import KandinskyImg2ImgCombinedPipeline as StockKandinskyImg2ImgCombinedPipeline
from diffusers.pipelines.kandinsky import KandinskyInpaintCombinedPipeline as StockKandinskyInpaintCombinedPipeline
from diffusers.pipelines.kandinsky import MultilingualCLIP
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizer,
)

from ..connected import ConnectedPriorMixin
from ..images import Images
from ..movq import MoVQ
from ..pipeline_base import KandinskyPipelineMixin
from ..prior import CachedPriorTransformer
from ..schedulers import KandinskyUnCLIPScheduler
from .pipeline import KandinskyPipeline
from .pipeline_img2img import KandinskyImg2ImgPipeline
from .pipeline_inpaint import KandinskyInpaintPipeline
from .pipeline_prior import KandinskyPriorPipeline


class KandinskyCombinedPipeline(ConnectedPriorMixin, KandinskyPipelineMixin, StockKandinskyCombinedPipeline):
    """Text to image with Kandinsky 2.1, prior and decoder in one.

    Args: the components of [`KandinskyPipeline`], and those of [`KandinskyPriorPipeline`] with `prior_` in front.
    """

    model_cpu_offload_seq = "prior_text_encoder->prior_image_encoder->prior_prior->text_encoder->unet->movq"
    _exclude_from_cpu_offload = ()
    _callback_tensor_inputs = KandinskyPipeline._callback_tensor_inputs
    _prior_class = KandinskyPriorPipeline
    _decoder_class = KandinskyPipeline

    def __init__(
        self,
        text_encoder: MultilingualCLIP,
        tokenizer: XLMRobertaTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler | DDPMScheduler,
        movq: VQModel | MoVQ,
        prior_prior: PriorTransformer | CachedPriorTransformer,
        prior_image_encoder: CLIPVisionModelWithProjection,
        prior_text_encoder: CLIPTextModelWithProjection,
        prior_tokenizer: CLIPTokenizer,
        prior_scheduler: UnCLIPScheduler | KandinskyUnCLIPScheduler,
        prior_image_processor: CLIPImageProcessor,
    ):
        DiffusionPipeline.__init__(self)
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            movq=movq,
            prior_prior=prior_prior,
            prior_image_encoder=prior_image_encoder,
            prior_text_encoder=prior_text_encoder,
            prior_tokenizer=prior_tokenizer,
            prior_scheduler=prior_scheduler,
            prior_image_processor=prior_image_processor,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        negative_prior_prompt: str | list[str] | None = None,
        prior_callback_on_step_end: Callable[..., dict] | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw. Arguments as for [`KandinskyPipeline.__call__`], and for the prior:

        Args:
            negative_prompt: see [`KandinskyPriorPipeline.__call__`]; it acts on the image embeddings.
            negative_prior_prompt: likewise.
            prior_guidance_scale: `guidance_scale` of the prior.
            prior_num_inference_steps: `num_inference_steps` of the prior.
            prior_callback_on_step_end: `callback_on_step_end` of the prior.
            prior_callback_on_step_end_tensor_inputs: names of the tensors it gets.

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._draw(dict(locals()))


class KandinskyImg2ImgCombinedPipeline(KandinskyCombinedPipeline, StockKandinskyImg2ImgCombinedPipeline):
    """Image to image with Kandinsky 2.1, prior and decoder in one."""

    _decoder_class = KandinskyImg2ImgPipeline

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Images | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        negative_prior_prompt: str | list[str] | None = None,
        prior_callback_on_step_end: Callable[..., dict] | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw anew what is in a picture; arguments as for [`KandinskyImg2ImgPipeline.__call__`], those of the prior
        as for [`KandinskyCombinedPipeline.__call__`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._draw(dict(locals()))


class KandinskyInpaintCombinedPipeline(KandinskyCombinedPipeline, StockKandinskyInpaintCombinedPipeline):
    """Inpainting with Kandinsky 2.1, prior and decoder in one."""

    _decoder_class = KandinskyInpaintPipeline

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Images | None = None,
        mask_image: Images | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int = 512,
        width: int = 512,
        prior_guidance_scale: float = 4.0,
        prior_num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
        callback_steps: int | None = 1,
        return_dict: bool = True,
        negative_prior_prompt: str | list[str] | None = None,
        prior_callback_on_step_end: Callable[..., dict] | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        preserve_unmasked: bool = False,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Repaint a region of a picture; arguments as for [`KandinskyInpaintPipeline.__call__`], those of the prior as
        for [`KandinskyCombinedPipeline.__call__`].

        Raises:
            TypeError, ValueError: an argument is not as described; it is named.
        """
        return self._draw(dict(locals()))
