"""Adapters on a model's linear layers for the length of one evaluation: what is put on, and putting it on and off.

There are four ways to put an adapter on a layer, each a class with a `forward` that stands in for the layer's own:
`beside.Beside`, `folded_weight.FoldedWeight`, `folded_output.FoldedOutput`, and in training `trained.Trained`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
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
    def columns(self) -> int:
        """How many columns of the adapter's up are on, where the whole batch has one rank."""
        assert isinstance(self.active, int)
        return self.active * self.adapter.group

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What is on of up [out, c] and down [c, in], where the whole batch has one rank."""
        up, down = self.adapter.on(self.active * self.adapter.group)
        return (up, down) if up.dtype == dtype else (up.to(dtype), down.to(dtype))


class StandIn:
    """Common part of the ways that last longer than an evaluation: a layer's forward while adapters are folded.

    wanted: the overlays that are on. text: the one that the model is given in this evaluation.
    """

    def __init__(self, layer: nn.Linear, wanted: list[Overlay]):
        self.layer, self.wanted = layer, wanted
        self.text: Text | None = None

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


StandIns = Mapping[nn.Module, StandIn | None]  # what folds into which layers; None: nothing does


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
def overlaid(
    overlays: Iterable[Overlay], folded: Mapping[nn.Linear, StandIn | None] | None = None, text: Text | None = None
):
    """Within the block, which is for one forward pass, each layer gives layer(x) + up M_t down x for its overlays.

    folded: what folds the overlays of which layers; the rest get them beside, or trained, and so do layers for whose
    forward something else stands in, which folding would drop. text: the one that the model is given in this
    evaluation. The layers are as before afterwards, also after an error: the host raises cancellations from inside any
    layer. Blocks nest, each adding to what the outer one gives.
    """
    of_layers: dict[nn.Linear, list[Overlay]] = defaultdict(list)
    for overlay in overlays:
        of_layers[overlay.layer].append(overlay)
    prepared, used = None, []
    try:
        with replaced_forward() as replace:
            for layer, each in of_layers.items():
                fold, standing = folded.get(layer) if folded else None, layer.__dict__.get("forward")
                if fold is not None and (standing is None or standing == fold.forward or not is_replaced(layer)):
                    used.append((fold, len(fold.wanted)))
                    fold.wanted += each
                    fold.text = text
                    if standing != fold.forward:
                        replace(layer, fold.forward)
                elif isinstance(each[0].adapter, BankAdapter) and all(isinstance(o.adapter, BankAdapter) for o in each):
                    prepared = prepared or Prepared()
                    replace(layer, Trained(layer.forward, each, prepared, text).forward)
                else:
                    replace(layer, _beside(layer, standing, each).forward)
            yield
    finally:
        if prepared is not None:
            prepared.clear()
        for fold, count in used:
            del fold.wanted[count:]


def _beside(layer: nn.Linear, standing: Callable | None, overlays: list[Overlay]) -> Beside:
    """With those that are beside the layer already, since all together take fewer steps. standing: what stands in for
    its forward."""
    owner = getattr(standing, "__self__", None)
    if isinstance(owner, Beside):
        return Beside(layer, owner.run, [*owner.overlays, *overlays], owner.is_own)
    return Beside(layer, layer.forward, overlays, standing is None or not is_replaced(layer))
