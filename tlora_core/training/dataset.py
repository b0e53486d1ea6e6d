"""The pictures a T-LoRA is trained on: captions, masks, and how each is framed for the model."""

import itertools
import math
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
    """One picture: pixels [H, W, 3] in 0..1; what it shows, with {token} and {class_word} in their places; and where
    the subject is, mask [H, W] in 0..1, or None for everywhere."""

    pixels: Tensor
    caption: str = PROMPT
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Framed:
    """A picture as the model sees it: pixels [h, w, 3] and mask [h, w], both multiples of the VAE's cell, and what SDXL
    is told
    of it, in pixels: the size (width, height) it had, where its crop began (x, y), and its size now."""

    pixels: Tensor
    mask: Tensor | None
    original: tuple[int, int]
    crop: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def training_images(images: Tensor, captions: str = "", mask: Tensor | None = None) -> list[TrainingImage]:
    """A batch of pictures [N, H, W, 3] as TrainingImages.

    captions: one line for all, or one for each; empty for the paper's prompt. mask: [H, W], [1, H, W] or [N, H, W].
    Raises TLoRAError when the numbers or sizes do not fit.
    """
    check_images(images)
    lines = _lines(captions)
    if len(lines) not in (1, len(images)):
        raise TLoRAError(
            f"captions has {len(lines)} lines for {_pictures(len(images))}; write one line for all or one for each."
        )
    masks = [None] * len(images) if mask is None else _masks(images, mask)
    return [TrainingImage(pixels, lines[i % len(lines)], masks[i]) for i, pixels in enumerate(images)]


def training_list(
    images: Sequence[Tensor], captions: Sequence[str] = ("",), masks: Sequence[Tensor] = ()
) -> list[TrainingImage]:
    """A list of batches [N, H, W, 3], each of a size of its own, as one set of TrainingImages.

    captions: a single text goes for all pictures as in `training_images`; of several, each is the caption of one
    picture, and those of an item of `images` where there is one for each. masks: one for all pictures, one for each, or
    one for each item of `images`.
    Raises TLoRAError when the numbers or sizes do not fit.
    """
    if not images:
        raise TLoRAError("image is an empty list; connect at least one picture.")
    for batch in images:
        check_images(batch)
    texts, masks = _dealt_captions(captions or ("",), images), _dealt_masks(masks, images)
    return [image for batch in zip(images, texts, masks) for image in training_images(*batch)]


def _dealt_captions(captions: Sequence[str], images: Sequence[Tensor]) -> list[str]:
    """The captions of each batch, as `training_images` takes them."""
    total = sum(map(len, images))
    if len(captions) == 1:
        lines = _lines(captions[0])
        if len(lines) == 1:
            return lines * len(images)
        if len(lines) == total:
            return ["\n".join(part) for part in _dealt(lines, images)]
        if len(images) == 1:  # of whose lines `training_images` says what is wrong
            return list(captions)
    elif len(captions) == total:
        one_line_each = [" ".join(text.split()) or PROMPT for text in captions]
        return ["\n".join(part) for part in _dealt(one_line_each, images)]
    elif len(captions) == len(images):
        return list(captions)
    else:
        lines = captions
    given = f"{len(lines)} {'lines' if len(captions) == 1 else 'texts'}"
    raise TLoRAError(f"captions has {given} for {_pictures(total)}; give one for all or one for each.")


def _dealt_masks(masks: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor | None]:
    """The mask of each batch, as `training_images` takes it."""
    if not masks or len(masks) == len(images):
        return list(masks) or [None] * len(images)
    single, total = [one for mask in masks for one in (mask[None] if mask.ndim == 2 else mask)], sum(map(len, images))
    if len(single) == 1:
        return single * len(images)
    if len(single) != total:
        raise TLoRAError(f"mask has {len(single)} masks for {_pictures(total)}; connect one for all or one for each.")
    dealt = _dealt(single, images)
    if any(len({one.shape for one in part}) > 1 for part in dealt):
        raise TLoRAError(
            "mask has masks of several sizes for pictures of one size; connect those of the pictures themselves."
        )
    return [torch.stack(part) for part in dealt]


def _dealt(values: Sequence, images: Sequence[Tensor]) -> list[list]:
    """One value for each picture, as lists for each batch."""
    left = iter(values)
    return [list(itertools.islice(left, len(batch))) for batch in images]


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _lines(captions: str) -> list[str]:
    return [line.strip() for line in captions.splitlines() if line.strip()] or [PROMPT]


def _masks(images: Tensor, mask: Tensor) -> list[Tensor]:
    mask = mask[None] if mask.ndim == 2 else mask
    # First, as the host gives an empty mask of 64x64 for a picture without one.
    for i, one in enumerate(mask):
        if not bool((one > 0).any()):
            raise TLoRAError(f"mask {i + 1} is empty; paint over the subject, or leave mask unconnected.")
    if mask.ndim != 3 or len(mask) not in (1, len(images)) or mask.shape[1:] != images.shape[1:3]:
        raise TLoRAError(
            f"mask has shape {list(mask.shape)} for pictures of shape {list(images.shape)}; connect a mask of the "
            f"same height "
            "and width, one for all pictures or one for each."
        )
    return [mask[i % len(mask)].clamp(0, 1) for i in range(len(images))]


def caption_of(caption: str, token: str, class_word: str) -> str:
    """The caption with token and class word in their places; {} stands for both, as in Prompts (T-LoRA)."""
    return " ".join(
        caption.replace("{}", "{token} {class_word}")
        .replace("{token}", token)
        .replace("{class_word}", class_word)
        .split()
    )


def frame(image: TrainingImage, framing: str, resolution: int, unit: int) -> Framed:
    """Cut and resize one picture. `unit`: side of the VAE's cell in pixels.

    "centre square" is the paper's: the largest centred square, resized to resolution x resolution. "keep aspect ratio"
    resizes to the shape nearest the picture's own with at most resolution^2 pixels, and cuts the little that is over.
    """
    height, width = image.pixels.shape[:2]
    if framing == FRAMINGS[0]:
        box = centre_square(width, height)
        target, original, crop = (resolution, resolution), box[2:], (0, 0)
    else:
        target = bucket(width, height, resolution, unit)
        scale = max(target[0] / width, target[1] / height)
        cut = (
            min(target[0] / scale, width),
            min(target[1] / scale, height),
        )  # rounding may go a hair beyond the picture
        box = ((width - cut[0]) / 2, (height - cut[1]) / 2, *cut)
        original, crop = (width, height), (round(box[0] * scale), round(box[1] * scale))
    mask = None if image.mask is None else resized(image.mask, box, target, Image.Resampling.BOX)
    return Framed(resized(image.pixels, box, target), mask, original, crop)


def bucket(width: int, height: int, resolution: int, unit: int) -> tuple[int, int]:
    """(width, height) nearest to a picture's aspect ratio, each a multiple of a sixteenth of the resolution (64 for
    1024) and of unit, of at most resolution^2 pixels and not much fewer."""
    step = max(unit, resolution // 16 // unit * unit)
    sides = range(step, 4 * resolution + 1, step)
    most = resolution**2
    shapes = [(w, h) for w in sides for h in sides if 0.85 * most <= w * h <= most]
    return min(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1] * height / width)), -shape[0] * shape[1]))


def loss_weights(mask: Tensor, cells: Sequence[int], outside: float) -> Tensor:
    """Weight of each latent cell [h, w], mean 1: 1 inside the mask and `outside` elsewhere, before scaling.

    Raises TLoRAError when nothing is left, as with a mask that lies wholly in what the framing cut away.
    """
    inside = F.interpolate(mask[None, None], tuple(cells), mode="area")[0, 0]
    weights = inside + outside * (1 - inside)
    if not float(weights.mean()) > 0:
        raise TLoRAError(
            "mask covers nothing of what is left of its picture after framing; paint it nearer to the middle, or keep "
            "the "
            "aspect ratio."
        )
    return weights / weights.mean()
