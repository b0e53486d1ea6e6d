"""The methods that the paper compares with, as adapters that use the same code for training and sampling.

OFT (Qiu et al. 2023) and GSOFT (Gorbunov et al. 2024) rotate a layer's input, W' = W R with R orthogonal: the update
W (R - I) has the weight as up and R - I as down. SVDiff (Han et al. 2023) shifts the weight's singular values: the
update is U diag(change) V^T. None has a mask. Their updates and files are as large as the layers.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import TLoRAError
from .adapters import Adapter
from .starts import Progress, counted


class _OwnModule(nn.Module, Adapter):
    """An adapter that holds its own parameters."""

    @property
    def module(self) -> nn.Module:
        return self


class RotationAdapter(_OwnModule):
    """OFT, or GSOFT if `shuffled`. In OFT, R has `blocks` orthogonal blocks from Cayley's transform. In GSOFT, R is
    P^T L P R' of two such matrices, where the permutation P distributes each block's channels over all blocks. The
    weight is not copied."""

    group = 1

    def __init__(self, weight: Tensor, blocks: int, shuffled: bool):
        super().__init__()
        width = weight.shape[1]
        self.weight, self.shuffled = weight.detach(), shuffled
        self.Q = nn.Parameter(torch.zeros(1 + shuffled, blocks, width // blocks, width // blocks, device=weight.device))
        self.order = torch.arange(width, device=weight.device).view(blocks, -1).t().reshape(-1)

    @property
    def rank(self) -> int:
        """The layer's width: the update is of full rank."""
        return self.weight.shape[1]

    def rotation(self) -> Tensor:
        """R [in, in]; the identity at the start."""
        skew, eye = self.Q - self.Q.mT, torch.eye(self.Q.shape[-1], device=self.Q.device)
        rotated = torch.linalg.solve(eye - skew, eye + skew)
        rotation = torch.block_diag(*rotated[0])
        if self.shuffled:
            rotation = (torch.block_diag(*rotated[1]) @ rotation[self.order])[torch.argsort(self.order)]
        return rotation

    def factors(self) -> tuple[Tensor, Tensor]:
        """(W [out, in], R - I [in, in])."""
        return self.weight, self.rotation() - torch.eye(self.rank, device=self.Q.device)


class SVDiffAdapter(_OwnModule):
    """relu(s + shift) - s on the singular values s of the weight; the shift starts at zero."""

    group = 1

    def __init__(self, weight: Tensor):
        super().__init__()
        self.U, self.s, self.V = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        self.shift = nn.Parameter(torch.zeros_like(self.s))

    @property
    def rank(self) -> int:
        """The number of singular values."""
        return len(self.s)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(U diag(change) [out, k], V^T [k, in])."""
        return self.U * (torch.relu(self.s + self.shift) - self.s), self.V


def baseline_adapters(
    method: str,
    shapes: Mapping[str, tuple[int, int]],
    weight_of: Callable[[str], Tensor],
    blocks: int,
    progress: Progress = lambda done, total: None,
) -> dict[str, Adapter]:
    """One adapter for each layer. shapes: (out, in) by name. weight_of: the weight [out, in] of a name. blocks: of OFT
    and GSOFT ("OFT-32" has 32 blocks); SVDiff ignores it. progress: as in make_adapters.

    Raises TLoRAError for a number of blocks that does not divide a layer's width.
    """
    if method == "svdiff":
        return {name: SVDiffAdapter(weight_of(name)) for name in counted(list(shapes), progress)}
    for name, (_, width) in shapes.items():
        if width % blocks or blocks == width:
            raise TLoRAError(
                f'rank is {blocks}, the number of blocks with the method "{method}", but the layer "{name}" is '
                f"{width} wide; set it to a number that divides this, for example 4 or 8."
            )
    is_shuffled = method == "gsoft"
    return {name: RotationAdapter(weight_of(name), blocks, is_shuffled) for name in counted(list(shapes), progress)}
