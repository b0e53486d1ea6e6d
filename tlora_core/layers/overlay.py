"""Adapters on a model's linear layers for the length of one evaluation: what is put on, and putting it on and off.

There are four ways to put an adapter on a layer, each a class with a `forward` that stands in for the layer's own:
`beside.Beside`, `folded_weight.FoldedWeight`, `folded_output.FoldedOutput`, and in training `trained.Trained`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import LongTensor, Tensor, nn

from ..method.adapters import Adapter, LowRank
from ..method.bank import BankAdapter
from .beside import Beside
from .text_memo import Text
from .trained import Prepared, Trained

_ABSENT = object()


class Overlay(NamedTuple):
    """One adapter on one layer, with its first `active` components on: one int, or int64 [B] for samples that differ.

    Its output starts at `row` of the layer's, which has more rows where a model keeps several projections in one layer.
    Two are equal when they put the same adapter with the same rank on the same rows.
    """

    layer: nn.Linear
    adapter: Adapter | LowRank
    active: int | LongTensor
    row: int = 0

    @property
    def update(self) -> LowRank:
        """The adapter, where it is folded: those in training never are, since their factors change."""
        assert isinstance(self.adapter, LowRank)
        return self.adapter


class Folded:
    """Common part of the ways that keep what they computed from one evaluation to the next. `wanted`: what is on."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.source, self.device = layer, layer.weight, layer.weight.device
        self.wanted: list[Overlay] = []
        self.text: Text | None = None

    @property
    def is_current(self) -> bool:
        """False once the host has given the layer another weight or moved it off, or while something else stands in for
        its forward, which folding would drop."""
        is_there = self.layer.weight is self.source and self.source.device == self.device
        return is_there and (not is_replaced(self.layer) or self.layer.forward == self.forward)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def is_replaced(layer: nn.Module) -> bool:
    """Whether something stands in for the layer's own forward. Others may have put that itself there when they were
    done."""
    forward = layer.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(layer).forward


@contextmanager
def replaced_forward():
    """Gives a function that replaces a layer's forward until the block ends, however it ends."""
    replaced = []

    def replace(layer, forward):
        replaced.append((layer, layer.__dict__.get("forward", _ABSENT)))
        layer.__dict__["forward"] = forward

    try:
        yield replace
    finally:
        for layer, forward in reversed(replaced):
            if forward is _ABSENT:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


@contextmanager
def overlaid(overlays: Iterable[Overlay], folded: Mapping[nn.Linear, Folded] | None = None, text: Text | None = None):
    """Within the block, which is for one forward pass, each layer gives layer(x) + up M_t down x for its overlays.

    folded: the layers whose overlays are folded; the rest get them beside, or trained. text: the one that the model is
    given in this evaluation. The layers are as before afterwards, also after an error: the host raises cancellations
    from inside any layer. Blocks nest, each adding to what the outer one gives.
    """
    of_layers: dict[nn.Linear, list[Overlay]] = defaultdict(list)
    for overlay in overlays:
        of_layers[overlay.layer].append(overlay)
    prepared, used = None, []
    try:
        with replaced_forward() as replace:
            for layer, each in of_layers.items():
                fold = folded.get(layer) if folded else None
                if fold is not None:
                    used.append((fold, len(fold.wanted)))
                    fold.wanted += each
                    fold.text = text
                    if layer.__dict__.get("forward") != fold.forward:
                        replace(layer, fold.forward)
                elif all(isinstance(overlay.adapter, BankAdapter) for overlay in each):
                    prepared = prepared or Prepared()
                    replace(layer, Trained(layer.forward, each, prepared, text).forward)
                else:
                    replace(layer, Beside(layer.forward, each).forward)
            yield
    finally:
        if prepared is not None:
            prepared.clear()
        for fold, count in used:
            del fold.wanted[count:]
