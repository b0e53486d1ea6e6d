"""Plain LoRAs that were made of an orthogonal T-LoRA by putting its two terms side by side: up = [P, -P0], down = [A;
A0].

That is how converters give B S A - B0 S0 A0 to programs that know nothing of T-LoRA. A mask on the first ranks of such
a file would switch off the second term alone, which is large, so its components have to be put together again before it
gets a schedule.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...method.adapters import LowRank
from .orthogonal import MIN_LIKENESS, as_low_rank

Halves = tuple[Tensor, Tensor, Tensor, Tensor]


def put_together(layers: dict[str, LowRank]) -> int:
    """Replaces layers of two stacked terms by their difference form, where all layers are such, and else leaves all as
    they are.
    Returns how many of them are."""
    found = {name: together for name, layer in layers.items() if (together := _difference(layer)) is not None}
    if len(found) == len(layers):
        layers.update(found)
    return len(found)


def _difference(layer: LowRank) -> LowRank | None:
    """The layer with two columns a component, if it is of two terms: one half of its columns is nearly the other's
    opposite, as training moves P and A a little from where both terms began. Of a plain LoRA the halves have nothing to
    do with each other."""
    for P, P0, A, A0 in _halves(layer):
        sides = F.cosine_similarity(P, P0, dim=0), F.cosine_similarity(A, A0, dim=1)
        used = P0.any(dim=0) & A0.any(dim=1)  # LyCORIS fills up with zeros
        likeness = -(sides[0] * sides[1])[used]
        if len(likeness) and likeness.mean() >= MIN_LIKENESS:
            flip = torch.where(sides[1] < 0, -1.0, 1.0)  # the minus may be on either side
            one = torch.ones(len(flip))
            return as_low_rank((P, one, A), (-P0 * flip, one, A0 * flip[:, None]))
    return None


def _halves(layer: LowRank) -> Iterator[Halves]:
    """The columns of up and rows of down in two halves: the first and the second, and the odd and the even ones."""
    up, down, half = layer.up.float(), layer.down.float(), layer.up.shape[1] // 2
    if layer.up.shape[1] % 2 == 0:
        yield up[:, :half], up[:, half:], down[:half], down[half:]
        yield up[:, 0::2], up[:, 1::2], down[0::2], down[1::2]
