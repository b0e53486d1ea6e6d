"""Pictures for the host's input folder."""

from pathlib import Path

import numpy as np
from PIL import Image

WIDE, HIGH = 120, 80
HIDDEN, SUBJECT = (255, 255, 0), (0, 128, 255)  # colours: in transparent parts, and of the subject
IS_SUBJECT = np.zeros((HIGH, WIDE), bool)  # a square in the middle
IS_SUBJECT[20:60, 40:80] = True


def write_picture(path: Path, opaque: np.ndarray | None = None) -> None:
    """A picture of the subject; `opaque` [HIGH, WIDE] says where, and None makes a file without alpha."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.where(IS_SUBJECT[..., None], SUBJECT, HIDDEN).astype(np.uint8))
    if opaque is not None:
        picture.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    picture.save(path)
