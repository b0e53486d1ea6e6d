"""Describes a loaded model to the readers of foreign files: the host's table of names, shapes, original weights."""

from collections.abc import Mapping

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher

from ....errors import TLoRAError
from ....files.dtypes import is_plain
from ....files.foreign.model_description import ModelDescription
from ....files.layer_names import plain_name
from ....method.layer_name import LayerName
from ....method.starts import exact_device
from .layers import linear_modules
from .noise import domain, num_timesteps

_PREFIX, _WEIGHT = "diffusion_model.", ".weight"


def describe_model(model: ModelPatcher) -> ModelDescription:
    """The description of a loaded model. Raises TLoRAError for an unknown noise parameterisation."""
    linear = linear_modules(model)
    sampling = model.get_model_object("model_sampling")
    return ModelDescription(
        names=_names(model),
        shapes={path: (module.out_features, module.in_features) for path, module in linear.items()},
        weight=lambda name, rows: _original_weight(model, linear, name, rows),
        base_model=type(model.model.model_config).__name__.lower(),
        num_timesteps=num_timesteps(sampling),
        noise_domain=domain(sampling),
        device=exact_device(model.load_device),
    )


def _names(model: ModelPatcher) -> dict[str, LayerName]:
    names = {}
    for name, where in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        key, offset = (
            (where[0], where[1] if len(where) == 2 else None) if isinstance(where, tuple) else (where, (0, None, None))
        )
        # The host's offsets are (dimension, start, length); a third element of the tuple is a function of the weight.
        if offset is None or offset[0] != 0 or not key.startswith(_PREFIX) or not key.endswith(_WEIGHT):
            continue
        path = key[len(_PREFIX) : -len(_WEIGHT)]
        names[plain_name(name)] = LayerName(path) if offset[1] is None else LayerName.of_rows(path, offset[1])
    return names


def _original_weight(
    model: ModelPatcher, linear: Mapping[str, torch.nn.Module], name: LayerName, rows: int
) -> torch.Tensor:
    """The layer's weight as loaded, float32 [rows, in] on the CPU, without its current patches."""
    path, row = name.path, name.row
    key = f"{_PREFIX}{path}{_WEIGHT}"
    patched = model.backup.get(key)
    weight = patched.weight if patched is not None else linear[path].weight
    weight = weight.detach()
    if weight.is_meta or not is_plain(weight):
        raise TLoRAError(
            f"its base term is not stored and cannot be recomputed, since the model's weight {path} is quantised "
            f"({weight.dtype}); load the model in float16, bfloat16 or float32."
        )
    return weight[row : row + rows].to("cpu", torch.float32)
