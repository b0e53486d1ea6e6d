"""Shows the pictures of Load Image with their masks before a run, as the training will use them: through the host's own
loader and the training's own framing."""

import base64
import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from ....errors import TLoRAError, require_choice
from ....training.dataset import FRAMINGS, TrainingImage, frame, training_images
from ....training.masks import covers_border
from ..page.pictures import MOST_SHOWN, as_jpeg, warning_of

_host = importlib.import_module("nodes")  # the host's; type checkers take `import nodes` for our own
_CELL = 8  # pixels; the VAE is not known yet, and one with larger cells cuts a few pixels more or less
_SIDES = (64, 4096)  # resolutions that a page may ask for


def asked_pictures(values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a page that sends pictures and their masks.

    values: items, each {"image": file of Load Image, "mask": None or {"image", "channel", "is_inverted"}}; framing, one
        of FRAMINGS or None for whole pictures; and resolution in pixels.
    Returns {"pictures": [{"source", "is_masked", "warning"}], "count"}, or {"wrong": sentence}, or {} if a file cannot
    be read, about which the host complains.
    """
    framing, resolution = values["framing"], min(max(int(values["resolution"]), _SIDES[0]), _SIDES[1])
    items = [(str(item["image"]), item["mask"]) for item in values["items"]]
    try:
        if framing is not None:
            require_choice("framing", framing, FRAMINGS)
        shown, count = [], 0
        for name, mask in items:
            images, hidden = _loaded(name, mask)
            for image, unused in list(zip(images, hidden))[: MOST_SHOWN - len(shown)]:
                shown.append(_shown(image, unused, framing, resolution))
            count += len(images)
        return {"pictures": shown, "count": count}
    except TLoRAError as error:
        return {"wrong": str(error)}
    except (OSError, ValueError):
        return {}


def _loaded(name: str, mask: Mapping[str, Any] | None) -> tuple[list[TrainingImage], list[Tensor | None]]:
    """The training pictures in a file of Load Image. For each, the MASK that the node gives but that is not connected:
    where the file is transparent."""
    image, own = _host.LoadImage().load_image(_known(name))
    images = training_images(image, mask=None if mask is None else _mask(mask))
    has_alpha = mask is None and own.shape == image.shape[:3]
    return images, [one if has_alpha and bool((one > 0).any()) else None for one in own[: len(images)]]


def _mask(asked: Mapping[str, Any]) -> Tensor:
    """A MASK of Load Image or Load Image (as Mask), through Invert Mask or not."""
    (mask,) = _host.LoadImageMask().load_image_mask(_known(str(asked["image"])), str(asked["channel"]))
    return 1 - mask if asked["is_inverted"] else mask


def _known(name: str) -> str:
    """`name`, a file as the host's lists of images name it. Raises FileNotFoundError for one outside its folders."""
    inner, annotated = folder_paths.annotated_filepath(name)
    folder = Path(annotated or folder_paths.get_input_directory()).resolve()
    path = (folder / inner).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise FileNotFoundError(name)
    return name


def _shown(image: TrainingImage, hidden: Tensor | None, framing: str | None, resolution: int) -> dict[str, Any]:
    pixels, mask = image.pixels, image.mask
    if framing is not None:
        framed = frame(image, framing, resolution, _CELL)
        pixels, mask = framed.pixels, framed.mask
        hidden = None if hidden is None else frame(replace(image, mask=hidden), framing, resolution, _CELL).mask
    warning = warning_of(mask)
    if hidden is not None:
        warning = "transparent" if covers_border(hidden) else "painted"
    source = "data:image/jpeg;base64," + base64.b64encode(as_jpeg(pixels, mask)).decode()
    return {"source": source, "is_masked": mask is not None, "warning": warning}
