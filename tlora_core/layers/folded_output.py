"""Adapters folded into layers' outputs for a text, which comes back at every step.

A layer that projects the text, as cross-attention's keys and values, gets the same input at every evaluation. What the
weight alone makes of it, and `down`, need computing once. This saves more than the T-LoRA costs elsewhere. Where they
are not kept they are computed anew in the same way, so the output is the same. Layers of one shape get their updates in
one product, as soon as the first of them is called.
"""

from collections.abc import Callable, Sequence
from weakref import ref

import torch
from torch import Tensor, nn

from .group import Group, alike, product
from .overlay import Overlay, StandIn
from .rows import joined, pieces
from .text_memo import Made, Text


class FoldedOutput(StandIn):
    """One layer's part in a group."""

    def __init__(self, group: "FoldedOutputs", index: int):
        super().__init__(group.layers[index], group.wanted[index])
        self.group, self.index = group, index

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output_of(self.index, x, self.text)


class FoldedOutputs(Group):
    """Folds into the outputs of layers of one shape for the evaluation's text.

    is_constant: False where something else has a hand in what the layers make of their input, which might follow the
        timestep too; then nothing is kept.
    """

    def __init__(self, layers: Sequence[nn.Linear], is_constant: bool = True):
        super().__init__(layers)
        self.is_constant = is_constant
        self.ready: dict[int, Tensor] = {}  # outputs that no layer has given yet
        self.ready_for: tuple[Callable[[], Text | None], list[list[Overlay]]] = lambda: None, []  # text and overlays

    def stand_ins(self) -> list[FoldedOutput]:
        """Of each layer."""
        return [FoldedOutput(self, i) for i in range(len(self.layers))]

    def output_of(self, i: int, x: Tensor, text: Text | None) -> Tensor:
        """A layer's output for x: a new tensor, since what gets it may change it in place."""
        if text is None or x is not text.value or x._version != text.version:
            made = Made(self._alone([i], x))
            return self._sum([i], x, made, made.alone)[0]
        known, folded = self.ready_for
        if i not in self.ready or known() is not text or self.wanted[i] != folded[i]:
            self._make(text)
        return self.ready.pop(i)

    def _make(self, text: Text) -> None:
        self.ready.clear()
        on = [i for i, each in enumerate(self.wanted) if each]
        for part in [on] if len(on) == len(self.layers) and alike(self.wanted) else [[i] for i in on]:
            key = self, *part
            made = text.outputs.get(key)
            if made is None:
                made = Made(self._alone(part, text.value))
                if text.is_kept and self.is_constant:
                    text.outputs[key] = made
            total = made.alone.clone() if text.is_kept else made.alone
            self.ready |= zip(part, self._sum(part, text.value, made, total))
        self.ready_for = ref(text), [list(each) for each in self.wanted]  # weak, since the text holds what is made

    def _alone(self, part: Sequence[int], x: Tensor) -> Tensor:
        """What those layers' own forwards make of x [n, B, ..., out]."""
        return torch.stack([type(self.layers[i]).forward(self.layers[i], x) for i in part])

    def _sum(self, part: Sequence[int], x: Tensor, made: Made, total: Tensor) -> Sequence[Tensor]:
        """The layers' outputs, in total, where what they make of x alone is already."""
        tokens = x.flatten(0, -2).expand(len(part), -1, -1)
        known, made.hidden = made.hidden, {}
        hidden, ups, rows = [], [], []
        for overlays in zip(*(self.wanted[i] for i in part)):
            adapter = overlays[0].adapter
            whole = known.get(adapter)
            if whole is None:
                whole = tokens @ product(overlays, x.dtype, adapter.rank * adapter.group)[1].mT
            made.hidden[adapter] = whole
            hidden.append(whole[:, :, : overlays[0].columns])
            ups.append(product(overlays, x.dtype, overlays[0].columns)[0].mT)
            rows.append(overlays[0].row)
        flat = total.flatten(1, -2)
        for piece in pieces(rows, [up.shape[2] for up in ups]):
            parts = [ups[i][:, :, part] for i, part in zip(piece.indices, piece.parts)]
            flat[:, :, piece.rows].baddbmm_(joined([hidden[i] for i in piece.indices], 2), joined(parts, 1))
        return total.unbind()
