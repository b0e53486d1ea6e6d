"""Layers whose weights are packed as in a GGUF file, for counting: they have bytes and no numbers."""

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Q8_0: a byte for each of 32 numbers, and a float16 scale for them together.
NUMBERS, BYTES = 32, 34


def pack(blocks: Iterable[nn.Module]) -> None:
    """Packs the matrices of the blocks' linear layers, which then unpack them at each use, as the layers of
    ComfyUI-GGUF do. Files leave the few layers outside of blocks as they are."""
    for layer in (module for block in blocks for module in block.modules()):
        if isinstance(layer, nn.Linear):
            size = layer.out_features, layer.in_features // NUMBERS * BYTES
            packed = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
            layer.weight = nn.Parameter(packed, requires_grad=False)
            layer.comfy_cast_weights = True
            layer.cast_bias_weight = partial(_unpacked, layer)
            layer.forward_comfy_cast_weights = partial(_forward, layer)


def _unpacked(layer: nn.Linear, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The packed bytes on the device, their product with the scales in float16, and that in the dtype of `like`."""
    packed = layer.weight.to(like.device)
    weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.float16, device=packed.device)
    bias = None if layer.bias is None else layer.bias.to(like.device, like.dtype)
    return weight.to(like.dtype), bias


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, *_unpacked(layer, x))
