"""Ways of the host that leave a layer's forward out, and what makes it call the forward nevertheless.

An adapter stands in for its layer's forward. Two things of newer hosts compute without it:

- `comfy.ops.linear_input_act` (since 0.30) fuses an activation with the layer behind it, whose weight it reads itself.
- The Comfy Compiler (since about 0.34, on CUDA with dynamic VRAM) records what a block allocates. What an adapter keeps
  from one step to the next is an error to it. It also captures a block as a CUDA graph and replays that instead of
  running the block, with the rank of the step that was captured.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from typing import Any

import comfy.cli_args
import comfy.ops
from torch import Tensor, nn

from ....layers.overlay import is_replaced

_FUSED, _COMPILER = "linear_input_act", "disable_comfy_compiler"
_OURS = "_calls_layers_with_adapters"  # mark of the function below


class _Called:
    """What the host's fused functions take for a layer whose weight they cannot use, so that they call it."""

    weight = None
    _full_precision_mm = True  # a quantised layer with this is called, too

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


def call_layers_with_adapters() -> None:
    """From now on, the host's fused function calls a layer while something stands in for its forward. All others are
    computed as before. It stays for good: the threads of several GPUs would take it off for each other."""
    host: Callable[..., Tensor] | None = getattr(comfy.ops, _FUSED, None)
    if host is None or hasattr(host, _OURS):
        return

    @wraps(host)
    def linear_input_act(linear: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return host(_Called(linear) if is_replaced(linear) else linear, *args, **kwargs)

    setattr(linear_input_act, _OURS, True)
    setattr(comfy.ops, _FUSED, linear_input_act)


@contextmanager
def without_compiler():
    """Within the block the host's compiler is off. It looks at this argument in every evaluation."""
    args = comfy.cli_args.args
    before = getattr(args, _COMPILER, None)
    if before is None:  # a host without it
        yield
        return
    setattr(args, _COMPILER, True)
    try:
        yield
    finally:
        setattr(args, _COMPILER, before)
