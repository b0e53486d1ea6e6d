"""A training as one call, for scripts in an environment that has ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .comfy.training.run import Outcome

    Picture = str | Path | Tensor


def train(
    model: Any = None,
    image: Picture | Sequence[Picture] = (),
    *,
    unet: Any = None,
    clip: Any = None,
    vae: Any = None,
    clip_type: str = "",
    weight_dtype: str = "default",
    mask: Picture | Sequence[Picture] = (),
    prior_images: Picture | Sequence[Picture] = (),
    clip_vision: Any = None,
    **inputs: Any,
) -> Outcome:
    """Trains a T-LoRA as the node Train T-LoRA from Image does, or finds the result of an equal finished run: one that
    the node made, too. ComfyUI must be importable; its server does not run.

    model: a file of the checkpoints folders or a path, or "tiny" for the pack's own model; or else unet, clip (one file
    or two, with clip_type, which is the type in ComfyUI's CLIP loaders) and vae. A clip or vae beside a model takes the
    place of the model's own. weight_dtype: as in Load Diffusion Model. What ComfyUI has loaded, a MODEL, CLIP or VAE,
    may stand for a file.
    image, mask, prior_images: a file, a tensor in 0..1, or several: pictures [N, H, W, 3]; masks [N, H, W], and files
    of masks are white where the subject is. There is one mask for all pictures, or one for each. prior_images: of the
    class, for prior preservation. clip_vision: a file of the clip_vision folders, a path or a loaded CLIP_VISION that
    scores the validations.
    inputs: all other inputs of the nodes Train T-LoRA from Image and T-LoRA Training Options by their names, with the
    same defaults, but class_word must be given, and with validation_prompts (one per line), a scorer or clip_vision
    validate_every is 100.

    Returns the Outcome: `tlora`, `file` (its name in the loras list), `path`, `folder` (of the run), `losses`,
    `scores`, `step` (which the file holds) and `why`.
    Raises TLoRAError, naming the input, before anything is loaded where it can.
    """
    # Only now, as the library works without ComfyUI.
    from .comfy.start import start

    start()
    from .comfy.training.headless import train_from_files

    parts = {"unet": unet, "clip": clip, "vae": vae, "clip_type": clip_type, "weight_dtype": weight_dtype}
    parts |= {"model": model, "clip_vision": clip_vision}
    return train_from_files(parts, image, mask, prior_images, inputs)
