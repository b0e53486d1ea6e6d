"""Adapters folded into a copy of a layer's weight, at the price of a plain LoRA though the rank changes at every step.

From one evaluation to the next r(t) moves by a component or a few. A copy of the weight that already holds the update
needs only those added or taken away. The layer itself is never written to: whatever happens, its weight is the one
that the host loaded.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.adapters import LowRank
from .overlay import Folded, Overlay

# In float32 each step rounds the weight once more, by 6e-8 of its size at most. Below this number of steps the sum
# stays under what is promised of the output, 1e-5, by a wide margin; then the copy is made anew.
STEPS_UNTIL_REBUILD = 32


class FoldedWeight(Folded):
    """Folds into a copy of the weight, as large as the weight itself.

    In float32 the copy follows `wanted` by the components that changed; in half precision it is made from the layer's
    own weight each time, so that it is rounded once, as the host rounds a plain LoRA's.

    fetch: gives weight and bias in the dtype and on the device of a tensor, for the length of a block; None where the
        layer's own are there already.
    """

    def __init__(self, layer: nn.Linear, fetch: Callable[[nn.Module, Tensor], AbstractContextManager] | None = None):
        super().__init__(layer)
        self.fetch = fetch
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._folded: list[Overlay] = []
        self._steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.wanted != self._folded:
            if self.weight is None or self.weight.dtype != torch.float32 or self._steps >= STEPS_UNTIL_REBUILD:
                self._rebuild(x)
            else:
                self._follow()
            self._folded = list(self.wanted)
        return F.linear(x, self.weight, self.bias)

    def _follow(self) -> None:
        """Adds and takes away what has changed since the last evaluation."""
        before, after = ({(o.update, o.row): o.active for o in each} for each in (self._folded, self.wanted))
        for update, row in before | after:
            _add(self.weight, update, row, before.get((update, row), 0), after.get((update, row), 0))
        self._steps += 1

    def _rebuild(self, x: Tensor) -> None:
        own = self.fetch(self.layer, x) if self.fetch else nullcontext((self.source, self.layer.bias))
        with own as (weight, bias):
            self.bias = bias.clone() if self.fetch and bias is not None else bias
            folded = self.weight = torch.empty_like(weight) if self.weight is None else self.weight
            self._steps = 0
            only = self.wanted[0] if len(self.wanted) == 1 else None
            if only and only.update.up.shape[0] == folded.shape[0]:
                _add(folded, only.update, 0, 0, only.active, weight)
                return
            # More than one: sum up in float32, as the host does, so that half precision is rounded once here too.
            total = weight.detach().to(torch.float32, copy=True)
            for overlay in self.wanted:
                _add(total, overlay.update.to(dtype=torch.float32), overlay.row, 0, overlay.active)
            folded.copy_(total)


def _add(weight: Tensor, update: LowRank, row: int, before: int, after: int, source: Tensor | None = None) -> None:
    """Move `weight`, which holds the first `before` components of an update in the rows from `row` on, to the first
    `after`. Where a `source` is given, what is moved is that, and `weight` only receives the result."""
    up, down = update.up, update.down
    rows = slice(row, row + up.shape[0])
    first, last = sorted((before * update.group, after * update.group))
    base = (weight if source is None else source)[rows]
    torch.addmm(base, up[:, first:last], down[first:last], alpha=1 if after >= before else -1, out=weight[rows])
