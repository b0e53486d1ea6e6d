"""Adapters on a model's linear layers for the length of one evaluation.

Training goes through `attached`, and sampling too wherever `folding` does not serve. Both replace `forward` on the
target layers and put back what was there in `finally`: the host raises cancellations from inside any layer, and other
adapters may be attached to the same layer around this one.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import LongTensor, Tensor, nn

from ..method.bank import BankAdapter
from ..method.masking import add_low_rank
from .frozen import Evaluation, Part, Trained

_ABSENT = object()


class Factors(Protocol):
    """What is attached to a layer: a trainable adapter or a stored `LowRank`."""

    group: int

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up [out, group * r], down [group * r, in])."""


class Attachment(NamedTuple):
    """One adapter on one layer, with the rank it has in this evaluation: one int, or int64 [B] for mixed timesteps. Its
    output starts at `row` of the layer's, which has more rows where a model keeps several projections in one layer."""

    layer: nn.Linear
    adapter: Factors
    active: int | LongTensor
    row: int = 0


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
def attached(attachments: Iterable[Attachment]):
    """Within the block, which is for one forward pass, each layer gives layer(x) + up M_t down x. The layers are as
    before afterwards, also after an error. Attachments nest: an inner one adds to what the outer one gives."""
    of_layers = defaultdict(list)
    for layer, *part in attachments:
        of_layers[layer].append(Part(*part))
    evaluation = Evaluation()
    with replaced_forward() as replace:
        for layer, parts in of_layers.items():
            in_training = all(isinstance(part.adapter, BankAdapter) for part in parts)
            replace(
                layer,
                Trained(layer.forward, parts, evaluation) if in_training else _masked_forward(layer.forward, parts),
            )
        yield


def _masked_forward(forward, parts):
    def masked(x, *args, **kwargs):
        output = forward(x, *args, **kwargs)
        for adapter, active, row in parts:
            up, down = adapter.factors()
            output = add_low_rank(output, x, up.to(x.dtype), down.to(x.dtype), active, adapter.group, row)
        return output

    return masked
