"""The one masked low-rank product, used by training and sampling alike."""

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor


def low_rank_delta(x: Tensor, up: Tensor, down: Tensor, active: int | LongTensor, group: int = 1) -> Tensor:
    """up M_t down x: the update of a linear layer's output with the first `active` components on.

    x [B, ..., in], up [out, group * r], down [group * r, in], all of one dtype and device.
    active: one int in 0..r for the whole batch, computed by slicing so that masked components cost
        nothing; or int64 [B], one per sample of x's leading dimension. Pass rows that agree as an int.
    group: columns of up per component, see LowRank.

    Returns [B, ..., out]. Gradients flow to x, up and down. Raises ValueError when active does not fit.
    """
    if isinstance(active, Tensor):
        if active.shape != x.shape[:1]:
            raise ValueError(f"active has shape {list(active.shape)} for x of shape {list(x.shape)}.")
        kept = torch.arange(down.shape[0], device=x.device) < group * active[:, None]
        mask = kept.to(x.dtype).view(x.shape[0], *[1] * (x.dim() - 2), -1)
        return F.linear(F.linear(x, down) * mask, up)
    columns = group * active
    if not 0 <= columns <= down.shape[0]:
        raise ValueError(f"active is {active}; this adapter has {down.shape[0] // group} components.")
    return F.linear(F.linear(x, down[:columns]), up[:, :columns])
