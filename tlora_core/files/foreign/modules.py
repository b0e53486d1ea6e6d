"""Groups a file's keys, "<module><suffix>", by module; the suffix identifies the part."""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...errors import TLoRAError
from .model_description import Matches

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Part -> its suffixes, tried in this order: a suffix comes before those that it ends in.
_SUFFIXES = {
    "base_q": ("_lora.base_q.weight", ".base_q.weight"),
    "base_p": ("_lora.base_p.weight", ".base_p.weight"),
    "base_lambda": ("_lora.base_lambda", ".base_lambda", ".base_lambda_buf"),
    "q": ("_lora.q_layer.weight", ".q_layer.weight"),
    "p": ("_lora.p_layer.weight", ".p_layer.weight"),
    "lambda": ("_lora.lambda_layer", ".lambda_layer"),
    "up": (
        ".lora_up.weight",
        ".lora_B.weight",
        ".lora_B.default.weight",
        ".lora_B",
        ".lora.up.weight",
        ".lora_linear_layer.up.weight",
        "_lora.up.weight",
    ),
    "down": (
        ".lora_down.weight",
        ".lora_A.weight",
        ".lora_A.default.weight",
        ".lora_A",
        ".lora.down.weight",
        ".lora_linear_layer.down.weight",
        "_lora.down.weight",
    ),
    "alpha": ("_lora.alpha", ".alpha"),
}
_PARTS = [(suffix, part) for part, suffixes in _SUFFIXES.items() for suffix in suffixes]
# Tensors of other kinds of adapters, beside a pair or in place of it.
_OTHER = re.compile(
    r"\.(dora_scale|lora_magnitude_vector.*|lora_mid\.weight|reshape_weight|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|"
    r"diff|diff_b|set_weight|a1\.weight|a2\.weight|b1\.weight|b2\.weight|lora_[AB]\.bias|on_input|scalar)$",
    re.DOTALL,  # otherwise a name with line breaks takes quadratic time
)

Parts = dict[str, str]


def modules_of(keys: Iterable[str], matches: Matches) -> dict[str, Parts]:
    """Module -> part -> key, for the keys of low-rank adapters; other keys are rejected with a reason.

    Raises TLoRAError when two keys are the same part of one module.
    """
    modules: dict[str, Parts] = {}
    changed = {}
    for key in sorted(keys):
        suffix, part = next(((s, p) for s, p in _PARTS if key.endswith(s)), ("", ""))
        if not part:
            other = _OTHER.search(key)
            matches.reject(
                [key], f"{other[1][:50]} is not a part of a plain LoRA" if other else "it is not part of a LoRA"
            )
            if other:
                changed[key[: other.start()]] = other[1][:50]
            continue
        parts = modules.setdefault(key[: -len(suffix)], {})
        if part in parts:
            raise TLoRAError(f"its tensors {parts[part]!r} and {key!r} are the same part of one layer; get it again.")
        parts[part] = key
    for module in changed.keys() & modules.keys():  # without the rejected part, the pair means something else
        matches.reject(
            modules.pop(module).values(), f"{changed[module]} changes what its layer does; use the Load LoRA node"
        )
    return modules


def require(module: str, parts: Mapping[str, str], wanted: Iterable[str]) -> None:
    """Raises TLoRAError unless a module has all wanted parts."""
    missing = [part for part in wanted if part not in parts]
    if missing:
        raise TLoRAError(f'the "{", ".join(missing)}" part of its layer "{module}" is missing; get it again.')


def matrix(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor as a float32 matrix; a convolution kernel of 1x1 counts as a matrix.

    Raises TLoRAError for other shapes and dtypes, NaN and infinite values.
    """
    tensor = number(tensors, key)
    if tensor.dim() > 2 and math.prod(tensor.shape[2:]) == 1:
        tensor = tensor.flatten(1)
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise TLoRAError(f"its tensor {key!r} has the shape {list(tensor.shape)}, which is not a matrix; get it again.")
    return tensor


def number(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor of numbers in float32. Raises TLoRAError for other dtypes, NaN and infinite values."""
    tensor = tensors[key]
    if tensor.dtype not in FLOATS and not (tensor.numel() == 1 and not tensor.dtype.is_complex):
        raise TLoRAError(f"its tensor {key!r} is {tensor.dtype}; save it in float32, bfloat16 or float16.")
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise TLoRAError(f"its tensor {key!r} has NaN or infinite values; get it again, or train it again.")
    return tensor


def scale_of(tensors: Mapping[str, Tensor], parts: Mapping[str, str], rank: int, default: float = 1.0) -> float:
    """alpha / rank, or `default` without an alpha. Raises TLoRAError when alpha is not a single number."""
    if "alpha" not in parts:
        return default
    alpha = number(tensors, parts["alpha"])
    if alpha.numel() != 1:
        raise TLoRAError(f"its tensor {parts['alpha']!r} has {alpha.numel()} numbers instead of one; get it again.")
    return alpha.item() / rank


def is_convolution(tensors: Mapping[str, Tensor], parts: Mapping[str, str]) -> bool:
    return any(tensors[key].dim() > 2 for part, key in parts.items() if part != "alpha")
