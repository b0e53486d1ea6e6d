"""Makes the trainable adapters of a model."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import TLoRAError, require_choice
from .adapters import METHODS, Adapters
from .bank import Bank, lora_bank, ortho_bank
from .baselines import baseline_adapters
from .random_streams import generator_for
from .starts import STARTS, Progress, counted, orthogonal_start, orthogonal_starts, require_rank


class WithWeight(Protocol):
    """A layer whose weight [out, in] is made on access, as of a model that does not hold it in float32."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def weight(self) -> Tensor: ...


Layer = tuple[int, int] | Tensor | WithWeight
Layers = Mapping[str, Layer]


def make_adapters(
    method: str,
    start: str,
    layers: Layers,
    rank: int,
    seed: int,
    device: str | torch.device = "cpu",
    progress: Progress = lambda done, total: None,
) -> Adapters:
    """One float32 adapter per layer, on device.

    method: a key of METHODS. start: a key of STARTS; LoRA and Vanilla T-LoRA have their own start and ignore it.
    layers: layer name -> (out_features, in_features), or what the "_weight" starts and the methods with of_weight need:
        the weight [out, in] itself, or a layer WithWeight, whose weight is taken as its turn comes. An adapter depends
        on the seed and its layer, not on the rest of the layers.
    rank: of each adapter; for the methods with of_weight, the number of blocks.
    progress: called with the layers done and all layers, since decomposing weights takes minutes on a large model; an
        exception from it ends the making.

    Raises TLoRAError for an unknown method or start, and for a rank that is too large for a layer.
    """
    require_choice("method", method, METHODS)
    shapes = {name: _shape(layer) for name, layer in layers.items()}
    if METHODS[method].of_weight:
        weight_of = lambda name: _weight(name, layers[name], method).to(device)  # noqa: E731
        return Adapters(baseline_adapters(method, shapes, weight_of, rank, progress))
    for name, shape in shapes.items():
        require_rank(rank, shape, name)
    if not METHODS[method].is_orthogonal:
        starts = [_lora_start(shapes[name], rank, seed, name, device) for name in counted(list(shapes), progress)]
        return _in_banks(shapes, starts, lora_bank)
    if start in STARTS and STARTS[start].source == "weight":
        starts = [
            orthogonal_start(start, *shapes[name], rank, weight=_weight(name, layers[name], start).to(device))
            for name in counted(list(shapes), progress)
        ]
    else:
        starts = orthogonal_starts(
            start, list(shapes.values()), rank, seed, names=shapes, device=device, progress=progress
        )
    return _in_banks(shapes, starts, ortho_bank)


def _in_banks(
    shapes: Mapping[str, tuple[int, int]],
    starts: Sequence[Sequence[Tensor]],
    make: Callable[[Sequence[Any]], Bank],
) -> Adapters:
    """The adapters with these starts; layers of one shape share a bank."""
    members: dict[tuple[int, int], dict[str, Sequence[Tensor]]] = defaultdict(dict)
    for (name, shape), each in zip(shapes.items(), starts):
        members[shape][name] = each
    made = {}
    for alike in members.values():
        bank = make(list(alike.values()))
        made |= {name: bank[i] for i, name in enumerate(alike)}
    return Adapters({name: made[name] for name in shapes})


def _lora_start(
    shape: tuple[int, int], rank: int, seed: int, name: str, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """(B [out, r], zero; A [r, in], drawn from N(0, (1/r)^2) like the reference code)."""
    out_features, in_features = shape
    A = torch.randn(rank, in_features, generator=generator_for(seed, name)) / rank
    return torch.zeros(out_features, rank, device=device), A.to(device)


def _weight(name: str, layer: Layer, what: str) -> Tensor:
    if isinstance(layer, Sequence):
        raise TLoRAError(
            f'"{what}" needs the weight of the layer "{name}"; pass it, or choose a "random" start or another method.'
        )
    return layer if isinstance(layer, Tensor) else layer.weight


def _shape(layer: Layer) -> tuple[int, int]:
    out_features, in_features = layer if isinstance(layer, Sequence) else layer.shape
    return out_features, in_features
