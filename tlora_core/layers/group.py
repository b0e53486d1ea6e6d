"""Layers of one shape that are folded together, so that a GPU is given few operations for all of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .overlay import Overlay
from .stacked import Stacked

# Bytes of weights. They stay in a recent card's cache while they are updated, and where no copies are kept it is what
# a group takes for a moment.
GROUP_BYTES = 32 * 2**20

Each = TypeVar("Each")


class Group:
    """Common part of what folds overlays into several layers. wanted: the overlays that are on each of them."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers = layers
        self.wanted: list[list[Overlay]] = [[] for _ in layers]


def grouped(each: Iterable[Each], kind: Callable[[Each], object], size: Callable[[Each], int]) -> list[list[Each]]:
    """Lists of those of one kind, in order, none larger than GROUP_BYTES unless it holds only one."""
    groups: list[list[Each]] = []
    latest: dict[object, tuple[list[Each], int]] = {}
    for one in each:
        key, bytes_of_one = kind(one), size(one)
        group, total = latest.get(key, ([], GROUP_BYTES))
        if total + bytes_of_one > GROUP_BYTES:
            group, total = [], 0
            groups.append(group)
        group.append(one)
        latest[key] = group, total + bytes_of_one
    return groups


def alike(wanted: Sequence[Sequence[Overlay]]) -> bool:
    """Whether all layers have overlays of the same ranks on the same rows, with factors that a stack gives as one
    tensor. A layer alone is like itself."""
    if len(wanted) == 1:
        return True
    return bool(wanted[0]) and len({len(each) for each in wanted}) == 1 and all(map(_is_run, zip(*wanted)))


def _is_run(overlays: Sequence[Overlay]) -> bool:
    """Whether the overlays, one of each layer, have evenly spaced places in one stack, and are alike else."""
    (_, one, active, row), (_, two, _, _) = overlays[:2]
    if not (isinstance(one, Stacked) and isinstance(two, Stacked)) or two.index <= one.index:
        return False
    stack, step = one.stack, two.index - one.index
    return all(
        isinstance(adapter, Stacked)
        and adapter.stack is stack
        and adapter.index == one.index + i * step
        and each_active == active
        and each_row == row
        for i, (_, adapter, each_active, each_row) in enumerate(overlays)
    )


def product(overlays: Sequence[Overlay], dtype: torch.dtype, last: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Of the overlays, one on each of n layers that are `alike`: up [n, rows, c] and down [n, c, in] with the columns
    from first to last."""
    adapters = [overlay.adapter for overlay in overlays]
    if len(adapters) == 1:
        up, down = (factor[None] for factor in adapters[0].on(last, first))
    else:
        places = [adapter.index for adapter in adapters if isinstance(adapter, Stacked)]
        assert isinstance(adapters[0], Stacked)
        up, down = adapters[0].stack.some(range(places[0], places[-1] + 1, places[1] - places[0]), last, first)
    return up.to(dtype), down.to(dtype)
