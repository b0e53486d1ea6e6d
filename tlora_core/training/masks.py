"""Masks as users see them: the pictures with what they leave out, and whether a mask looks inverted."""

import torch
from torch import Tensor

from .images import resized

BORDER_IS_COVERED = (
    "The mask covers the border more than the middle: white is trained. Invert it with the node Invert Mask if the "
    "subject is black."
)
MOST_SIDE = 512  # pixels of a picture that is shown
_MORE = 0.05  # of the area; less is a hole or a rough edge
_TINT, _STRENGTH = (0.85, 0.1, 0.6), 0.65  # a magenta that few subjects have


def covers_border(mask: Tensor) -> bool:
    """Whether a mask [h, w] in 0..1 covers more of the border (an eighth of the picture on each side) than of the
    middle (the inner half of its width and height), by more than 5 % of their areas. The mask of a background does;
    that of a subject at the very edge may too."""
    mask = mask.double()
    high, wide = mask.shape
    middle = mask[high // 4 : high - high // 4, wide // 4 : wide - wide // 4].mean()
    top, left = max(high // 8, 1), max(wide // 8, 1)
    inner = mask[top : high - top, left : wide - left]
    border = (mask.sum() - inner.sum()) / (mask.numel() - inner.numel())
    return bool(border > middle + _MORE)


def tinted(pixels: Tensor, mask: Tensor | None) -> Tensor:
    """A picture [h, w, 3] in 0..1 to look at, float32, at most 512 pixels wide and high. What lies outside its mask
    [h, w] is grey under a tint."""
    pixels = pixels.float().cpu()
    if mask is not None:
        outside = 1 - mask.float().cpu()[..., None]
        covered = (1 - _STRENGTH) * pixels.mean(-1, keepdim=True) + _STRENGTH * torch.tensor(_TINT)
        pixels = pixels + outside * (covered - pixels)
    high, wide = pixels.shape[:2]
    scale = min(1, MOST_SIDE / max(high, wide))
    return resized(pixels, (0, 0, wide, high), (max(1, round(wide * scale)), max(1, round(high * scale))))
