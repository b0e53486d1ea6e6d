"""Training pictures with their masks for the page to show."""

import io
import secrets
from collections.abc import Sequence
from pathlib import Path

import folder_paths
from torch import Tensor

from ....training.dataset import TrainingImage
from ....training.images import to_picture
from ....training.masks import covers_border, tinted

MOST_SHOWN = 12  # of the pictures of one node


def as_jpeg(pixels: Tensor, mask: Tensor | None) -> bytes:
    """The tinted picture; see masks.tinted."""
    written = io.BytesIO()
    to_picture(tinted(pixels, mask)).save(written, "JPEG", quality=85)
    return written.getvalue()


def warning_of(mask: Tensor | None) -> str:
    """The page's name for what is doubtful about a mask [h, w]; "" for nothing."""
    return "border" if mask is not None and covers_border(mask) else ""


def kept_for_page(images: Sequence[TrainingImage]) -> dict[str, list]:
    """The UI output of a node that has these pictures: the first ones, as files in the host's temporary folder."""
    folder, place = Path(folder_paths.get_temp_directory()), "tlora_pictures"
    (folder / place).mkdir(parents=True, exist_ok=True)
    shown = []
    for image in images[:MOST_SHOWN]:
        name = f"{secrets.token_hex(12)}.jpg"
        (folder / place / name).write_bytes(as_jpeg(image.pixels, image.mask))
        file = {"filename": name, "subfolder": place, "type": "temp"}
        shown.append({"file": file, "is_masked": image.mask is not None, "warning": warning_of(image.mask)})
    return {"tlora_pictures": shown, "tlora_pictures_count": [len(images)]}
