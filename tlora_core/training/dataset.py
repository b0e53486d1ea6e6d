"""The training pictures of a T-LoRA, with captions and masks, and their framing for the model."""

import itertools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import TLoRAError
from .images import centre_square, check_images, resized

FRAMINGS = ("centre square", "keep aspect ratio")
PROMPT = "a photo of {token} {class_word}"


@dataclass(frozen=True, eq=False)
class TrainingImage:
    """One picture: pixels [H, W, 3] in 0..1; a caption with {token} and {class_word} as placeholders; and a mask of the
    subject [H, W] in 0..1, or None for the whole picture."""

    pixels: Tensor
    caption: str = PROMPT
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Framed:
    """A cropped and resized picture: pixels [h, w, 3] and mask [h, w], with sides that are multiples of the VAE's cell.

    SDXL's size conditioning, in pixels: original, the size (width, height) before the crop; crop, its left top corner
    (x, y); and size, the size now."""

    pixels: Tensor
    mask: Tensor | None
    original: tuple[int, int]
    crop: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def training_images(images: Tensor, captions: str = "", mask: Tensor | None = None) -> list[TrainingImage]:
    """A batch of pictures [N, H, W, 3] or [N, H, W, 4] as TrainingImages.

    captions: one line for all, or one for each; empty for the paper's prompt. mask: [H, W], [1, H, W] or [N, H, W].
    Where a picture has alpha, it is the mask, or limits the one given, so that the colours hidden in transparent parts
    are not learnt. Raises TLoRAError when the counts or sizes do not match.
    """
    images, alpha = _parted(images)
    check_images(images)
    lines = _lines(captions)
    if len(lines) not in (1, len(images)):
        raise TLoRAError(
            f"captions has {len(lines)} lines for {_pictures(len(images))}; write one line for all or one for each."
        )
    masks = [None] * len(images) if mask is None else _masks(images, mask)
    if alpha is not None:
        logging.info("[T-LoRA] image has transparent parts, which are not learnt.")
        masks = [_opaque(i, one, masks[i]) for i, one in enumerate(alpha)]
    return [TrainingImage(pixels, lines[i % len(lines)], masks[i]) for i, pixels in enumerate(images)]


def training_list(
    images: Sequence[Tensor], captions: Sequence[str] = ("",), masks: Sequence[Tensor] = ()
) -> list[TrainingImage]:
    """A list of batches [N, H, W, 3] or [N, H, W, 4] of any sizes as one list of TrainingImages.

    captions: a single text for all pictures, as in `training_images`; or one text for each picture; or one for each
    item of `images`, with its captions as in `training_images`. masks: one for all pictures, one for each, or one for
    each item of `images`.
    Raises TLoRAError when the counts or sizes do not match.
    """
    if not images:
        raise TLoRAError("image is an empty list; connect at least one picture.")
    for batch in images:
        check_images(_parted(batch)[0])
    texts, masks = _captions_by_batch(captions or ("",), images), _masks_by_batch(masks, images)
    return [image for batch in zip(images, texts, masks) for image in training_images(*batch)]


def _captions_by_batch(captions: Sequence[str], images: Sequence[Tensor]) -> list[str]:
    """The captions of each batch, in the form for `training_images`."""
    total = sum(map(len, images))
    if len(captions) == 1:
        lines = _lines(captions[0])
        if len(lines) == 1:
            return lines * len(images)
        if len(lines) == total:
            return ["\n".join(part) for part in _by_batch(lines, images)]
        if len(images) == 1:  # `training_images` raises the error for its lines
            return list(captions)
    elif len(captions) == total:
        one_line_each = [" ".join(text.split()) or PROMPT for text in captions]
        return ["\n".join(part) for part in _by_batch(one_line_each, images)]
    elif len(captions) == len(images):
        return list(captions)
    else:
        lines = captions
    given = f"{len(lines)} {'lines' if len(captions) == 1 else 'texts'}"
    raise TLoRAError(f"captions has {given} for {_pictures(total)}; give one for all or one for each.")


def _masks_by_batch(masks: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor | None]:
    """The mask of each batch, in the form for `training_images`."""
    if not masks or len(masks) == len(images):
        return list(masks) or [None] * len(images)
    single, total = [one for mask in masks for one in (mask[None] if mask.ndim == 2 else mask)], sum(map(len, images))
    if len(single) == 1:
        return single * len(images)
    if len(single) != total:
        raise TLoRAError(f"mask has {len(single)} masks for {_pictures(total)}; connect one for all or one for each.")
    batches = _by_batch(single, images)
    if any(len({one.shape for one in batch}) > 1 for batch in batches):
        raise TLoRAError(
            "mask has masks of several sizes for pictures of one size; connect a mask of the size of its picture."
        )
    return [torch.stack(batch) for batch in batches]


def _by_batch(values: Sequence, images: Sequence[Tensor]) -> list[list]:
    """Splits values, one for each picture, into a list for each batch."""
    following = iter(values)
    return [list(itertools.islice(following, len(batch))) for batch in images]


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _lines(captions: str) -> list[str]:
    return [line.strip() for line in captions.splitlines() if line.strip()] or [PROMPT]


def _masks(images: Tensor, mask: Tensor) -> list[Tensor]:
    mask = mask[None] if mask.ndim == 2 else mask
    # Checked first, as the host makes an empty mask of 64x64 for a picture without a mask.
    for i, one in enumerate(mask):
        if not bool((one > 0).any()):
            raise TLoRAError(f"mask {i + 1} is empty; paint over the subject, or leave mask unconnected.")
    if mask.ndim != 3 or len(mask) not in (1, len(images)) or mask.shape[1:] != images.shape[1:3]:
        raise TLoRAError(
            f"mask has shape {list(mask.shape)} for pictures of shape {list(images.shape)}; connect a mask of the "
            "same height and width, one for all pictures or one for each."
        )
    return [mask[i % len(mask)].clamp(0, 1) for i in range(len(images))]


def _parted(images: Tensor) -> tuple[Tensor, Tensor | None]:
    """(colours [N, H, W, 3], alpha [N, H, W]) of pictures; without alpha, or all opaque, alpha is None."""
    if images is None or images.ndim != 4 or images.shape[3] != 4:
        return images, None
    alpha = images[..., 3].clamp(0, 1)
    return images[..., :3], alpha if bool((alpha < 1).any()) else None


def _opaque(index: int, alpha: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of a picture with alpha [H, W], within its own mask if it has one. Raises TLoRAError if it is empty."""
    both = alpha if mask is None else alpha * mask.to(alpha)
    if not bool((both > 0).any()):
        part = "all of it" if mask is None else "all of its mask"
        raise TLoRAError(f"image {index + 1} is transparent in {part}; connect a picture that shows the subject.")
    return both


def caption_of(caption: str, token: str, class_word: str) -> str:
    """The caption with token and class word filled in; {} stands for both, as in Prompts (T-LoRA)."""
    return " ".join(
        caption.replace("{}", "{token} {class_word}")
        .replace("{token}", token)
        .replace("{class_word}", class_word)
        .split()
    )


def class_caption_of(caption: str, token: str, class_word: str) -> str:
    """The caption with the class word alone: without the token, as a placeholder or as a word of its own. Raises
    TLoRAError if the caption has no token: output preservation would keep as it was what is to be learnt."""
    whole = caption_of(caption, token, class_word)
    of_class = caption_of(re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", "", caption), "", class_word)
    if of_class == whole:
        raise TLoRAError(
            f'captions has "{whole}" without the token, which preservation_weight would keep as it was; write '
            "{token} in it, or set preservation_weight to 0."
        )
    return of_class


def frame(image: TrainingImage, framing: str, resolution: int, unit: int) -> Framed:
    """Crops and resizes one picture. `unit`: side of the VAE's cell in pixels.

    "centre square" is the paper's: the largest centred square, resized to resolution x resolution. "keep aspect ratio"
    resizes to the bucket with the nearest aspect ratio and at most resolution^2 pixels, and crops the small rest.
    """
    height, width = image.pixels.shape[:2]
    if framing == FRAMINGS[0]:
        box = centre_square(width, height)
        target, original, crop = (resolution, resolution), box[2:], (0, 0)
    else:
        target = bucket(width, height, resolution, unit)
        scale = max(target[0] / width, target[1] / height)
        # Limited, as rounding may exceed the picture slightly.
        cropped = (min(target[0] / scale, width), min(target[1] / scale, height))
        box = ((width - cropped[0]) / 2, (height - cropped[1]) / 2, *cropped)
        original, crop = (width, height), (round(box[0] * scale), round(box[1] * scale))
    mask = None if image.mask is None else resized(image.mask, box, target, Image.Resampling.BOX)
    return Framed(resized(image.pixels, box, target), mask, original, crop)


def bucket(width: int, height: int, resolution: int, unit: int) -> tuple[int, int]:
    """(width, height) with the aspect ratio nearest to a picture's, each a multiple of a sixteenth of the resolution
    (64 for 1024) and of unit, with 85 to 100 % of resolution^2 pixels."""
    step = max(unit, resolution // 16 // unit * unit)
    sides = range(step, 4 * resolution + 1, step)
    most = resolution**2
    shapes = [(w, h) for w in sides for h in sides if 0.85 * most <= w * h <= most]
    return min(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1] * height / width)), -shape[0] * shape[1]))


def loss_weights(mask: Tensor, cells: Sequence[int], outside: float) -> Tensor:
    """Weight of each latent cell [h, w], scaled to mean 1; before scaling, 1 inside the mask and `outside` elsewhere.

    Raises TLoRAError when all weights are 0, for example if the framing cut off all of the mask.
    """
    inside = F.interpolate(mask[None, None], tuple(cells), mode="area")[0, 0]
    weights = inside + outside * (1 - inside)
    if not float(weights.mean()) > 0:
        raise TLoRAError(
            "mask covers nothing of its picture after framing; paint it nearer to the middle, or keep the aspect ratio."
        )
    return weights / weights.mean()
