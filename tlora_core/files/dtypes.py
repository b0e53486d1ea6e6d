"""The dtypes that T-LoRA files are stored in, and in which a model's weights can be read as they are."""

import torch

from ..errors import TLoRAError

# By the name that a user chooses.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEADER_DTYPES = ("F16", "BF16", "F32")  # the same by their names in the header of a safetensors file


def require_dtype(dtype: torch.dtype) -> None:
    """Raises TLoRAError when dtype is not one of DTYPES' values."""
    if dtype not in DTYPES.values():
        raise TLoRAError(f"dtype is {dtype}; store in float32, bfloat16 or float16.")


def is_plain(weight: torch.Tensor) -> bool:
    """Whether the numbers of a weight are stored as they are, in one of DTYPES: not quantised, not in a subclass that
    makes them when they are used."""
    return type(weight.data) is torch.Tensor and weight.dtype in DTYPES.values()
