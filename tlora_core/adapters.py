"""Trainable adapters of one linear layer, and what is left of them once trained.

Contract of every adapter: `factors()` returns (up [out, group * r], down [group * r, in]) whose product is
the update of the frozen weight [out, in] with all r components on, component i in columns
group * i ... group * (i + 1) - 1, so that keeping the first group * r(t) columns applies the mask M_t.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from .errors import TLoRAError
from .orthogonal import STARTS, layer_generator, orthogonal_start, orthogonal_starts


@dataclass(frozen=True)
class Method:
    """One row of the paper's table of adapters, or one of the methods it compares with (`of_weight`, see baselines)."""

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
    """An update as it is applied and stored: up [out, group * r] times down [group * r, in], scale 1."""

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
        """r, the number of components that a schedule counts."""
        return self.up.shape[1] // self.group

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up, down), as a trainable adapter gives them."""
        return self.up, self.down

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "LowRank":
        """The same update on another device or in another dtype; None keeps the present one."""
        device = self.up.device if device is None else device
        dtype = self.up.dtype if dtype is None else dtype
        return LowRank(self.up.to(device, dtype), self.down.to(device, dtype), self.group)

    def first(self, rank: int) -> "LowRank":
        """The update of the first `rank` components alone, in the same memory."""
        columns = self.group * rank
        return LowRank(self.up[:, :columns], self.down[:columns], self.group)

    def balanced(self) -> "LowRank":
        """The same update, each column of up as long as its row of down, so that both use the range of a half precision
        format alike. A column whose product is zero stays as it is."""
        up_norm, down_norm = self.up.norm(dim=0), self.down.norm(dim=1)
        balance = (down_norm / up_norm).sqrt()
        balance = torch.where((up_norm > 0) & (down_norm > 0), balance, 1.0)
        return LowRank(self.up * balance, self.down / balance[:, None], self.group)


class Adapter(nn.Module):
    """Common part of the adapters; see the module's docstring for the contract."""

    group: int

    @property
    def rank(self) -> int:
        """r, the number of components that a schedule counts."""
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up [out, group * r], down [group * r, in]) of the contract, differentiable in the parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def detach(self) -> LowRank:
        """The update as it stands, balanced, in float32 and apart from the parameters."""
        up, down = (factor.float().clone() for factor in self.factors())
        return LowRank(up, down, self.group).balanced()


class LoRAAdapter(Adapter):
    """B A (LoRA and Vanilla T-LoRA): A [r, in] starts as N(0, (1/r)^2), B [out, r] as zero."""

    group = 1

    def __init__(self, out_features: int, in_features: int, rank: int, generator: Generator | None = None):
        super().__init__()
        _require_rank("the layer", out_features, in_features, rank)
        self.A = nn.Parameter(torch.randn(rank, in_features, generator=generator) / rank)
        self.B = nn.Parameter(torch.zeros(out_features, rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A


class OrthoAdapter(Adapter):
    """B S A - B0 S0 A0 (Ortho-LoRA and T-LoRA, equation 6): A, S, B start at A0, S0, B0, the update at zero.

    B0 [out, r], S0 [r], A0 [r, in], as orthogonal_start returns them. They are kept as buffers outside the
    state dict: a seed or a weight makes them again.
    """

    group = 2

    def __init__(self, B0: Tensor, S0: Tensor, A0: Tensor):
        super().__init__()
        for name, start in (("A", A0), ("S", S0), ("B", B0)):
            self.register_parameter(name, nn.Parameter(start.detach().clone()))
            self.register_buffer(f"{name}0", start.detach(), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The difference form: with P = B S, component i is [P_i - P0_i, P0_i] [A_i; A_i - A0_i].

        Its masked product is B S M A - B0 S0 M A0 without subtracting two nearly equal products, which
        would cost a half precision format all its digits while the adapter is close to its start.
        """
        # B S - B0 S0 in the same manner: a small difference of factors, not of products.
        P0 = self.B0 * self.S0
        moved = (self.B - self.B0) * self.S + self.B0 * (self.S - self.S0)
        up = torch.stack((moved, P0), dim=2).flatten(1)
        down = torch.stack((self.A, self.A - self.A0), dim=1).flatten(0, 1)
        return up, down


def make_adapters(
    method: str,
    start: str,
    layers: Mapping[str, tuple[int, int] | Tensor],
    rank: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> dict[str, Adapter]:
    """One float32 adapter per layer, on device.

    method: a key of METHODS. start: a key of STARTS; LoRA and Vanilla T-LoRA have their own start and
        ignore it.
    layers: layer name -> (out_features, in_features), or the weight [out, in] itself, which the "_weight"
        starts and the methods of_weight need. Equal seeds give equal adapters, each depending on its name and not on the
        other layers.
    rank: of each layer; with the methods of_weight the number of blocks.

    Raises TLoRAError for an unknown method or start, and for a rank that a layer cannot hold.
    """
    if method not in METHODS:
        raise TLoRAError(f'The method is "{method}"; choose one of {", ".join(METHODS)}.')
    if METHODS[method].of_weight:
        from .baselines import baseline_adapters  # which are Adapters themselves

        return baseline_adapters(method, {name: _weight(name, layer, method).to(device) for name, layer in layers.items()}, rank)
    shapes = {name: _shape(layer) for name, layer in layers.items()}
    for name, (out_features, in_features) in shapes.items():
        _require_rank(f'the layer "{name}"', out_features, in_features, rank)
    if not METHODS[method].is_orthogonal:
        return in_stacks(_plain_adapters(shapes, rank, seed, device))
    if start in STARTS and STARTS[start].source == "weight":
        return in_stacks(_weight_adapters(layers, rank, start, device))
    starts = orthogonal_starts(start, list(shapes.values()), rank, seed, names=shapes, device=device)
    return in_stacks({name: OrthoAdapter(*triple) for name, triple in zip(shapes, starts)})


def in_stacks(adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    """Lays the tensors of adapters of one shape one after the other in memory, so that training can work on all at once."""
    of_shapes = defaultdict(list)
    for adapter in adapters.values():
        of_shapes[adapter.A.shape, adapter.B.shape].append(adapter)
    for alike in of_shapes.values():
        for name in (*dict(alike[0].named_parameters()), *dict(alike[0].named_buffers())):
            for adapter, tensor in zip(alike, torch.stack([getattr(adapter, name).detach() for adapter in alike])):
                getattr(adapter, name).data = tensor
    return adapters


def _plain_adapters(
    shapes: dict[str, tuple[int, int]], rank: int, seed: int, device: str | torch.device
) -> dict[str, Adapter]:
    return {name: LoRAAdapter(*shape, rank, layer_generator(seed, name)).to(device) for name, shape in shapes.items()}


def _weight_adapters(
    layers: Mapping[str, tuple[int, int] | Tensor], rank: int, start: str, device: str | torch.device
) -> dict[str, Adapter]:
    adapters = {}
    for name, layer in layers.items():
        weight = _weight(name, layer, start)
        triple = orthogonal_start(start, *weight.shape, rank, weight=weight.to(device))
        adapters[name] = OrthoAdapter(*triple)
    return adapters


def _weight(name: str, layer: tuple[int, int] | Tensor, what: str) -> Tensor:
    if not isinstance(layer, Tensor):
        raise TLoRAError(f'"{what}" needs the weight of the layer "{name}"; give it, or choose a "random" start or another method.')
    return layer


def _shape(layer: tuple[int, int] | Tensor) -> tuple[int, int]:
    out_features, in_features = layer.shape if isinstance(layer, Tensor) else layer
    return out_features, in_features


def _require_rank(where: str, out_features: int, in_features: int, rank: int) -> None:
    width = min(out_features, in_features)
    if not 1 <= rank <= width:
        raise TLoRAError(
            f"rank is {rank}, but {where} is {out_features} x {in_features}; "
            f"set the rank to a number from 1 to {width}."
        )
