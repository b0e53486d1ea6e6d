"""Rows of the full U of a tall Gaussian matrix's singular value decomposition, as LAPACK completes it.

The published code takes the last rows, not columns, of a full U [m, m] of a Gaussian m x n matrix. For a square matrix
that is the same in distribution. For m > n only the first n columns of U are singular vectors; LAPACK completes them
with the last m - n columns of the Householder reflectors' product H_1 ... H_n that made the matrix triangular (or
bidiagonal). That product is near the identity there, so the completion is not Haar-distributed: row m - i has about (1
- n / m)^2 of its energy in column m - i alone.

The reflectors of a Gaussian matrix are those of independent Gaussian vectors of lengths m, m - 1, ..., and may be
applied to the wanted rows alone. No decomposition is computed.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

_BLOCK = 64  # reflectors applied together: the products are then matrices' and not vectors'


def last_completed_rows(m: int, haar: Tensor, generators: Sequence[Generator], device: str | torch.device) -> Tensor:
    """The last r rows [L, r, m] of the full U of Gaussian m x n matrices, m > n, in float32 on device, orthonormal to
    about 1e-6.

    haar: [L, r, n], independent Haar-distributed rows; it is used up. generators: one for each of the L matrices.

    The first n columns and the last m - n each have U's distribution, the first but for the signs of singular vectors,
    which are LAPACK's choice and random here. Of what the two have in common this keeps their Gram matrices, which add
    up to 1, and takes the
    directions of the first for independent of the last: so they are but for how a triangular Gaussian's singular
    vectors prefer some columns to others, too little for two-sample tests of 4,000 decompositions.
    """
    count, rank, n = haar.shape
    rows = torch.zeros(count, rank, m, device=device)
    rows[:, :, m - rank :].diagonal(dim1=1, dim2=2).fill_(1)
    for first in range(0, n, _BLOCK):
        _reflect(rows[:, :, first:], min(_BLOCK, n - first), generators)
    left = rows[:, :, :n].double()
    # A factor of their Gram matrix; Cholesky's would fail where rounding leaves an eigenvalue a hair below 0.
    values, vectors = torch.linalg.eigh(left @ left.mT)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    rows[:, :, :n] = root.float() @ haar.to(device)
    return _orthonormal(rows)


def _reflect(rows: Tensor, count: int, generators: Sequence[Generator]) -> None:
    """rows [L, r, m] times the reflectors of `count` Gaussian vectors of lengths m, m - 1, ..., in place.

    H_1 ... H_k = 1 - V T V^T with V's columns the vectors and T^-1 the upper triangle of V^T V with half its diagonal.
    """
    V = torch.empty(len(rows), count, rows.shape[2])
    for columns, generator in zip(V, generators):
        columns.normal_(generator=generator)
    V = V.triu().to(rows.device)
    # Householder's v = x + sign(x_1) |x| e_1, with LAPACK's sign.
    leading = V.diagonal(dim1=1, dim2=2)
    leading += leading.sign() * V.norm(dim=2)
    inverse = (V @ V.mT).triu()
    inverse.diagonal(dim1=1, dim2=2).div_(2)
    rows -= torch.linalg.solve_triangular(inverse, rows @ V.mT, upper=True, left=False) @ V


def _orthonormal(rows: Tensor) -> Tensor:
    """Without what rounding has added up: one Newton step towards the nearest orthonormal rows."""
    gram = rows.double() @ rows.mT.double()
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return ((1.5 * eye - 0.5 * gram).float() @ rows).contiguous()
