"""Selected singular values of many random bidiagonal matrices at once, by bisection and a Newton step."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

# Two multisections leave a bracket of one or two spacings. Nine bisections make it small enough for one Newton step,
# which squares the error. Measured to take two thirds of the time of bisection alone.
_MULTISECTIONS = 2
_BISECTIONS = 9

# Brackets per call: enough to hide the cost of a call, few enough to stay in a core's cache.
_LANES = 1 << 15


def chi_squares(m: int, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Squares of the entries of the bidiagonal form of an m x n standard Gaussian matrix, m >= n.

    Golub-Kahan reduces it to an upper bidiagonal matrix with independent entries, chi_m, chi_{m-1}, ...,
    chi_{m-n+1} on the diagonal and chi_{n-1}, ..., chi_1 above it (Dumitriu and Edelman 2002).

    Returns float32 diagonal^2 [n] and superdiagonal^2 [n]; the latter is padded with a 0 to the same length.
    """
    steps = torch.arange(n, dtype=torch.float64)
    degrees = torch.cat([m - steps, n - 1 - steps[:-1]])
    # chi^2 with k degrees of freedom is twice a Gamma(k / 2). torch.distributions takes no generator.
    squares = 2 * torch._standard_gamma(degrees / 2, generator=generator)
    return squares[:n].float(), torch.cat([squares[n:], squares.new_zeros(1)]).float()


def singular_values(squares: Sequence[tuple[Tensor, Tensor]], first: int, count: int) -> list[Tensor]:
    """Singular values number first, ..., first + count - 1 (from the smallest) of each bidiagonal matrix.

    squares: the result of chi_squares for each matrix; all of one size. Returns ascending float32 [count] each, mostly
    exact to float32 rounding, and always within about 1/300 of the mean spacing of the values.
    """
    result: list[Tensor] = []
    step = max(1, _LANES // count)
    for start in range(0, len(squares), step):
        chunk = squares[start : start + step]
        a = torch.stack([d for d, _ in chunk], dim=1)
        b = torch.stack([e for _, e in chunk], dim=1)
        low, high = _brackets(a, b, first, count)
        result.extend(_newton_step(a, b, low, high).unbind(1))
    return result


def _brackets(a: Tensor, b: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """a, b [n, L] -> bounds [count, L] below and above each wanted singular value."""
    wanted = torch.arange(first, first + count, dtype=torch.int32)[:, None].expand(count, a.shape[1])
    low = torch.zeros(wanted.shape)
    # Slightly above the bound, which a matrix with one entry attains.
    high = 1.01 * (a.amax(0).sqrt() + b.amax(0).sqrt()).expand(count, -1)
    inner = (torch.arange(1, count + 1) / (count + 1))[:, None]
    for _ in range(_MULTISECTIONS):
        # All brackets of a matrix share one grid, which costs no more than one bisection of each.
        bottom, top = low.amin(0), high.amax(0)
        grid = bottom + (top - bottom) * inner
        below = count_below(a, b, grid)
        left = torch.searchsorted(below.T.contiguous(), wanted.T.contiguous(), right=True).T
        grid = torch.cat([bottom[None], grid, top[None]])
        low, high = grid.gather(0, left), grid.gather(0, left + 1)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_above = count_below(a, b, middle) > wanted
        high = torch.where(is_above, middle, high)
        low = torch.where(is_above, low, middle)
    return low, high


def _newton_step(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """One step for det(B^T B - x^2) = 0 from the middle of each bracket, or the middle if the step leaves the bracket.

    The logarithmic derivative of the determinant is the sum of q_i' / q_i over the pivots of count_below,
    differentiated by x^2.
    """
    x = (low + high) / 2
    neg_xx = -(x * x)
    minus_one = torch.tensor(-1.0)
    s, ds = neg_xx.clone(), torch.full_like(x, -1.0)
    q, ratio, total = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(x)
    for a_i, b_i, ab_i in zip(a, b, a * b):
        torch.add(s, a_i, out=q)
        torch.div(ds, q, out=ratio)
        total.add_(ratio)
        torch.addcdiv(neg_xx, s.mul_(b_i), q, out=s)
        torch.addcdiv(minus_one, ratio.mul_(ab_i), q, out=ds)
    step = (x * x - 1 / total).sqrt()
    # The comparisons also reject the NaN of a pivot that is exactly zero.
    return torch.where((step > low) & (step < high), step, x)


def count_below(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The number of singular values of each matrix below x; a, b [n, L] as in singular_values, x [K, L] > 0.

    This is the number of negative pivots q_i of B^T B - x^2 (Sylvester). The pivots come from the differential form of
    the stationary qd transform, s_1 = -x^2, q_i = s_i + a_i, s_{i+1} = b_i s_i / q_i - x^2, which in float32 locates
    every singular value to a few units in the last place (Fernando and Parlett 1994).
    """
    neg_xx = -(x * x)
    minus_one = torch.tensor(-1.0)
    s, v = neg_xx.clone(), torch.empty_like(x)
    signs = torch.empty_like(x, dtype=torch.int32)
    count = torch.zeros_like(signs)
    s_bits, v_bits = s.view(torch.int32), v.view(torch.int32)
    for a_i, b_i in zip(a, b):
        # With v_i = -q_i / s_i the step is two fused operations, and infinities from a division by zero cancel. Then
        # q_i < 0 means s_i < 0 and v_i < 0, read from the sign bits.
        torch.addcdiv(minus_one, a_i, s, value=-1, out=v)
        torch.bitwise_and(s_bits, v_bits, out=signs)
        torch.addcdiv(neg_xx, b_i, v, value=-1, out=s)
        count.sub_(signs.bitwise_right_shift_(31))
    return count
