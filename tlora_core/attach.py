"""Adapters on a model's linear layers for the length of one evaluation.

Training and sampling both go through `attached`, so the mask cannot differ between them. It replaces `forward` on the
target layers and puts back what was there in `finally`: the host raises cancellations from inside any layer, and
other adapters may be attached to the same layer around this one.
"""
from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import LongTensor, Tensor, nn

from .masking import low_rank_delta

_ABSENT = object()


class Factors(Protocol):
    """What is attached to a layer: a trainable adapter or a stored `LowRank`."""

    group: int

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up [out, group * r], down [group * r, in])."""


class Attachment(NamedTuple):
    """One adapter on one layer, with the rank it has in this evaluation: one int, or int64 [B] for mixed timesteps."""

    layer: nn.Linear
    adapter: Factors
    active: int | LongTensor


@contextmanager
def attached(attachments: Iterable[Attachment]):
    """Within the block each layer gives layer(x) + up M_t down x. The layers are as before afterwards, also after an
    error. Attachments nest: an inner one adds to what the outer one gives."""
    replaced = []
    try:
        for layer, adapter, active in attachments:
            replaced.append((layer, layer.__dict__.get("forward", _ABSENT)))
            layer.__dict__["forward"] = _masked_forward(layer.forward, adapter, active)
        yield
    finally:
        for layer, forward in reversed(replaced):
            if forward is _ABSENT:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


def _masked_forward(forward, adapter, active):
    def masked(x, *args, **kwargs):
        up, down = adapter.factors()
        return forward(x, *args, **kwargs) + low_rank_delta(x, up.to(x.dtype), down.to(x.dtype), active, adapter.group)

    return masked
