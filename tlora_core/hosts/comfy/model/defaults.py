"""Default settings for training on a model and for drawing with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import comfy.supported_models_base
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher

from ....tiny.comfy import TinySDXL


@dataclass(frozen=True)
class Defaults:
    """Default training settings for a kind of model: the paper's for SDXL and FLUX; for other models, those of the more
    similar of the two.

    steps_of: steps of the methods that learn, and overfit, sooner because they start at zero. learning_rate: AdamW's;
    Prodigy adapts its own. max_gradient: clips the gradient to this norm; 0 turns clipping off.
    """

    method: str
    steps: int
    learning_rate: float
    optimizer: str
    resolution: int
    max_gradient: float = 0.0
    steps_of: Mapping[str, int] = field(default_factory=dict)


def defaults_for(model: ModelPatcher) -> Defaults:
    """The default settings for this kind of model."""
    network = model.model.diffusion_model
    return defaults_of(model.model.model_config, isinstance(getattr(network, "_orig_mod", network), UNetModel))


def defaults_of(config: comfy.supported_models_base.BASE, is_unet: bool | None = None) -> Defaults:
    """The same from the host's config of a model. is_unet: whether it is a U-Net like SDXL's; None, before the network
    exists, infers it from the config."""
    if isinstance(config, TinySDXL):
        return Defaults("tlora", 350, 1.5e-3, "adamw", 64)
    if is_unet or (
        is_unet is None and "model_channels" in config.unet_config and "image_model" not in config.unet_config
    ):
        # A text width of 768 is SD1's and 1024 is SD2's; models with wider text were trained on pictures of 1024.
        resolution = {768: 512, 1024: 768}.get(config.unet_config.get("context_dim"), 1024)
        return Defaults("tlora", 800, 1e-4, "adamw", resolution, steps_of={"lora": 500, "vanilla_tlora": 500})
    return Defaults("vanilla_tlora", 500, 1e-4, "prodigy", 1024, max_gradient=1.0, steps_of={"lora": 400})


def is_flux(model: ModelPatcher) -> bool:
    """Whether guidance is distilled into the model: it may have a guidance input, and is sampled without a negative
    prompt."""
    return model.model.model_config.unet_config.get("image_model") in ("flux", "flux2")
