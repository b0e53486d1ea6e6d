"""The trainable adapters of a model, at their start."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TLoRAError
from .adapters import METHODS, Adapters
from .bank import Bank, lora_bank, ortho_bank
from .baselines import baseline_adapters
from .starts import STARTS, layer_generator, orthogonal_start, orthogonal_starts

Layers = Mapping[str, tuple[int, int] | Tensor]


def make_adapters(
    method: str, start: str, layers: Layers, rank: int, seed: int, device: str | torch.device = "cpu"
) -> Adapters:
    """One float32 adapter per layer, on device.

    method: a key of METHODS. start: a key of STARTS; LoRA and Vanilla T-LoRA have their own start and
        ignore it.
    layers: layer name -> (out_features, in_features), or the weight [out, in] itself, which the "_weight"
        starts and the methods of_weight need. Equal seeds give equal adapters, each depending on its name and not on
        the other layers.
    rank: of each layer; with the methods of_weight the number of blocks.

    Raises TLoRAError for an unknown method or start, and for a rank that a layer cannot hold.
    """
    if method not in METHODS:
        raise TLoRAError(f'The method is "{method}"; choose one of {", ".join(METHODS)}.')
    if METHODS[method].of_weight:
        weights = {name: _weight(name, layer, method).to(device) for name, layer in layers.items()}
        return Adapters(baseline_adapters(method, weights, rank))
    shapes = {name: _shape(layer) for name, layer in layers.items()}
    for name, shape in shapes.items():
        _require_rank(name, shape, rank)
    if not METHODS[method].is_orthogonal:
        return _in_banks(
            shapes, [_lora_start(shape, rank, seed, name, device) for name, shape in shapes.items()], lora_bank
        )
    if start in STARTS and STARTS[start].source == "weight":
        starts = [
            orthogonal_start(start, *shapes[name], rank, weight=_weight(name, layer, start).to(device))
            for name, layer in layers.items()
        ]
    else:
        starts = orthogonal_starts(start, list(shapes.values()), rank, seed, names=shapes, device=device)
    return _in_banks(shapes, starts, ortho_bank)


def _in_banks(
    shapes: Mapping[str, tuple[int, int]],
    starts: Sequence[Sequence[Tensor]],
    make: Callable[[Sequence[Any]], Bank],
) -> Adapters:
    """The adapters with these starts, those of one shape in one bank."""
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
    """(B [out, r], zero; A [r, in], of N(0, (1/r)^2)), as the reference code draws it."""
    out_features, in_features = shape
    A = torch.randn(rank, in_features, generator=layer_generator(seed, name)) / rank
    return torch.zeros(out_features, rank, device=device), A.to(device)


def _weight(name: str, layer: tuple[int, int] | Tensor, what: str) -> Tensor:
    if not isinstance(layer, Tensor):
        raise TLoRAError(
            f'"{what}" needs the weight of the layer "{name}"; give it, or choose a "random" start or another method.'
        )
    return layer


def _shape(layer: tuple[int, int] | Tensor) -> tuple[int, int]:
    out_features, in_features = layer if isinstance(layer, Sequence) else layer.shape
    return out_features, in_features


def _require_rank(name: str, shape: tuple[int, int], rank: int) -> None:
    if not 1 <= rank <= min(shape):
        raise TLoRAError(
            f'rank is {rank}, but the layer "{name}" is {shape[0]} x {shape[1]}; '
            f"set the rank to a number from 1 to {min(shape)}."
        )
