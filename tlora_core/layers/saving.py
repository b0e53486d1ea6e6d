"""What autograd keeps from the forward for the backward pass, seen and changed on its way."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Packs(threading.local):
    """Of the blocks that are open in this thread, the outermost first."""

    def __init__(self) -> None:
        self.open: list[Callable[[Tensor], Tensor]] = []


_packs = _Packs()


@contextmanager
def saving(pack: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, autograd keeps `pack(tensor)` in place of each tensor that it saves.

    Blocks nest: the outer pack gets what the inner one returns, while torch.autograd.graph.saved_tensors_hooks asks
    the innermost alone. A tensor that is overwritten after that is an error in the backward pass, as without hooks.
    """
    _packs.open.append(pack)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked):
            yield
    finally:
        _packs.open.pop()


def _packed(tensor: Tensor) -> tuple[Tensor, int]:
    for pack in reversed(_packs.open):
        tensor = pack(tensor)
    # Detached: with its history it might hold the graph that holds it, and with that the model, for good.
    return tensor.detach(), tensor._version


def _unpacked(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{list(tensor.shape)}, {tensor._version - version} times since it was saved"
        )
    return tensor
