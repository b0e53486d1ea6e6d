"""A masked low-rank product beside a layer: right for every layer and rank, at the price of two products."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor


class Beside:
    """The forward of a layer with adapters beside it. `forward` is the layer's own, or whatever stands in for it."""

    def __init__(self, forward: Callable[..., Tensor], overlays: Sequence):
        self.run, self.overlays = forward, overlays

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        output = self.run(x, *args, **kwargs)
        for _, adapter, active, row in self.overlays:
            up, down = adapter.factors()
            output = add_low_rank(output, x, up.to(x.dtype), down.to(x.dtype), active, adapter.group, row)
        return output


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
    if not isinstance(active, int):
        if active.dim() and active.shape != x.shape[:1]:
            raise ValueError(f"active has shape {list(active.shape)} for x of shape {list(x.shape)}.")
        on = torch.arange(down.shape[0], device=x.device) < group * active.to(x.device)[..., None]
        hidden = F.linear(x, down) * on.to(x.dtype).view(*active.shape, *[1] * (x.dim() - 2), -1)
    else:
        columns = group * active
        if not 0 <= columns <= down.shape[0]:
            raise ValueError(f"active is {active}; this adapter has {down.shape[0] // group} components.")
        hidden, up = F.linear(x, down[:columns]), up[:, :columns]
    if output.shape[-1] != up.shape[0]:
        return output + F.pad(F.linear(hidden, up), (row, output.shape[-1] - row - up.shape[0]))
    # One fused product and sum: the update's output is never stored separately.
    return torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.t()).view(output.shape)
