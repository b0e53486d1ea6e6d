"""The rank mask, and the masked low-rank product."""

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor


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
    if isinstance(active, Tensor):
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


def components_on(active: LongTensor, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, columns]: ones for the first `active` [B] components of each sample, zeros for the rest."""
    return moved((torch.arange(columns, device=active.device) < active[:, None]).to(dtype), device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a copy from CPU to GPU does not wait for the GPU's pending work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
