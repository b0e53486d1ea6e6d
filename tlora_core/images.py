"""Pictures in and out of training: checked, cut square and resized as the paper does; loss and schedule as pictures."""
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import TLoRAError

MIN_SIDE = 16


def check_images(images: Tensor | None, name: str = "image") -> Tensor:
    """`images` [N, H, W, 3] in 0..1 as they are, or TLoRAError: none at all, alpha, too small, not a number."""
    if images is None or images.ndim != 4 or images.shape[0] == 0:
        raise TLoRAError(f"{name} is empty; connect one picture of the subject, or a batch of several.")
    _, height, width, channels = images.shape
    if channels != 3:
        raise TLoRAError(
            f"{name} has {channels} channels instead of 3 (red, green, blue); flatten its alpha channel onto a "
            "background first.")
    if min(height, width) < MIN_SIDE:
        raise TLoRAError(f"{name} is {width}x{height} pixels; use one of at least {MIN_SIDE}x{MIN_SIDE}.")
    if not bool(torch.isfinite(images).all()):
        raise TLoRAError(f"{name} holds values that are no numbers; check the node it comes from.")
    return images


def square(images: Tensor, resolution: int) -> Tensor:
    """Centre square crop, resized with Lanczos. [N, H, W, 3] in 0..1 to [N, resolution, resolution, 3] float32."""
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crops = images[:, top:top + side, left:left + side].float().cpu()
    if side == resolution:
        return crops
    pictures = (crops.clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    resized = [Image.fromarray(p).resize((resolution, resolution), Image.Resampling.LANCZOS) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(p) for p in resized]).astype(np.float32) / 255)


def thumbnail(images: Tensor | None, side: int = 256) -> bytes | None:
    """The first of `images` as a small square JPEG, for a file's metadata; None for None. Raises as check_images does."""
    if images is None:
        return None
    picture = square(check_images(images, "thumbnail")[:1], side)[0]
    written = io.BytesIO()
    Image.fromarray((picture.clamp(0, 1).numpy() * 255).round().astype(np.uint8)).save(written, "JPEG", quality=85)
    return written.getvalue()


def to_tensor(picture: Image.Image) -> Tensor:
    """A PIL picture as the host's IMAGE: float32 [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
