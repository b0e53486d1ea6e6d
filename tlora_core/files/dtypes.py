"""The dtypes of T-LoRA files, which are also those of weights that can be read directly."""

import torch

from ..errors import TLoRAError

# By the name in inputs and options.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEADER_DTYPES = ("F16", "BF16", "F32")  # their names in the header of a safetensors file


def require_dtype(dtype: torch.dtype) -> None:
    """Raises TLoRAError when dtype is not one of DTYPES' values."""
    if dtype not in DTYPES.values():
        raise TLoRAError(f"dtype is {dtype}; store in float32, bfloat16 or float16.")


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is stored directly in one of DTYPES: not quantised, and not in a tensor subclass that computes
    its values on use."""
    return type(weight.data) is torch.Tensor and weight.dtype in DTYPES.values()
