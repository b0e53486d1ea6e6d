"""Pictures for training: checks, the paper's square crop and resizing, thumbnails, and conversion to and from PIL."""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import TLoRAError

MIN_SIDE = 16


def check_images(images: Tensor | None, name: str = "image") -> Tensor:
    """`images` [N, H, W, 3] in 0..1, unchanged. Raises TLoRAError when empty, with alpha, too small or not finite."""
    if images is None or images.ndim != 4 or images.shape[0] == 0:
        raise TLoRAError(f"{name} is empty; connect one picture of the subject, or a batch of several.")
    _, height, width, channels = images.shape
    if channels != 3:
        raise TLoRAError(
            f"{name} has {channels} channels instead of 3 (red, green, blue); flatten its alpha channel onto a "
            "background first."
        )
    if min(height, width) < MIN_SIDE:
        raise TLoRAError(f"{name} is {width}x{height} pixels; use one of at least {MIN_SIDE}x{MIN_SIDE}.")
    if not bool(torch.isfinite(images).all()):
        raise TLoRAError(f"{name} contains NaN or infinite values; check the node it comes from.")
    return images


def resized(
    picture: Tensor,
    box: tuple[float, float, float, float],
    target: tuple[int, int],
    how: Image.Resampling = Image.Resampling.LANCZOS,
) -> Tensor:
    """The part `box` (left, top, width, height) of a picture [H, W, 3] or a mask [H, W] in 0..1, resized to `target`
    (width, height); float32. Pixels outside the box have no influence. A part of the target size is only copied."""
    left, top, width, height = box
    picture = picture.float().cpu()
    if (width, height) == target and left == int(left) and top == int(top):
        return picture[int(top) : int(top) + int(height), int(left) : int(left) + int(width)].clone()
    # Cropped first, like the reference: PIL's box alone would blend in pixels beyond it. PIL's box then handles the
    # fractions of a pixel.
    x, y = math.floor(left), math.floor(top)
    part = picture[y : math.ceil(top + height), x : math.ceil(left + width)]
    rows, columns = part.shape[:2]
    scaled = to_picture(part).resize(
        target, how, box=(left - x, top - y, min(left - x + width, columns), min(top - y + height, rows))
    )
    return torch.from_numpy(np.asarray(scaled).astype(np.float32) / 255)


def centre_square(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, side, side) of the largest centred square."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def square(images: Tensor, resolution: int) -> Tensor:
    """Centre square crop, resized with Lanczos. [N, H, W, 3] in 0..1 to [N, resolution, resolution, 3] float32."""
    box = centre_square(images.shape[2], images.shape[1])
    return torch.stack([resized(picture, box, (resolution, resolution)) for picture in images])


def thumbnail(images: Tensor | None, side: int = 256) -> bytes | None:
    """The first of `images` as a small square JPEG for a file's metadata; None for None. Raises like check_images."""
    if images is None:
        return None
    written = io.BytesIO()
    to_picture(square(check_images(images, "thumbnail")[:1], side)[0]).save(written, "JPEG", quality=85)
    return written.getvalue()


def to_picture(pixels: Tensor) -> Image.Image:
    """Pixels [H, W, 3] or a mask [H, W] in 0..1 as a PIL image."""
    return Image.fromarray((pixels.float().cpu().clamp(0, 1).numpy() * 255).round().astype(np.uint8))


def to_tensor(picture: Image.Image) -> Tensor:
    """A PIL image as the host's IMAGE: float32 [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
