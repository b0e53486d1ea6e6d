"""A training without a server: from names of files, or what is loaded from them, to the saved T-LoRA."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import TLoRAError
from ....training.dataset import training_list
from ..loaders import load_checkpoint, load_clip, load_clip_vision, load_mask, load_picture, load_unet, load_vae
from .before_run import wrong_training
from .by_name import PROMPTS, check_without_model, checked, trained
from .keeping import NO_SCORER, Keeping
from .run import Outcome

# The Train node's own defaults where they are not those of TrainRequest.
DEFAULTS = {"token": "sks", "method": "auto", "resolution": 0, "file_name": "tlora/my_subject"}
VALIDATE_EVERY = 100  # steps between validations where there are prompts or a scorer, and no other number is given
# What is checked before anything is loaded, with its value where none is given.
_CHECKED = {
    **dict.fromkeys(("token", "class_word", "method", "file_name")),
    **{"rank": 64, "min_rank": 32, "curve": "", PROMPTS: "", "validate_every": 0},
    **{name: getattr(Keeping, name) for name in ("scorer", "keep", "patience", "score_seeds")},
}


def train_from_files(
    parts: Mapping[str, Any], image: Any, mask: Any, prior_images: Any, inputs: Mapping[str, Any]
) -> Outcome:
    """See `tlora_core.train`. parts: model or unet, clip, vae, clip_type, weight_dtype, clip_vision. Lets the host's
    interrupt through."""
    models = dict(parts)
    clip_vision = models.pop("clip_vision")
    values = completed_inputs(inputs, clip_vision is not None)
    captions = values.pop("captions", "")
    with torch.inference_mode():  # as in the host
        pictures = [_tensor(each, load_picture) for each in _several(image)]
        if not pictures:
            raise TLoRAError("image is missing; give a picture of the subject.")
        images = training_list(pictures, [captions], [_tensor(each, load_mask) for each in _several(mask)])
        priors = [_tensor(each, lambda path: load_picture(path, "prior_images")) for each in _several(prior_images)]
        prior = training_list(priors) if priors else ()
        model, clip, vae = loaded(**models)
        values["clip_vision"] = load_clip_vision(clip_vision) if _is_file(clip_vision) else clip_vision
        return trained(images, model=model, clip=clip, vae=vae, options=({}, prior), **values)


def completed_inputs(inputs: Mapping[str, Any], has_clip_vision: bool = False) -> dict[str, Any]:
    """All plain inputs, in their own types, that a training needs. has_clip_vision: whether a clip_vision is given
    beside them. Raises TLoRAError for a wrong one."""
    values = {**DEFAULTS, **checked(inputs)}
    if "class_word" not in values:
        raise TLoRAError('class_word is missing; say what the picture shows, such as "dog".')
    if has_clip_vision or values.get(PROMPTS, "").strip() or values.get("scorer", NO_SCORER) != NO_SCORER:
        values.setdefault("validate_every", VALIDATE_EVERY)
    wrong = wrong_training({name: values.get(name, usual) for name, usual in _CHECKED.items()}, has_clip_vision)
    if wrong is not None:
        raise TLoRAError(wrong)
    check_without_model({**values, "clip_vision": has_clip_vision or None})
    return values


def loaded(model: Any, unet: Any, clip: Any, vae: Any, clip_type: str, weight_dtype: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE; see `tlora_core.train`. Raises TLoRAError."""
    if (model is None) == (unet is None):
        raise TLoRAError("Give either model, a checkpoint, or unet, clip and vae.")
    if _is_file(model) and weight_dtype != "default":
        raise TLoRAError("weight_dtype is for unet; a checkpoint's weights keep their own.")
    missing = [name for name, part in (("clip", clip), ("vae", vae)) if part is None and not _is_file(model)]
    if missing:
        raise TLoRAError(f"{missing[0]} is missing; give it, as only a checkpoint can hold one.")
    if _is_file(clip) and not clip_type:
        raise TLoRAError('clip_type is missing; give the type in ComfyUI\'s CLIP loader, such as "flux".')
    if _is_file(model):
        model, own_clip, own_vae = load_checkpoint(model)
    else:
        model, own_clip, own_vae = load_unet(unet, weight_dtype) if _is_file(unet) else model or unet, None, None
    clip = load_clip(_several(clip), clip_type) if _is_file(clip) else clip
    vae = load_vae(vae) if _is_file(vae) else vae
    return model, own_clip if clip is None else clip, own_vae if vae is None else vae


def _is_file(part: Any) -> bool:
    """Whether a part of a model is named by a file or several, and not loaded yet."""
    return isinstance(part, str | Path | list | tuple)


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _tensor(value: Any, load: Callable[[Any], Tensor]) -> Tensor:
    return value if isinstance(value, Tensor) else load(value)
