"""Adapters folded into a copy of a layer's weight, at the price of a plain LoRA though the rank changes at every step.

The layer itself is never written to: whatever happens, its weight is the one that the host loaded. The copy is made
from that weight, and rounded once, as the host rounds a plain LoRA's. So it is the same whether it is kept until the
rank moves, or made for one use, which takes no memory but for that moment. Only in float32 is a copy that is kept
changed by the few components that the rank has gained or lost.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .overlay import Overlay, StandIn
from .rows import joined, pieces, spans

# In float32 each step rounds the weight once more, by 6e-8 of its size at most. Below this number of steps the sum
# stays under what is promised of the output, 1e-5, by a wide margin; then the copy is made anew.
STEPS_UNTIL_REBUILD = 32


class Keeping:
    """Whether the layers of a sampling keep their copies. They stop once the memory for one is not there."""

    def __init__(self, is_on: bool):
        self.is_on = is_on

    def stop(self) -> None:
        self.is_on = False
        logging.getLogger(__name__).warning(
            "Too little memory to keep weights with a T-LoRA folded in; they are made anew at every step, which is a "
            "little slower."
        )


class FoldedWeight(StandIn):
    """Folds into a copy of the weight, as large as the weight itself.

    fetch: gives the layer's weight and bias, in the dtype and on the device of a tensor, for the length of a block; or
        None where they are so already.
    keeping: whether the copy is kept, shared by all layers of a sampling. is_constant: False where something else has a
        hand in the weight, which might follow the timestep too; then the copy is never kept.
    """

    def __init__(
        self,
        layer: nn.Linear,
        fetch: Callable[[nn.Module, Tensor], AbstractContextManager | None],
        keeping: Keeping,
        is_constant: bool = True,
    ):
        super().__init__(layer)
        self.fetch, self.keeping, self.is_constant = fetch, keeping, is_constant
        self.source, self.device = layer.weight, layer.weight.device
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._folded: list[Overlay] = []
        self._steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if self._keeps(x):
            copy = self.weight if self.wanted == self._folded else self._updated(x)
            if copy is not None:
                return F.linear(x, copy, self.bias)
        self.weight, self._folded = None, []
        fetched = self.fetch(self.layer, x)
        if fetched is None:
            return F.linear(x, fold(self.layer.weight, self.wanted), self.layer.bias)
        with fetched as (weight, bias):
            return F.linear(x, fold(weight, self.wanted), bias)

    def _keeps(self, x: Tensor) -> bool:
        """False once the host has given the layer another weight or moved it off, which is when memory is short."""
        if not self.keeping.is_on or not self.is_constant:
            return False
        is_there = self.layer.weight is self.source and self.source.device == self.device
        return is_there and (self.weight is None or self.weight.dtype == x.dtype)

    def _updated(self, x: Tensor) -> Tensor | None:
        """The copy with what is wanted; None if there is no memory for it."""
        copy, self.weight = self.weight, None  # an error half-way leaves none that is half done
        if copy is not None and copy.dtype == torch.float32 and self._steps < STEPS_UNTIL_REBUILD:
            self._follow(copy)
            self._steps += 1
        else:
            copy, self._steps = self._rebuilt(x, copy), 0
        self.weight, self._folded = copy, list(self.wanted)
        return copy

    def _follow(self, weight: Tensor) -> None:
        """Adds and takes away what has changed since the last evaluation."""
        before = {(overlay.adapter, overlay.row): overlay for overlay in self._folded}
        for overlay in self.wanted:
            was = before.pop((overlay.adapter, overlay.row), None)
            _move(weight, overlay, 0 if was is None else was.columns, overlay.columns)
        for overlay in before.values():
            _move(weight, overlay, overlay.columns, 0)

    def _rebuilt(self, x: Tensor, copy: Tensor | None) -> Tensor | None:
        fetched = self.fetch(self.layer, x)
        if fetched is None and copy is not None:
            return fold(self.layer.weight, self.wanted, copy, self._folded)
        with fetched or nullcontext((self.layer.weight, self.layer.bias)) as (weight, bias):
            if copy is not None:
                return fold(weight, self.wanted, copy, self._folded)
            try:
                copy = torch.empty_like(weight)
            except torch.OutOfMemoryError:
                self.keeping.stop()
                return None
            self.bias = None if bias is None else bias.clone()
            return fold(weight, self.wanted, copy)


def _same_rows(before: Sequence[Overlay], after: Sequence[Overlay]) -> bool:
    return len(before) == len(after) and all(a.adapter is b.adapter and a.row == b.row for a, b in zip(before, after))


def _move(weight: Tensor, overlay: Overlay, was: int, now: int) -> None:
    """From so many columns of the overlay's adapter to so many."""
    if was == now:
        return
    up, down = overlay.adapter.on(max(was, now), min(was, now))
    rows = weight if up.shape[0] == weight.shape[0] else weight[overlay.row : overlay.row + up.shape[0]]
    rows.addmm_(up, down, alpha=1 if now > was else -1)


def fold(
    weight: Tensor, overlays: Sequence[Overlay], copy: Tensor | None = None, before: Sequence[Overlay] = ()
) -> Tensor:
    """A copy of the weight [out, in] with the overlays' active components added, each number rounded once.

    copy: where to write it; None for a new tensor. before: the overlays that are in `copy`; where they have the same
        rows, those that no overlay changes are there already.
    """
    if weight.requires_grad:
        weight = weight.detach()
    factors = [overlay.factors(weight.dtype) for overlay in overlays]
    up, down = factors[0]
    if len(factors) == 1 and up.shape[0] == weight.shape[0]:
        return torch.addmm(weight, up, down) if copy is None else torch.addmm(weight, up, down, out=copy)
    found = pieces([overlay.row for overlay in overlays], [up.shape[0] for up, _ in factors])
    total = weight.clone() if copy is None else copy
    if copy is not None:
        for rows in spans(found) if _same_rows(before, overlays) else [slice(None)]:
            total[rows].copy_(weight[rows])
    for piece in found:
        up = joined([factors[i][0][part] for i, part in zip(piece.indices, piece.parts)], 1)
        total[piece.rows].addmm_(up, joined([factors[i][1] for i in piece.indices], 0))
    return total
