"""Updates of one shape in two stacked tensors: the components that are on become views for all layers at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..method.adapters import LowRank

Name = TypeVar("Name")


@dataclass(frozen=True, eq=False, kw_only=True)
class Stacked(LowRank):
    """An update whose factors are slices of a stack."""

    stack: "Stack"
    index: int

    def on(self, last: int, first: int = 0) -> tuple[Tensor, Tensor]:
        return self.stack.on(last, first)[self.index]


class Stack:
    """Factors of n updates: up is kept transposed [n, group * r, out], down [n, group * r, in]."""

    def __init__(self, updates: Sequence[LowRank], strength: float, device: torch.device, dtype: torch.dtype):
        (columns, rows), width = updates[0].up.t().shape, updates[0].down.shape[1]
        self.up = torch.empty(len(updates), columns, rows, device=device, dtype=dtype)
        self.down = torch.empty(len(updates), columns, width, device=device, dtype=dtype)
        for up, down, update in zip(self.up, self.down, updates):
            up.copy_((update.up * strength).t())
            down.copy_(update.down)
        self._given: tuple[int, int] | None = None
        self._on: list[tuple[Tensor, Tensor]] = []

    def on(self, last: int, first: int = 0) -> list[tuple[Tensor, Tensor]]:
        """up [out, last - first] and down [last - first, in] of each update, as views."""
        if self._given != (last, first):
            ups, downs = self.up[:, first:last].transpose(1, 2), self.down[:, first:last]
            self._on, self._given = list(zip(ups.unbind(), downs.unbind())), (last, first)
        return self._on

    def some(self, of: range, last: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """up [n, out, last - first] and down [n, last - first, in] of those updates, as views."""
        chosen = slice(of.start, of.stop, of.step)
        return self.up[chosen, first:last].transpose(1, 2), self.down[chosen, first:last]


def stacked(
    updates: Mapping[Name, LowRank], strength: float, device: torch.device, dtype: torch.dtype
) -> dict[Name, Stacked]:
    """Copies of updates, scaled by strength, on a device in a dtype; those of one shape in one stack."""
    of_shapes: dict[tuple, list[Name]] = {}
    for name, update in updates.items():
        of_shapes.setdefault((update.up.shape, update.down.shape, update.group), []).append(name)
    copies = {}
    for (_, _, group), names in of_shapes.items():
        stack = Stack([updates[name] for name in names], strength, device, dtype)
        for i, name in enumerate(names):
            copies[name] = Stacked(stack.up[i].t(), stack.down[i], group, stack=stack, index=i)
    return {name: copies[name] for name in updates}
