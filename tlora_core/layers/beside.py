"""Masked low-rank products beside a layer: right for every layer and rank, at the price of two products."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from .rows import joined, pieces

# Modules whose linear layers make a new tensor in their own forward: torch's, and the host's.
_MAKERS = ("torch.nn.modules.linear", "comfy.ops")


class Factors(NamedTuple):
    """The components of an adapter that are on. up [out, c], down [c, in]; its output starts at `row` of the layer's.
    on: None, or ones for the components that are on, [B, c] or [c]."""

    up: Tensor
    down: Tensor
    row: int = 0
    on: Tensor | None = None


class Beside:
    """The forward of a layer with adapters beside it. `forward` is the layer's own, or whatever stands in for it."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor], overlays: Sequence, is_own: bool):
        """is_own: whether forward is the layer's own."""
        self.layer, self.run, self.overlays, self.is_own = layer, forward, overlays, is_own
        self.may_write = is_own and type(layer).forward.__module__ in _MAKERS

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        output = self.run(x, *args, **kwargs)
        may_write, only = self.may_write and output is not x, self.overlays[0]
        if len(self.overlays) > 1 or not isinstance(only.active, int):
            return add_products(output, x, [factors_of(overlay, x) for overlay in self.overlays], may_write)
        # As nearly always; a model has hundreds of such layers, and then Python's own time counts.
        up, down = only.factors(x.dtype)
        return add_up(output, [F.linear(x.flatten(0, -2), down)], [up], [only.row], may_write)


def factors_of(overlay, x: Tensor) -> Factors:
    """What is on of an `overlay.Overlay`'s adapter, in the dtype of x."""
    if isinstance(overlay.active, int):
        up, down = overlay.factors(x.dtype)
        return Factors(up, down, overlay.row)
    up, down = overlay.adapter.factors()
    return _factors(up, down, overlay.active, overlay.adapter.group, overlay.row, x)


def add_low_rank(
    output: Tensor, x: Tensor, up: Tensor, down: Tensor, active: int | LongTensor, group: int = 1, row: int = 0
) -> Tensor:
    """output + up M_t down x: a linear layer's output plus the first `active` components of its update.

    output [B, ..., n], x [B, ..., in], up [out, group * r], down [group * r, in], all of one dtype and device; the
        update is added to the `out` columns of output from `row` on, row + out <= n.
    active: an int in 0..r for the whole batch, applied by slicing, so that masked components cost nothing; or int64
        [B], one per sample of x's leading dimension. Pass equal samples as an int, or as int64 [] under torch.compile,
        which recompiles for every int.
    group: columns of up per component, see LowRank.

    Returns a new tensor [B, ..., n]. Gradients flow to all four tensors. Raises ValueError for an active of the wrong
    range or shape.
    """
    return add_products(output, x, [_factors(up, down, active, group, row, x)])


def _factors(up: Tensor, down: Tensor, active: int | LongTensor, group: int, row: int, x: Tensor) -> Factors:
    """In the dtype of x. Raises ValueError for an active of the wrong range or shape."""
    if up.dtype != x.dtype:
        up, down = up.to(x.dtype), down.to(x.dtype)
    if isinstance(active, int):
        columns = group * active
        if not 0 <= columns <= down.shape[0]:
            raise ValueError(f"active is {active}; this adapter has {down.shape[0] // group} components.")
        return Factors(up.narrow(1, 0, columns), down.narrow(0, 0, columns), row)
    if active.dim() and active.shape != x.shape[:1]:
        raise ValueError(f"active has shape {list(active.shape)} for x of shape {list(x.shape)}.")
    on = torch.arange(down.shape[0], device=x.device) < group * active.to(x.device)[..., None]
    return Factors(up, down, row, on.to(x.dtype))


def add_products(output: Tensor, x: Tensor, factors: Sequence[Factors], may_write: bool = False) -> Tensor:
    """output [B, ..., n] + up (on * down x) for each of the factors, x [B, ..., in], all of one dtype and device.

    may_write: whether the sum may be written to output, which then is what comes back. Else it is a new tensor.
    """
    hidden = _hidden(x, factors).split([len(each.down) for each in factors], 1)
    return add_up(output, hidden, [each.up for each in factors], [each.row for each in factors], may_write)


def _hidden(x: Tensor, factors: Sequence[Factors]) -> Tensor:
    """What all down factors make of x, side by side [tokens, all c]."""
    tokens = x.flatten(0, -2)
    if len(factors) == 1:
        hidden = F.linear(tokens, factors[0].down)
    elif len(tokens) * (len(factors) - 1) > 2 * sum(len(each.down) for each in factors):
        # Reading x once for all saves more than the copy of the factors takes.
        hidden = F.linear(tokens, torch.cat([each.down for each in factors]))
    else:
        hidden = torch.cat([F.linear(tokens, each.down) for each in factors], 1)
    if all(each.on is None for each in factors):
        return hidden
    return (hidden.view(len(x), -1, hidden.shape[1]) * _mask(x, factors)).flatten(0, 1)


def _mask(x: Tensor, factors: Sequence[Factors]) -> Tensor:
    """Ones for the components that are on [B, 1, all c]."""
    masks = [x.new_ones(len(each.down)) if each.on is None else each.on for each in factors]
    return torch.cat([mask.expand(len(x), mask.shape[-1]) for mask in masks], 1)[:, None]


def add_up(
    output: Tensor, hidden: Sequence[Tensor], ups: Sequence[Tensor], rows: Sequence[int], may_write: bool = False
) -> Tensor:
    """output [..., n] plus each hidden [tokens, c] times its up [out, c], from its row of the output's on.

    A product and its sum are one operation: the update's output is never stored. may_write: see add_products.
    """
    width, may_write = output.shape[-1], may_write and output.is_contiguous()
    if len(ups) == 1 and (up := ups[0]).shape[0] == width:
        if not may_write:
            return torch.addmm(output.flatten(0, -2), hidden[0], up.t()).view(output.shape)
        output.view(-1, width).addmm_(hidden[0], up.t())
        return output
    total = output if may_write else output.clone(memory_format=torch.contiguous_format)
    flat = total.view(-1, width)
    for piece in pieces(rows, [up.shape[0] for up in ups]):
        parts = [ups[i][part] for i, part in zip(piece.indices, piece.parts)]
        flat[:, piece.rows].addmm_(joined([hidden[i] for i in piece.indices], 1), joined(parts, 1).t())
    return total
