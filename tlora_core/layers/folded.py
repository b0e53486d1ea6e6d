"""Masked updates at the price of a plain LoRA, though the rank changes at every step.

Applying up M_t down beside a layer takes two more products at every evaluation. Two things make most of that needless:

- From one evaluation to the next r(t) moves by a component or a few. A copy of the weight that already holds the update
  needs only those added or taken away (`FoldedWeight`).
- A layer that projects the text, as cross-attention's keys and values, gets the same input at every step. What the
  weight alone makes of it, and `down`, need computing once (`FoldedOutput`). This saves more than the T-LoRA costs
  elsewhere.

The layer itself is never written to: whatever happens, its weight is the one that the host loaded.
"""

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .overlay import is_replaced, replaced_forward

# In float32 each step rounds the weight once more, by 6e-8 of its size at most. Below this number of steps the sum
# stays under what is promised of the output, 1e-5, by a wide margin; then the copy is made anew.
STEPS_UNTIL_REBUILD = 32
INPUTS_KEPT = 4  # conditional and unconditional text, and as many again for areas


class Term(NamedTuple):
    """One adapter's part in a layer's output: its first `columns` columns, in the rows from `row` on."""

    up: Tensor
    down: Tensor
    columns: int
    row: int = 0

    def __eq__(self, other: object) -> bool:
        """By the identity of the tensors: comparing what they hold would take longer than folding it."""
        return isinstance(other, Term) and self.columns == other.columns and self.is_same_but_for_columns(other)

    def is_same_but_for_columns(self, other: "Term") -> bool:
        return self.up is other.up and self.down is other.down and self.row == other.row

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.up.shape[0])

    def step(self, weight: Tensor, before: int, after: int, source: Tensor | None = None) -> None:
        """Move `weight`, which holds the first `before` columns of this term, to the first `after`. Where a `source` is
        given, what is moved is that, and `weight` only receives the result."""
        first, last = sorted((before, after))
        base = (weight if source is None else source)[self.rows]
        sign = 1 if after >= before else -1
        torch.addmm(base, self.up[:, first:last], self.down[first:last], alpha=sign, out=weight[self.rows])


class Folded:
    """Stands in for the forward of `layer` with the terms in `wanted`, each under its owner's key and its row."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.source, self.device = layer, layer.weight, layer.weight.device
        self.wanted: dict[Hashable, Term] = {}

    @property
    def is_current(self) -> bool:
        """False once the host has given the layer another weight or moved it off, or while something else stands in for
        its forward, which folding would drop."""
        is_there = self.layer.weight is self.source and self.source.device == self.device
        return is_there and (not is_replaced(self.layer) or self.layer.forward == self.forward)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FoldedWeight(Folded):
    """Folds into a copy of the weight, as large as the weight itself.

    In float32 the copy follows `wanted` by the columns that changed; in half precision it is made from the layer's own
    weight each time, so that it is rounded once, as the host rounds a plain LoRA's.

    fetch: gives weight and bias in the dtype and on the device of a tensor, for the length of a block; None where the
        layer's own are there already.
    """

    def __init__(self, layer: nn.Linear, fetch: Callable[[nn.Module, Tensor], AbstractContextManager] | None = None):
        super().__init__(layer)
        self.fetch = fetch
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._folded: dict[Hashable, Term] = {}
        self._steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.wanted != self._folded:
            self._update(x)
        return F.linear(x, self.weight, self.bias)

    def _update(self, x: Tensor) -> None:
        if self._can_step():
            for key in self._folded.keys() | self.wanted.keys():
                old, new = self._folded.get(key), self.wanted.get(key)
                (new or old).step(self.weight, old.columns if old else 0, new.columns if new else 0)
            self._steps += 1
        else:
            with (
                self.fetch(self.layer, x) if self.fetch else nullcontext((self.source, self.layer.bias)) as (
                    weight,
                    bias,
                )
            ):
                self._rebuild(weight)
                self.bias = bias.clone() if self.fetch and bias is not None else bias
        self._folded = dict(self.wanted)

    def _can_step(self) -> bool:
        """Also when terms come or go, but not when one was replaced by another adapter's."""
        if self.weight is None or self.weight.dtype != torch.float32 or self._steps >= STEPS_UNTIL_REBUILD:
            return False
        return all(
            self._folded[key].is_same_but_for_columns(term) for key, term in self.wanted.items() if key in self._folded
        )

    def _rebuild(self, source: Tensor) -> None:
        self._steps = 0
        if self.weight is None:
            self.weight = torch.empty_like(source)
        terms = list(self.wanted.values())
        if len(terms) == 1 and terms[0].up.shape[0] == self.weight.shape[0]:
            terms[0].step(self.weight, 0, terms[0].columns, source)
            return
        # More than one: sum up in float32, as the host does, so that half precision is rounded once here too.
        total = source.detach().to(torch.float32, copy=True)
        for term in terms:
            term._replace(up=term.up.float(), down=term.down.float()).step(total, 0, term.columns)
        self.weight.copy_(total)


class Input:
    """A layer's input that was met before."""

    def __init__(self, value: Tensor):
        self.value = value


class Inputs:
    """Recognises inputs that come back in a later evaluation. One evaluation's layers share their text, so what they
    hold is compared once an evaluation, and again after each change in place. Tensors made in inference mode count no
    changes; they are compared every time."""

    def __init__(self):
        self._kept: list[Input] = []
        self._seen: list[tuple[Tensor, int, Input]] = []  # holds the tensors, so that none's identity is used again

    def new_evaluation(self) -> None:
        self._seen.clear()

    def recognise(self, x: Tensor) -> Input:
        for tensor, version, known in self._seen:
            if tensor is x and version == x._version:
                return known
        same = (
            i
            for i in self._kept
            if i.value.shape == x.shape and i.value.dtype == x.dtype and i.value.device == x.device
        )
        known = next((i for i in same if torch.equal(i.value, x)), None)
        if known is None:
            known = Input(x.clone())
            self._kept = [known, *self._kept[: INPUTS_KEPT - 1]]
        if not x.is_inference():
            self._seen.append((x, x._version, known))
        return known


@dataclass
class _Output:
    """What a layer made of one input: alone, each term's `down` of it, and the sum with the terms in `folded`."""

    alone: Tensor
    hidden: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict)
    folded: dict[Hashable, Term] | None = None
    total: Tensor | None = None


class FoldedOutput(Folded):
    """Folds into the output for an input that keeps coming back. Correct for any input, but slow for ever new ones."""

    def __init__(self, layer: nn.Linear, inputs: Inputs):
        super().__init__(layer)
        self.inputs = inputs
        self._outputs: WeakKeyDictionary[Input, _Output] = WeakKeyDictionary()

    def forward(self, x: Tensor) -> Tensor:
        known = self.inputs.recognise(x)
        if known not in self._outputs:
            self._outputs[known] = _Output(type(self.layer).forward(self.layer, x))
        output = self._outputs[known]
        if output.folded != self.wanted:
            output.total = output.alone.clone()
            output.hidden = {key: self._hidden(output, key, term, x) for key, term in self.wanted.items()}
            for key, term in self.wanted.items():
                self._add(output.total, term, output.hidden[key][1])
            output.folded = dict(self.wanted)
        return output.total.clone()  # what gets it may change it in place

    def _hidden(self, output: _Output, key, term: Term, x: Tensor) -> tuple[Tensor, Tensor]:
        """(down, down x)."""
        down, hidden = output.hidden.get(key, (None, None))
        return (down, hidden) if down is term.down else (term.down, F.linear(x, term.down))

    def _add(self, total: Tensor, term: Term, hidden: Tensor) -> None:
        part = total[..., term.rows]
        part.copy_(
            torch.addmm(
                part.flatten(0, -2), hidden[..., : term.columns].flatten(0, -2), term.up[:, : term.columns].t()
            ).view(part.shape)
        )


@contextmanager
def folded(key: Hashable, terms: Iterable[tuple[Folded, Term]]):
    """Within the block each layer has its terms, one a row for the owner `key`. The layers are as before afterwards,
    also after an error; what was folded is kept for the next evaluation."""
    used = []
    try:
        with replaced_forward() as replace:
            for fold, term in terms:
                fold.wanted[key, term.row] = term
                used.append((fold, term.row))
                if fold.layer.__dict__.get("forward") != fold.forward:
                    replace(fold.layer, fold.forward)
            yield
    finally:
        for fold, row in used:
            fold.wanted.pop((key, row), None)
