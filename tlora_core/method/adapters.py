"""Trainable adapters of linear layers, and the low-rank updates that result from them.

Contract of every adapter: `factors()` returns (up [out, group * r], down [group * r, in]). Their product is the update
of the frozen weight [out, in] with all r components active. Component i has columns group * i ... group * (i + 1) - 1,
so the first group * r(t) columns apply the mask M_t.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TLoRAError
from .layer_name import LayerName


@dataclass(frozen=True)
class Method:
    """An adapter of the paper's table, or a method that the paper compares with (`of_weight`, see baselines)."""

    is_orthogonal: bool
    is_masked: bool
    of_weight: bool = False

    @property
    def group(self) -> int:
        """Columns of up per component."""
        return 2 if self.is_orthogonal else 1


METHODS = {
    "lora": Method(is_orthogonal=False, is_masked=False),
    "vanilla_tlora": Method(is_orthogonal=False, is_masked=True),
    "ortho_lora": Method(is_orthogonal=True, is_masked=False),
    "tlora": Method(is_orthogonal=True, is_masked=True),
    "oft": Method(is_orthogonal=False, is_masked=False, of_weight=True),
    "gsoft": Method(is_orthogonal=False, is_masked=False, of_weight=True),
    "svdiff": Method(is_orthogonal=False, is_masked=False, of_weight=True),
}


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update in its applied and stored form: up [out, group * r] times down [group * r, in], scale 1."""

    up: Tensor
    down: Tensor
    group: int = 1

    def __post_init__(self) -> None:
        fits = self.up.dim() == self.down.dim() == 2 and self.up.shape[1] == self.down.shape[0]
        if not fits or self.group not in (1, 2) or self.up.shape[1] == 0 or self.up.shape[1] % self.group:
            raise TLoRAError(
                f"An update with up {list(self.up.shape)}, down {list(self.down.shape)} and {self.group} columns per "
                "component is not valid; up must be [out, group * rank], down [group * rank, in], group 1 or 2."
            )

    @property
    def rank(self) -> int:
        """r, the number of components in the schedule."""
        return self.up.shape[1] // self.group

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def is_finite(self) -> bool:
        """Whether both factors are free of NaN and infinite values."""
        return bool(self.up.isfinite().all() and self.down.isfinite().all())

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up, down), like a trainable adapter's."""
        return self.up, self.down

    def on(self, last: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """(up [out, last - first], down [last - first, in]): those columns and rows, as views of the same memory."""
        return self.up[:, first:last], self.down[first:last]

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "LowRank":
        """The same update on another device or in another dtype; None keeps the current one."""
        device = self.up.device if device is None else device
        dtype = self.up.dtype if dtype is None else dtype
        return LowRank(self.up.to(device, dtype), self.down.to(device, dtype), self.group)

    def first(self, rank: int) -> "LowRank":
        """The update with only the first `rank` components, as views of the same memory."""
        columns = self.group * rank
        return LowRank(self.up[:, :columns], self.down[:columns], self.group)

    def balanced(self) -> "LowRank":
        """The same update with equal norms of each column of up and its row of down, so that both use the range of a
        half-precision format equally. Columns whose product is zero are unchanged."""
        up_norm, down_norm = self.up.norm(dim=0), self.down.norm(dim=1)
        balance = (down_norm / up_norm).sqrt()
        balance = torch.where((up_norm > 0) & (down_norm > 0), balance, 1.0)
        return LowRank(self.up * balance, self.down / balance[:, None], self.group)


class Adapter:
    """Base class of the trainable adapters; the module's docstring has the contract.

    module: the nn.Module that holds the parameters, possibly of several adapters.
    """

    group: int
    rank: int  # r, the number of components in the schedule
    module: nn.Module

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up [out, group * r], down [group * r, in]) of the contract, differentiable in the parameters."""
        raise NotImplementedError

    def on(self, last: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """(up [out, last - first], down [last - first, in]): those columns and rows of the factors."""
        up, down = self.factors()
        return up[:, first:last], down[first:last]

    @torch.no_grad()
    def detach(self) -> LowRank:
        """The current update, balanced, in float32 and detached from the parameters."""
        up, down = (factor.float().clone() for factor in self.factors())
        return LowRank(up, down, self.group).balanced()


class Adapters(Mapping[LayerName, Adapter]):
    """The trainable adapters of a model by layer name, and the modules that hold their parameters."""

    def __init__(self, by_name: Mapping[str, Adapter]):
        self._by_name = {LayerName(name): adapter for name, adapter in by_name.items()}
        self.modules = list({id(adapter.module): adapter.module for adapter in by_name.values()}.values())

    def __getitem__(self, name: str) -> Adapter:
        return self._by_name[LayerName(name)]

    def __iter__(self) -> Iterator[LayerName]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of all adapters."""
        return [parameter for module in self.modules for parameter in module.parameters()]

    def buffers(self) -> list[Tensor]:
        """The frozen starts of all adapters."""
        return [buffer for module in self.modules for buffer in module.buffers()]

    def to(self, *where) -> "Adapters":
        """Moves or casts all adapters in place, like nn.Module.to; returns self."""
        for module in self.modules:
            module.to(*where)
        return self


def difference_form(trained: Sequence[Tensor], start: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(up [out, 2 r], down [2 r, in]) of B S A - B0 S0 A0 (equation 6), given (B [out, r], S [r], A [r, in]) and start.

    With P = B S, component i is [P_i - P0_i, P0_i] [A_i; A_i - A0_i]. The masked product equals B S M A - B0 S0 M A0
    without a subtraction of nearly equal products, which would lose all digits in half precision while the adapter is
    close to its start.
    """
    (B, S, A), (B0, S0, A0) = trained, start
    # B S - B0 S0 in the same way: from small differences of factors, not of products.
    moved = (B - B0) * S + B0 * (S - S0)
    up = torch.stack((moved, B0 * S0), dim=2).flatten(1)
    down = torch.stack((A, A - A0), dim=1).flatten(0, 1)
    return up, down
