"""A loaded model as the target of foreign files: the host's table of names, shapes, and original weights."""

from collections.abc import Mapping

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher

from ....errors import TLoRAError
from ....files.foreign.target import Target
from ....files.layer_names import plain_name, split_name
from ....method.starts import exact_device
from .layers import is_linear, modules_by_path
from .noise import domain, noise_level

_PREFIX, _WEIGHT = "diffusion_model.", ".weight"
_PRECISE = (torch.float32, torch.bfloat16, torch.float16)


def target_of(model: ModelPatcher) -> Target:
    """The Target of a loaded model. Raises TLoRAError for an unknown noise parameterisation."""
    linear = {
        path: module for path, module in modules_by_path(model.model.diffusion_model).items() if is_linear(module)
    }
    sampling = model.get_model_object("model_sampling")
    _, num_timesteps = noise_level(sampling, sampling.sigma_max.reshape(1))
    return Target(
        names=_names(model),
        shapes={path: (module.out_features, module.in_features) for path, module in linear.items()},
        weight=lambda name, rows: _original_weight(model, linear, name, rows),
        base_model=type(model.model.model_config).__name__.lower(),
        num_timesteps=num_timesteps,
        noise_domain=domain(sampling),
        device=exact_device(model.load_device),
    )


def _names(model: ModelPatcher) -> dict[str, str]:
    names = {}
    for name, where in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        key, offset = (
            (where[0], where[1] if len(where) == 2 else None) if isinstance(where, tuple) else (where, (0, None, None))
        )
        # The host's offsets are (dimension, start, length); a third element of the tuple is a function of the weight.
        if offset is None or offset[0] != 0 or not key.startswith(_PREFIX) or not key.endswith(_WEIGHT):
            continue
        path = key[len(_PREFIX) : -len(_WEIGHT)]
        names[plain_name(name)] = path if offset[1] is None else f"{path}@{offset[1]}"
    return names


def _original_weight(model: ModelPatcher, linear: Mapping[str, torch.nn.Module], name: str, rows: int) -> torch.Tensor:
    """The layer's weight as loaded, float32 [rows, in] on the CPU, without its current patches."""
    path, row = split_name(name)
    key = f"{_PREFIX}{path}{_WEIGHT}"
    patched = model.backup.get(key)
    weight = patched.weight if patched is not None else linear[path].weight
    weight = weight.detach()
    if type(weight.data) is not torch.Tensor or weight.dtype not in _PRECISE or weight.is_meta:
        raise TLoRAError(
            f"its base term is not stored and cannot be recomputed, since the model's weight {path} is quantised "
            f"({weight.dtype}); load the model in float16, bfloat16 or float32."
        )
    return weight[row : row + rows].to("cpu", torch.float32)
