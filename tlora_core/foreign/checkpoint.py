"""A model's checkpoint file as the target of a foreign LoRA, for use without ComfyUI."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..container import check_header, one_line
from ..errors import TLoRAError
from ..file import split_name
from ..names import diffusers_name, family_of, plain_name
from .target import Target, model_of_shapes

_PREFIX, _WEIGHT = "model.diffusion_model.", ".weight"
_PRECISE = ("F32", "F16", "BF16")


def checkpoint_target(path: Path) -> Target:
    """The diffusion model in a safetensors checkpoint of SD1.5, SD2, SDXL or FLUX in its original layout, as ComfyUI's
    Load Checkpoint and Load Diffusion Model take it. Weights are read when asked for.

    Raises TLoRAError, naming the file, when it cannot be read or holds no such model.
    """
    try:
        if not path.is_file():
            raise TLoRAError("there is no such file; check the path.")
        check_header(path)
        with safe_open(path, framework="pt") as opened:
            shapes = _linear_shapes(opened)
    except (OSError, SafetensorError, TLoRAError) as error:
        raise TLoRAError(f'model "{path.name}": {one_line(error)}') from error
    if not shapes:
        raise TLoRAError(
            f'model "{path.name}": it holds no U-Net or FLUX transformer in its original layout; use a checkpoint '
            "that ComfyUI's Load Checkpoint takes."
        )
    base_model, num_timesteps, noise_domain = model_of_shapes(shapes)
    return Target(
        _names(shapes), shapes, lambda name, rows: _weight(path, name, rows), base_model, num_timesteps, noise_domain
    )


def _linear_shapes(opened) -> dict[str, tuple[int, int]]:
    shapes = {}
    for key in opened.keys():
        module = key.removeprefix(_PREFIX)
        if module.endswith(_WEIGHT) and family_of(module):
            shape = opened.get_slice(key).get_shape()
            if len(shape) == 2:
                shapes[module.removesuffix(_WEIGHT)] = tuple(shape)
    return shapes


def _names(shapes: dict[str, tuple[int, int]]) -> dict[str, str]:
    names = {plain_name(path): path for path in shapes}
    for path, (_, in_features) in shapes.items():
        for part in (None, 0, 1, 2, 3):
            if named := diffusers_name(path, part):
                names[plain_name(named)] = path if part is None else f"{path}@{part * in_features}"
    return names


def _weight(path: Path, name: str, rows: int) -> torch.Tensor:
    module, row = split_name(name)
    with safe_open(path, framework="pt") as opened:
        keys = set(opened.keys())
        key = next(k for k in (_PREFIX + module + _WEIGHT, module + _WEIGHT) if k in keys)
        stored = opened.get_slice(key)
        if stored.get_dtype() not in _PRECISE:
            raise TLoRAError(f'the model\'s weight "{key}" is stored as {stored.get_dtype()}; use one in float16 or better.')
        return stored[row : row + rows].float()
