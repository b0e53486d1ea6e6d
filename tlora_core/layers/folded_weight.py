"""Adapters folded into copies of layers' weights, at the price of a plain LoRA though the rank changes at every step.

The layers themselves are never written to: whatever happens, their weights are those that the host loaded. The copies
are made from those weights, and rounded once, as the host rounds a plain LoRA's. So they are the same whether they are
kept until the rank moves, or made for one use, which takes no memory but for that moment. Only in float32 are copies
that are kept changed by the few components that the rank has gained or lost.

Layers of one shape that follow each other have their copies in one tensor, and get their updates in one product.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .group import Group, alike, product
from .overlay import Overlay, StandIn
from .rows import joined, pieces, spans

# In float32 each step rounds the weight once more, by 6e-8 of its size at most. Below this number of steps the sum
# stays under what is promised of the output, 1e-5, by a wide margin; then the copy is made anew.
STEPS_UNTIL_REBUILD = 32
_NOTHING = torch.empty(0)


class Keeping:
    """Whether the layers of a sampling keep their copies. They stop once the memory for one is not there."""

    def __init__(self, is_on: bool):
        self.is_on = is_on
        self.groups: WeakSet[FoldedWeights] = WeakSet()

    def stop(self) -> None:
        self.is_on = False
        for group in self.groups:
            group.drop()
        logging.getLogger(__name__).warning(
            "Too little memory to keep weights with a T-LoRA folded in; they are made anew at every step, which is a "
            "little slower."
        )


class FoldedWeight(StandIn):
    """One layer's part in a group."""

    def __init__(self, group: "FoldedWeights", index: int):
        super().__init__(group.layers[index], group.wanted[index])
        self.group, self.index = group, index

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.group.copy_of(self.index, x))

    @property
    def weight(self) -> Tensor | None:
        """The layer's copy, if there is one."""
        return self.group.copies[self.index] if self.group.copies else None


class FoldedWeights(Group):
    """Folds into copies of the weights of layers of one shape, in one tensor [n, out, in].

    fetch: gives a layer's weight and bias, in the dtype and on the device of a tensor, for the length of a block; or
        None where they are so already.
    keeping: whether the copies are kept, shared by all groups of a sampling; those that are not go as soon as each
        layer has used its own. is_constant: False where something else has a hand in the weights, which might follow
        the timestep too; then copies are never kept.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        fetch: Callable[[nn.Module, Tensor], AbstractContextManager | None],
        keeping: Keeping,
        is_constant: bool = True,
    ):
        super().__init__(layers)
        self.fetch, self.keeping, self.is_constant = fetch, keeping, is_constant
        self.sources, self.device = [layer.weight for layer in layers], layers[0].weight.device
        self.drop()
        keeping.groups.add(self)

    def stand_ins(self) -> list[FoldedWeight]:
        """Of each layer."""
        return [FoldedWeight(self, i) for i in range(len(self.layers))]

    def drop(self) -> None:
        """Forgets all copies."""
        self.stack = _NOTHING
        self.copies: Sequence[Tensor] = ()  # views of the stack
        self.biases: list[Tensor | None] = [None for _ in self.layers]
        self.steps = 0  # since the copies were made from the weights
        self._forget_folded()

    def _forget_folded(self) -> None:
        self.folded: list[list[Overlay]] = [[] for _ in self.layers]  # what is in the copies
        self.to_use: set[int] = set()  # layers that have not used their copies yet, where these are not kept

    def copy_of(self, i: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The copy of a layer's weight, for a product with x, and the layer's bias. Where it does not hold what is
        wanted, all layers' copies are brought to that."""
        if (
            self.wanted[i] != self.folded[i]
            or self.layers[i].weight is not self.sources[i]
            or self.copies[i].dtype != x.dtype
        ):
            self._update(x)
        found = self.copies[i], self.biases[i]
        if self.to_use:
            self.to_use.discard(i)
            if not self.to_use:
                self.drop()
        return found

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        is_kept = self._keeps()
        if not is_kept or self.stack.dtype != x.dtype:
            self.drop()
        before = self.folded
        self._forget_folded()  # an error half-way leaves none that is half done
        if not self.copies:
            self._allocate(x)
        moves = self.stack.dtype == torch.float32 and self.steps < STEPS_UNTIL_REBUILD
        moves = moves and all(map(_same_places, before, self.wanted))
        whole = alike(self.wanted) and (alike(before) or not moves)
        for part in [range(len(self.layers))] if whole else [[i] for i, each in enumerate(self.wanted) if each]:
            if moves:
                self._move(part, before)
            else:
                self._rebuild(part, before, x)
        self.steps = self.steps + 1 if moves else 0
        self.folded = [list(each) for each in self.wanted]
        if not (is_kept and self.keeping.is_on):
            self.to_use = {i for i, each in enumerate(self.wanted) if each}

    def _keeps(self) -> bool:
        """False once the host has given a layer another weight or moved it off, which is when memory is short."""
        return (
            self.keeping.is_on
            and self.is_constant
            and all(layer.weight is source for layer, source in zip(self.layers, self.sources))
            and all(source.device == self.device for source in self.sources)
        )

    def _allocate(self, x: Tensor) -> None:
        shape = len(self.layers), *self.layers[0].weight.shape
        try:
            self.stack = torch.empty(shape, dtype=x.dtype, device=x.device)
        except torch.OutOfMemoryError:
            if not self.keeping.is_on:
                raise
            self.keeping.stop()
            self.stack = torch.empty(shape, dtype=x.dtype, device=x.device)
        self.copies = self.stack.unbind()

    def _move(self, part: Sequence[int], before: Sequence[list[Overlay]]) -> None:
        """Adds or takes away what the rank has gained or lost."""
        total = self._of(part)
        for was, *now in zip(before[part[0]], *(self.wanted[i] for i in part)):
            first, last = was.columns, now[0].columns
            if first != last:
                up, down = product(now, total.dtype, max(first, last), min(first, last))
                rows = slice(was.row, was.row + up.shape[1])
                total[:, rows].baddbmm_(up, down, alpha=1 if first < last else -1)

    def _rebuild(self, part: Sequence[int], before: Sequence[list[Overlay]], x: Tensor) -> None:
        """Makes the copies from the weights, each number rounded once. Rows that no overlay changes, and changed before
        either, are there already."""
        total, wanted = self._of(part), [self.wanted[i] for i in part]
        factors = [product(each, total.dtype, each[0].columns) for each in zip(*wanted)]
        found = pieces([overlay.row for overlay in wanted[0]], [up.shape[1] for up, _ in factors])
        is_known = all(_same_places(before[i], self.wanted[i]) for i in part)
        self._copy(part, spans(found) if is_known else [slice(0, total.shape[1])], x)
        for piece in found:
            up = joined([factors[i][0][:, rows] for i, rows in zip(piece.indices, piece.parts)], 2)
            total[:, piece.rows].baddbmm_(up, joined([factors[i][1] for i in piece.indices], 1))

    def _copy(self, part: Sequence[int], spans: Sequence[slice], x: Tensor) -> None:
        """Copies those rows of the layers' weights."""
        fetched = {i: self.fetch(self.layers[i], x) for i in part}
        if len(part) > 1 and not any(fetched.values()) and spans == [slice(0, self.stack.shape[1])]:
            torch.stack([self.layers[i].weight for i in part], out=self._of(part))
            self.biases = [layer.bias for layer in self.layers]
            return
        for i, block in fetched.items():
            with block or nullcontext((self.layers[i].weight, self.layers[i].bias)) as (weight, bias):
                for rows in spans:
                    self.copies[i][rows].copy_(weight[rows])
                self.biases[i] = bias if bias is None or block is None else bias.clone()

    def _of(self, part: Sequence[int]) -> Tensor:
        return self.stack[part[0] : part[-1] + 1]


def _same_places(before: Sequence[Overlay], after: Sequence[Overlay]) -> bool:
    """Whether they are the same adapters on the same rows."""
    return len(before) == len(after) and all(a.adapter is b.adapter and a.row == b.row for a, b in zip(before, after))
