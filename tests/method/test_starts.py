"""The orthogonal starts: the distribution of the fast way against real decompositions, by two-sample tests.

Seeds are fixed, so nothing here is left to chance. SAMPLES is large enough that each of these mistakes fails
a test by orders of magnitude: no sign fix in the QR, another std, ascending order, a chi variable with one
degree of freedom too many, uniform instead of Gaussian entries, one stream for both factors.
"""

import functools

import pytest
import torch
from scipy import stats

from tlora_core import STARTS, TLoRAError, orthogonal_start, orthogonal_starts
from tlora_core.method.gaussian_spectrum import chi_squares, count_below, singular_values

SAMPLES = 4000
OUT, IN, RANK = 12, 9, 2
P_MIN = 1e-3
PARTS = ["last", "middle", "principal"]


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def ours(part):
    B, S, A = zip(*orthogonal_starts(f"{part}_random", [(OUT, IN)] * SAMPLES, RANK, seed=11))
    return torch.stack(B), torch.stack(S), torch.stack(A)


@functools.cache
def published(part):
    """The decomposition of real Gaussian matrices, as the reference computes it."""
    R = torch.randn(SAMPLES, OUT, IN, generator=torch.Generator().manual_seed(5)) / RANK
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    first = {"principal": 0, "middle": 4, "last": IN - RANK}[part]
    kept = slice(first, first + RANK)
    return U[:, :, kept], S[:, kept], Vh[:, kept]


def assert_same_distribution(a, b):
    assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > P_MIN


@pytest.mark.parametrize("part", PARTS)
def test_singular_values_have_the_published_distribution(part):
    S, expected = ours(part)[1], published(part)[1]
    for statistic in (lambda s: s[:, 0], lambda s: s[:, -1], lambda s: s[:, 0] - s[:, -1], lambda s: s.prod(1)):
        assert_same_distribution(statistic(S), statistic(expected))


@pytest.mark.parametrize("part", PARTS)
def test_the_whole_start_has_the_published_distribution(part):
    # The product does not depend on the signs that an SVD leaves open.
    w = torch.linspace(-1, 1, OUT)
    v = torch.linspace(2, -1, IN)
    statistics = [lambda P: P[:, 0, 0], lambda P: P[:, -1, 2], lambda P: w @ P @ v, lambda P: P.square().sum((1, 2))]
    mine, theirs = ((B * S[:, None]) @ A for B, S, A in (ours(part), published(part)))
    for statistic in statistics:
        assert_same_distribution(statistic(mine), statistic(theirs))


@pytest.mark.parametrize("part", PARTS)
def test_square_layers_have_the_published_singular_values(part):
    samples, size, rank = 300, 96, 8
    starts = orthogonal_starts(f"{part}_random", [(size, size)] * samples, rank, seed=2)
    S = torch.stack([start[1] for start in starts])
    R = torch.randn(samples, size, size, generator=torch.Generator().manual_seed(8)) / rank
    first = {"principal": 0, "middle": (size - rank) // 2, "last": size - rank}[part]
    expected = torch.linalg.svdvals(R)[:, first : first + rank]
    for i in (0, 3, rank - 1):
        assert_same_distribution(S[:, i], expected[:, i])


def frames(rank):
    """Columns [SAMPLES, n, rank] of both factors; 4 * rank > n takes the QR, 4 * rank <= n the Cholesky factor."""
    starts = orthogonal_starts("last_random", [(OUT, IN)] * SAMPLES, rank, seed=21)
    return torch.stack([B for B, _, _ in starts]), torch.stack([A.mT for _, _, A in starts])


# (out, in, rank): both of LAPACK's algorithms, less and more than one block.
COMPLETED = [(4, 20, 3), (12, 20, 3), (9, 10, 2), (100, 130, 30)]


@functools.cache
def of_the_published_code(out, width, rank):
    """R [in, out] = U S V^T in full, of which the code takes the last rows of U and the last columns of V^T."""
    count = SAMPLES if width < 100 else 300
    R = torch.randn(count, width, out, generator=torch.Generator().manual_seed(6)) / rank
    U, S, Vh = torch.linalg.svd(R)
    return Vh[:, :, -rank:], S[:, -rank:], U[:, -rank:]


@functools.cache
def ours_of_the_published_code(out, width, rank):
    count = SAMPLES if width < 100 else 300
    return tuple(
        torch.stack(part)
        for part in zip(*orthogonal_starts("last_random_published", [(out, width)] * count, rank, seed=12))
    )


def completed_statistics(out, width, rank):
    """Of B, S and A, one number a sample each: every part of A on its own, together, and the whole start. Where LAPACK
    is free to choose, as in the signs of the singular vectors, which fill A's first `out` columns, signs do not
    count."""
    w, v, g = torch.linspace(-1, 1, out), torch.linspace(2, -1, width), torch.Generator().manual_seed(3)
    mix, turn = torch.randn(width, generator=g), torch.randn(rank, generator=g)
    last = slice(width - rank, width)
    completed = range(max(out, width - rank), width)
    return {
        "a corner": lambda B, S, A: A[:, -1, -1],
        "above it": lambda B, S, A: A[:, 0, -1],
        "beside it": lambda B, S, A: A[:, -1, completed[0]],
        "a singular vector's": lambda B, S, A: A[:, 0, 0].abs(),
        "another's": lambda B, S, A: A[:, -1, out - 1].abs(),
        "the first completed": lambda B, S, A: A[:, 0, out],
        "trace": lambda B, S, A: sum(A[:, i - width, i] for i in completed),
        "energy in the last features": lambda B, S, A: A[:, :, last].square().sum((1, 2)),
        "energy in the first": lambda B, S, A: A[:, :, :out].square().sum((1, 2)),
        "energy of one row": lambda B, S, A: A[:, 0, :out].square().sum(1),
        "first and last at once": lambda B, S, A: A[:, 0, 0] * A[:, 0, -1],
        "their sizes": lambda B, S, A: A[:, 0, 0].abs() * A[:, 0, completed[0]],
        "one text": lambda B, S, A: (A @ mix).square().sum(1),
        "and signs": lambda B, S, A: (A @ mix) @ turn,
        "B": lambda B, S, A: B[:, 0, 0],
        "B's trace": lambda B, S, A: B[:, :rank].diagonal(dim1=1, dim2=2).sum(1),
        "S": lambda B, S, A: S[:, 0],
        "smallest S": lambda B, S, A: S[:, -1],
        "the update of one text": lambda B, S, A: ((B * S[:, None]) @ (A @ mix)[..., None])[..., 0] @ w,
        "its size": lambda B, S, A: ((B * S[:, None]) @ (A @ v)[..., None]).square().sum((1, 2)),
        "S and A": lambda B, S, A: S[:, 0] * A[:, 0, -1],
        "A and B": lambda B, S, A: A[:, 0, -1] * B[:, 0, 0],
    }


@pytest.mark.parametrize("shape", COMPLETED)
def test_the_published_start_has_the_distribution_of_rows_of_a_full_svd(shape):
    mine, theirs = ours_of_the_published_code(*shape), of_the_published_code(*shape)
    assert [part.shape for part in mine] == [part.shape for part in theirs]
    different = {
        name: p
        for name, statistic in completed_statistics(*shape).items()
        if (p := stats.ks_2samp(statistic(*mine).numpy(), statistic(*theirs).numpy()).pvalue) < P_MIN
    }
    assert not different


def test_rows_of_a_tall_layers_svd_are_those_of_the_wide_ones_turned_around():
    out, width, rank = 20, 12, 3
    B, S, A = (
        torch.stack(part)
        for part in zip(*orthogonal_starts("last_random_published", [(out, width)] * SAMPLES, rank, seed=12))
    )
    U, values, Vh = torch.linalg.svd(
        torch.randn(SAMPLES, width, out, generator=torch.Generator().manual_seed(6)) / rank
    )
    for mine, theirs in ((B, Vh[:, :, -rank:]), (A, U[:, -rank:])):
        for statistic in (
            lambda x: x[:, -1, -1],
            lambda x: x[:, 0, 0],
            lambda x: x[:, -rank:, -rank:].square().sum((1, 2)),
        ):
            assert_same_distribution(statistic(mine), statistic(theirs))
    assert_same_distribution(S[:, 0], values[:, -rank])


def test_half_of_the_published_start_of_sdxls_narrow_text_layers_lies_in_the_last_text_features():
    (_, _, haar), (_, _, A) = (
        orthogonal_starts(kind, [(640, 2048)], 64, 0)[0] for kind in ("last_random", "last_random_published")
    )
    energy = [float(rows[:, -64:].square().sum() / 64) for rows in (haar, A)]
    assert energy == pytest.approx([0.03, 0.49], abs=0.01)


def test_the_published_start_of_a_square_layer_is_the_papers():
    for mine, theirs in zip(
        *(orthogonal_starts(kind, [(48, 48)], 8, 3)[0] for kind in ("last_random", "last_random_published"))
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rank", [2, 5])
def test_factors_are_haar_distributed(rank):
    g = torch.Generator().manual_seed(1)
    for Q in frames(rank):
        n = Q.shape[1]
        # Coordinates of a uniform unit vector: (1 + q) / 2 has a Beta((n-1)/2, (n-1)/2) law.
        coordinate = stats.beta((n - 1) / 2, (n - 1) / 2, loc=-1, scale=2).cdf
        rotation = torch.linalg.qr(torch.randn(n, n, generator=g)).Q
        for turned in (Q, rotation @ Q):
            for i, j in [(0, 0), (1, 1), (n - 1, 0), (2, rank - 1)]:
                assert stats.kstest(turned[:, i, j].numpy(), coordinate).pvalue > P_MIN
            # Length of the projection of a fixed vector on the random subspace.
            length = turned[:, 0].square().sum(1).numpy()
            assert stats.kstest(length, stats.beta(rank / 2, (n - rank) / 2).cdf).pvalue > P_MIN
            # The trace sees all columns with their signs at once.
            trace = turned.diagonal(dim1=1, dim2=2).sum(1).numpy()
            assert stats.ttest_1samp(trace, 0).pvalue > P_MIN


def test_values_vectors_and_layers_are_independent():
    B, S, A = (factor.flatten(1) for factor in ours("last"))
    B, S, A = (torch.cat([factor, factor.abs()], dim=1) for factor in (B, S.log(), A))
    here, following = slice(None, -1), slice(1, None)
    every = torch.cat([B, S, A], dim=1)
    for a, b in [(S, B), (S, A), (B, A), (every[here], every[following])]:
        count = a.shape[1]
        pvalues = stats.spearmanr(a.numpy(), b.numpy()).pvalue[:count, count:]
        assert pvalues.min() > P_MIN / pvalues.size


def test_chi_variables_have_their_degrees_of_freedom():
    draws = [chi_squares(OUT, IN, torch.Generator().manual_seed(i)) for i in range(SAMPLES)]
    a, b = (torch.stack(part) for part in zip(*draws))
    assert torch.equal(b[:, -1], torch.zeros(SAMPLES))
    for i in range(IN):
        assert stats.kstest(a[:, i].numpy(), stats.chi2(OUT - i).cdf).pvalue > P_MIN
    for i in range(IN - 1):
        assert stats.kstest(b[:, i].numpy(), stats.chi2(IN - 1 - i).cdf).pvalue > P_MIN


@pytest.mark.parametrize(("m", "n"), [(200, 200), (320, 200), (7, 7), (5, 1)])
def test_chosen_singular_values_are_those_of_the_bidiagonal_matrix(m, n):
    squares = [chi_squares(m, n, torch.Generator().manual_seed(i)) for i in range(5)]
    count = min(n, 20)
    for first in {0, (n - count) // 2, n - count}:
        for (a, b), got in zip(squares, singular_values(squares, first, count)):
            B = torch.diag(a.double().sqrt()) + torch.diag(b[:-1].double().sqrt(), 1)
            every = torch.linalg.svdvals(B).flip(0)
            expected = every[first : first + count]
            assert (got - expected).abs().max() < 3e-3 * every[-1] / n
            assert ((got - expected).abs() / expected).median() < 1e-6


def test_counting_survives_exact_zeros():
    # A shift equal to a diagonal entry makes a pivot exactly zero.
    a = torch.tensor([[4.0], [9.0], [1.0], [4.0]])
    b = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    B = torch.diag(a[:, 0].sqrt()) + torch.diag(b[:-1, 0].sqrt(), 1)
    x = torch.tensor([[0.5], [1.5], [2.0], [2.5], [3.5]])
    count = count_below(a, b, x)[:, 0]
    values = torch.linalg.svdvals(B.double())
    for i in (0, 1, 3, 4):
        assert count[i] == (values < x[i]).sum()


@pytest.mark.parametrize(
    "shape", [(640, 640, 64), (1280, 2048, 64), (64, 64, 64), (256, 300, 64), (40, 255, 17), (3, 5, 1)]
)
@pytest.mark.parametrize("part", PARTS)
def test_starts_are_orthonormal_descending_float32(shape, part):
    out, width, rank = shape
    kinds = ["last_random", "last_random_published"] if part == "last" else [f"{part}_random"]
    for B, S, A in (
        start for kind in kinds for start in orthogonal_starts(kind, [(out, width), (width, out)], rank, seed=4)
    ):
        assert B.shape[1] == A.shape[0] == S.shape[0] == rank and B.dtype == S.dtype == A.dtype == torch.float32
        assert {B.shape[0], A.shape[1]} == {out, width} and B.is_contiguous() and A.is_contiguous()
        for gram in (B.mT.double() @ B.double(), A.double() @ A.mT.double()):
            assert (gram - torch.eye(rank)).abs().max() < 2e-6
        assert (S > 0).all() and (S.diff() < 0).all()


def test_values_scale_with_std_which_is_one_over_rank():
    shapes = [(20, 30)]
    default = orthogonal_starts("last_random", shapes, 4, seed=0)[0][1]
    torch.testing.assert_close(orthogonal_starts("last_random", shapes, 4, seed=0, std=1.0)[0][1], 4 * default)


def test_a_layer_depends_on_seed_and_name_and_not_on_its_company():
    shapes, names = [(48, 32), (64, 48), (48, 32)], ["a", "b", "c"]
    many = orthogonal_starts("last_random", shapes, 8, seed=3, names=names)
    again = orthogonal_starts("last_random", shapes, 8, seed=3, names=names)
    alone = orthogonal_starts("last_random", shapes[2:], 8, seed=3, names=["c"])[0]
    assert all(torch.equal(x, y) for m, a in zip(many, again) for x, y in zip(m, a))
    for x, y in zip(many[2], alone):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    other = orthogonal_starts("last_random", shapes[2:], 8, seed=4, names=["c"])[0]
    assert not any(torch.allclose(x, y, rtol=1e-3) for x, y in zip(alone, other))
    assert not any(torch.allclose(x, y, rtol=1e-3) for x, y in zip(many[0], many[2]))


def test_single_start_draws_from_its_generator():
    def draw(seed):
        return orthogonal_start("middle_random", 24, 16, 4, torch.Generator().manual_seed(seed))

    assert all(torch.equal(x, y) for x, y in zip(draw(1), draw(1)))
    assert not torch.allclose(draw(1)[2], draw(2)[2])


@pytest.mark.parametrize(("part", "first"), [("principal", 0), ("middle", 10), ("last", 19)])
def test_weight_starts_are_components_of_the_weight(part, first):
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    for W in (weight, weight.mT.contiguous(), weight.to(torch.bfloat16)):
        B, S, A = orthogonal_start(f"{part}_weight", *W.shape, 5, weight=W)
        torch.testing.assert_close(S, torch.linalg.svdvals(W.float())[first : first + 5])
        torch.testing.assert_close(B.mT @ W.float() @ A.mT, torch.diag(S), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(B.mT @ B, torch.eye(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("rank", [0, 17])
def test_impossible_rank_is_refused_with_its_limits(kind, rank):
    with pytest.raises(TLoRAError, match=f"rank is {rank}.*24 x 16.*from 1 to 16"):
        orthogonal_start(kind, 24, 16, rank, weight=torch.zeros(24, 16))


def test_bad_choices_and_weights_are_one_sentence_each():
    with pytest.raises(TLoRAError, match='"best"; choose one of last_random'):
        orthogonal_start("best", 8, 8, 2)
    with pytest.raises(TLoRAError, match="no weight"):
        orthogonal_start("last_weight", 8, 8, 2)
    with pytest.raises(TLoRAError, match=r"8 x 8.*\[8, 9\]"):
        orthogonal_start("last_weight", 8, 8, 2, weight=torch.zeros(8, 9))
    with pytest.raises(TLoRAError, match="NaN"):
        orthogonal_start("last_weight", 8, 8, 2, weight=torch.full((8, 8), float("nan")))
    with pytest.raises(TLoRAError, match="one at a time"):
        orthogonal_starts("last_weight", [(8, 8)], 2, seed=0)
