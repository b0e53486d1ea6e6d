"""The rank mask, and the masked low-rank product."""

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor


def add_low_rank(
    output: Tensor, x: Tensor, up: Tensor, down: Tensor, active: int | LongTensor, group: int = 1, row: int = 0
) -> Tensor:
    """output + up M_t down x: a linear layer's output with its update's first `active` components on.

    output [B, ..., n], x [B, ..., in], up [out, group * r], down [group * r, in], all of one dtype and device; the
        update is added to the `out` columns of output from `row` on, row + out <= n.
    active: one int in 0..r for the whole batch, computed by slicing so that masked components cost
        nothing; or int64 [B], one per sample of x's leading dimension. Pass rows that agree as an int, or as int64 []
        to torch.compile, which compiles anew for every int.
    group: columns of up per component, see LowRank.

    Returns [B, ..., n], leaving output as it is. Gradients flow to all four. Raises ValueError when active does not
    fit.
    """
    if isinstance(active, int):
        columns = group * active
        if not 0 <= columns <= down.shape[0]:
            raise ValueError(f"active is {active}; this adapter has {down.shape[0] // group} components.")
        hidden, up = F.linear(x, down[:columns]), up[:, :columns]
    else:
        if active.dim() and active.shape != x.shape[:1]:
            raise ValueError(f"active has shape {list(active.shape)} for x of shape {list(x.shape)}.")
        kept = torch.arange(down.shape[0], device=x.device) < group * active.to(x.device)[..., None]
        hidden = F.linear(x, down) * kept.to(x.dtype).view(*active.shape, *[1] * (x.dim() - 2), -1)
    if output.shape[-1] != up.shape[0]:
        return output + F.pad(F.linear(hidden, up), (row, output.shape[-1] - row - up.shape[0]))
    # One fused product and sum: the update is never written out by itself.
    return torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.t()).view(output.shape)


def components_on(active: LongTensor, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, columns] of ones for the first `active` [B] components of each sample and zeros for the others."""
    return moved((torch.arange(columns, device=active.device) < active[:, None]).to(dtype), device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from a CPU without waiting for what a GPU has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
