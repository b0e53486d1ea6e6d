"""The host's attention functions, and one in place of all of them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.ldm.modules.attention as host

_NAMES = ("optimized_attention", "optimized_attention_masked")


@contextmanager
def pytorch_attention() -> Iterator[None]:
    """Within the block the host's models use PyTorch's attention, which has a backward pass.

    The host may have chosen a kernel without one when it started. Models look their function up in their own module
    under one of _NAMES; a few hand the host no options, in which another could be named.
    """
    found = [
        (module, name, function)
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("comfy.")
        for name in _NAMES
        if _is_attention(function := vars(module).get(name))
    ]
    try:
        for module, name, _ in found:
            setattr(module, name, host.attention_pytorch)
        yield
    finally:
        for module, name, function in found:
            setattr(module, name, function)


def _is_attention(function: Callable | None) -> bool:
    return getattr(function, "__module__", None) == host.__name__
