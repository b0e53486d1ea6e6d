"""Which rows of a layer belong to which of its adapters: a model may keep several projections in one layer."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Rows of a layer that the same adapters change: of the adapter of each index, the rows of its own in `parts`."""

    rows: slice
    indices: tuple[int, ...]
    parts: tuple[slice, ...]


def pieces(starts: Sequence[int], counts: Sequence[int]) -> tuple[Piece, ...]:
    """The pieces of all rows that adapters change, in order, given each adapter's first row and number of rows."""
    find = _find if torch.compiler.is_compiling() else _found  # a compiler warns of a cache
    return find(tuple(starts), tuple(counts))


def _find(starts: tuple[int, ...], counts: tuple[int, ...]) -> tuple[Piece, ...]:
    spans = [(start, start + count) for start, count in zip(starts, counts)]
    bounds = sorted({bound for span in spans for bound in span})
    found = []
    for first, last in zip(bounds, bounds[1:]):
        on = tuple(i for i, (start, end) in enumerate(spans) if start <= first and last <= end)
        if on:
            found.append(Piece(slice(first, last), on, tuple(slice(first - starts[i], last - starts[i]) for i in on)))
    return tuple(found)


_found = lru_cache(maxsize=256)(_find)  # a model has a few such layouts on hundreds of layers


def spans(of: Sequence[Piece]) -> list[slice]:
    """All rows of the pieces, those of neighbours as one slice."""
    found: list[slice] = []
    for piece in of:
        if found and found[-1].stop == piece.rows.start:
            found[-1] = slice(found[-1].start, piece.rows.stop)
        else:
            found.append(piece.rows)
    return found


def joined(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """One after the other; without a copy where there is one."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim)
