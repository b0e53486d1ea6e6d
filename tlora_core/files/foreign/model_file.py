"""Describes a model file, so that a foreign LoRA for it can be read without ComfyUI."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...errors import TLoRAError
from ...method.layer_name import LayerName
from ..dtypes import HEADER_DTYPES
from ..layer_names import family_of
from ..untrusted import check_header, one_line
from .diffusers_layout import Rows, describe_layout, overlap, rows_by_path
from .model_description import ModelDescription

_PREFIX, _WEIGHT = "model.diffusion_model.", ".weight"


def describe_model_file(path: Path) -> ModelDescription:
    """The diffusion model of SD1.5, SD2, SDXL or FLUX in a safetensors file: a model file in the original layout, which
    ComfyUI also loads, or the U-Net or transformer of a diffusers pipeline. Weights are read on demand.

    Raises TLoRAError, naming the file, when it cannot be read or holds no such model.
    """
    try:
        if not path.is_file():
            raise TLoRAError("there is no such file; check the path.")
        if re.search(r"-\d{5}-of-\d{5}", path.name):
            raise TLoRAError("it is one of several parts of a model; use a model in one file.")
        check_header(path)
        with safe_open(path, framework="pt") as opened:
            shapes = _matrix_shapes(opened)
        rows = _original_rows(shapes) or rows_by_path(shapes)
        if not rows:
            raise TLoRAError(
                "it holds no U-Net or FLUX transformer; use a file that ComfyUI's Load Checkpoint can read, or the "
                "diffusion_pytorch_model.safetensors in the unet or transformer folder of a diffusers pipeline."
            )
    except (OSError, SafetensorError, TLoRAError) as error:
        raise TLoRAError(f'model "{path.name}": {one_line(error)}') from error
    return describe_layout(rows, shapes, lambda name, count: _weight(path, rows, name, count))


def _matrix_shapes(opened) -> dict[str, tuple[int, int]]:
    """(rows, columns) of all matrices, by their key without ".weight"."""
    shapes = {}
    for key in opened.keys():
        if key.endswith(_WEIGHT):
            shape = opened.get_slice(key).get_shape()
            if len(shape) == 2:
                shapes[key.removesuffix(_WEIGHT)] = tuple(shape)
    return shapes


def _original_rows(shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[Rows]]:
    """Like rows_by_path, for ComfyUI's own modules."""
    return {
        module.removeprefix(_PREFIX): [Rows(0, shape[0], module)]
        for module, shape in shapes.items()
        if family_of(module.removeprefix(_PREFIX))
    }


def _weight(path: Path, rows: Mapping[str, list[Rows]], name: LayerName, count: int) -> torch.Tensor:
    pieces = []
    with safe_open(path, framework="pt") as opened:
        for part, wanted, first in overlap(rows[name.path], name.row, name.row + count):
            stored = opened.get_slice(part.module + _WEIGHT)
            if stored.get_dtype() not in HEADER_DTYPES:
                raise TLoRAError(
                    f'the model\'s weight "{part.module}{_WEIGHT}" is stored as {stored.get_dtype()}; '
                    "use one in float16 or better."
                )
            pieces.append(stored[first : first + wanted.stop - wanted.start].float())
    return torch.cat(pieces)
