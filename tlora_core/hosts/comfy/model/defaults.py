"""Default settings for training on a model and for drawing with it.

A model's config says what it can: whether guidance is one of its inputs, how wide its text is, what size of picture its
positions are for. The rest is a table of the host's classes of models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import comfy.supported_models_base
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher

from ....tiny.comfy import TinySDXL


class Guidance(NamedTuple):
    """How pictures are drawn with a model, and what a training tells it.

    scale: of classifier-free guidance; 1: none, and so no negative prompt. told, told_in_training: the guidance that
        is an input of a model with guidance distilled into it; None where it is not.
    """

    scale: float
    told: float | None = None
    told_in_training: float | None = None

    @property
    def has_negative_prompt(self) -> bool:
        return self.scale != 1

    def __str__(self) -> str:
        if self.told is not None:
            told = f"guidance {self.told_in_training:g} in training and {self.told:g} in pictures"
            return f"{told}, without a negative prompt"
        return f"pictures at CFG {self.scale:g}" if self.has_negative_prompt else "pictures without CFG"


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
    guidance: Guidance = Guidance(5.0)


class _Family(NamedTuple):
    """resolution: in pixels. scale: of classifier-free guidance, where guidance is not distilled in. told: the guidance
    told where it is."""

    resolution: int = 1024
    scale: float = 5.0
    told: float = 3.5


# By the host's class in comfy.supported_models; a class without an entry has that of the nearest class it derives from.
# Guidance and size are those of the workflow templates that come with the host, and of the models' own cards and
# published code for what has no template: AuraFlow, Cascade, CogVideoX, Cosmos, Hunyuan DiT and Image, Krea 2, Mochi,
# PixArt. A base model and one distilled from it for few steps have one architecture, so the values are the base's,
# which is the one to train on. Models of videos: the square with as many pixels as the frames they were trained on.
_FAMILIES = {
    "Anima": _Family(scale=4.0),
    "AuraFlow": _Family(scale=3.5),
    "Chroma": _Family(scale=3.5),
    "CogVideoX_T2V": _Family(576, 6.0),  # 720 x 480
    "CosmosT2V": _Family(960, 7.0),  # 1280 x 704
    "ErnieImage": _Family(scale=4.0),
    "Flux2": _Family(told=4.0),  # without the input it is Klein
    "FluxInpaint": _Family(told=30.0),
    "FluxSchnell": _Family(scale=1.0),
    "GenmoMochi": _Family(640, 4.5),  # 848 x 480
    "HiDreamO1": _Family(2048),
    "HunyuanDiT": _Family(scale=6.0),
    "HunyuanImage21": _Family(2048, 3.5, 3.25),
    "HunyuanImage21Refiner": _Family(2048, 3.5, 3.25),
    "HunyuanVideo": _Family(960, 6.0, 6.0),  # 1280 x 720
    "HunyuanVideo15": _Family(960, 6.0),
    "HunyuanVideo15_SR_Distilled": _Family(scale=1.0),
    "Kandinsky5": _Family(640),  # 768 x 512
    "Kandinsky5Image": _Family(scale=3.5),
    "Krea2": _Family(scale=4.5),
    "LTXAV": _Family(640, 4.0),
    "LTXV": _Family(640, 3.0),  # 768 x 512
    "LongCatImage": _Family(scale=4.0),
    "Lumina2": _Family(scale=4.0),  # and Z-Image
    "MiniMaxH3": _Family(scale=1.0),
    "PiD": _Family(scale=1.0),
    "PixArtAlpha": _Family(scale=4.5),
    "PixelDiTT2I": _Family(scale=4.0),
    "QwenImage": _Family(scale=4.0),
    "SD3": _Family(scale=4.0),
    "SeedVR2": _Family(scale=1.0),
    "Stable_Cascade_B": _Family(scale=1.0),
    "Stable_Cascade_C": _Family(768, 4.0),  # its encoder makes 24 x 24 cells of 768 pixels, as the model was trained on
    "WAN21_CausalAR_T2V": _Family(640, 1.0),
    "WAN21_T2V": _Family(960, 6.0),  # 1280 x 720
    "WAN22_T2V": _Family(960, 5.0),  # 1280 x 704
}
_SMALLEST_WAN = 1536  # the width of Wan's 1.3 billion, which was trained on 832 x 480
_TOLD_IN_TRAINING = 1.0  # as the paper's code trains FLUX


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
    family = next((_FAMILIES[each.__name__] for each in type(config).__mro__ if each.__name__ in _FAMILIES), _Family())
    return Defaults(
        "vanilla_tlora",
        500,
        1e-4,
        "prodigy",
        _resolution(config, family),
        max_gradient=1.0,
        steps_of={"lora": 400},
        guidance=_guidance(config, family),
    )


def _resolution(config: comfy.supported_models_base.BASE, family: _Family) -> int:
    takes = config.unet_config
    if takes.get("input_size") and takes.get("pe_interpolation"):
        return 8 * takes["input_size"]  # PixArt's grid of positions, in cells of 8 pixels
    if takes.get("image_model") == "cogvideox" and takes.get("patch_size_t"):
        return 1024  # CogVideoX 1.5: 1360 x 768
    return 640 if takes.get("image_model") == "wan2.1" and takes.get("dim") == _SMALLEST_WAN else family.resolution


def _guidance(config: comfy.supported_models_base.BASE, family: _Family) -> Guidance:
    takes = config.unet_config
    if takes.get("guidance_embed"):
        return Guidance(1.0, family.told, _TOLD_IN_TRAINING)
    if family is _FAMILIES["FluxSchnell"] and takes.get("vec_in_dim") is None:
        return Guidance(_Family().scale)  # Ovis, which the host takes for a FLUX.1 schnell without the pooled text
    return Guidance(family.scale)
