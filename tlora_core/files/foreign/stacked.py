"""Plain LoRAs converted from an orthogonal T-LoRA by stacking its two terms: up = [P, -P0], down = [A; A0].

Converters write B S A - B0 S0 A0 this way for programs without T-LoRA support. In such a file, the mask would
switch off the second term only, which is large. So its components must be recombined before it gets a schedule.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...method.adapters import LowRank
from ...method.layer_name import LayerName
from .orthogonal import MIN_LIKENESS, as_low_rank

Halves = tuple[Tensor, Tensor, Tensor, Tensor]


def recombine(layers: dict[LayerName, LowRank]) -> int:
    """Replaces the layers by their difference form if all of them stack two terms. Returns the number of stacked
    layers."""
    found = {name: combined for name, layer in layers.items() if (combined := _difference(layer)) is not None}
    if len(found) == len(layers):
        layers.update(found)
    return len(found)


def _difference(layer: LowRank) -> LowRank | None:
    """The layer with two columns a component if it stacks two terms, else None. Training moves P and A only a little
    from the start, so one half of the columns is nearly the opposite of the other. In a plain LoRA the halves are
    unrelated."""
    for P, P0, A, A0 in _halves(layer):
        sides = F.cosine_similarity(P, P0, dim=0), F.cosine_similarity(A, A0, dim=1)
        used = P0.any(dim=0) & A0.any(dim=1)  # LyCORIS pads with zeros
        likeness = -(sides[0] * sides[1])[used]
        if len(likeness) and likeness.mean() >= MIN_LIKENESS:
            flip = torch.where(sides[1] < 0, -1.0, 1.0)  # the minus may be on either side
            one = torch.ones(len(flip))
            return as_low_rank((P, one, A), (-P0 * flip, one, A0 * flip[:, None]))
    return None


def _halves(layer: LowRank) -> Iterator[Halves]:
    """The two ways to halve the columns of up and the rows of down: first and second half, even and odd ones."""
    up, down, half = layer.up.float(), layer.down.float(), layer.up.shape[1] // 2
    if layer.up.shape[1] % 2 == 0:
        yield up[:, :half], up[:, half:], down[:half], down[half:]
        yield up[:, 0::2], up[:, 1::2], down[0::2], down[1::2]
