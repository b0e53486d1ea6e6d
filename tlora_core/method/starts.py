"""The orthogonal starts of Ortho-LoRA and T-LoRA: the paper's six (section 3.2 and figure 5), and the one of its
published code.

B0 diag(S0) A0 holds r consecutive terms of the singular value decomposition of a matrix: the principal, middle or last
terms, of the layer's weight W or of a random matrix R with entries N(0, std^2).

For R no decomposition is computed. The singular vectors of a Gaussian matrix are Haar-distributed and independent of
its singular values, which are distributed like the singular values of a bidiagonal matrix of independent chi variables
(Golub-Kahan on a Gaussian; Dumitriu and Edelman 2002, "Matrix models for beta ensembles"). Both are drawn directly, so
the start has the distribution described in the paper.

The published code differs from the paper in layers that are not square, for example keys and values of cross-attention,
whose input text is wider than their output (140 of SDXL's 560 layers). There the paper's A0 holds right singular
vectors. The code uses rows of a completed square matrix, whose completed part is not Haar-distributed (`completion`).
"last_random_published" is that start; in square layers it equals "last_random". The code's starts from weights differ
in the same way and are not offered.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..errors import TLoRAError, require_choice
from .completion import last_completed_rows
from .gaussian_spectrum import chi_squares, singular_values
from .random_streams import generator_for


class Start(NamedTuple):
    """Selects components of a matrix. part: "last", "middle" or "principal". source: "random" or "weight".
    completed: whether the longer of the two factors comes from a completed square matrix, as in the published code."""

    part: str
    source: str
    completed: bool = False


STARTS = {
    "last_random": Start("last", "random"),  # the paper's choice
    "middle_random": Start("middle", "random"),
    "principal_random": Start("principal", "random"),
    "last_weight": Start("last", "weight"),
    "middle_weight": Start("middle", "weight"),
    "principal_weight": Start("principal", "weight"),  # PiSSA's
    "last_random_published": Start("last", "random", completed=True),  # the published code's
}
DEFAULT_START = "last_random"

StartFactors = tuple[Tensor, Tensor, Tensor]
Progress = Callable[[int, int], object]  # called with how many layers are done, and with all; may raise to cancel

_CHUNK = 16  # layers per batched product: enough to keep the cores busy, few enough to stay in cache


def orthogonal_start(
    kind: str,
    out_features: int,
    in_features: int,
    rank: int,
    generator: Generator | None = None,
    weight: Tensor | None = None,
    std: float | None = None,
) -> StartFactors:
    """(B0 [out, r], S0 [r], A0 [r, in]) in float32, components in descending order of singular value.

    kind: a key of STARTS. The "_random" starts draw from generator, on the CPU; None is torch's global generator. The
    "_weight" starts decompose weight [out, in]. std: see orthogonal_starts.

    B0's columns and A0's rows are orthonormal to about 1e-6. Raises TLoRAError for an unknown kind, a rank that is too
    large for the shape, or a weight that is missing, of the wrong shape or not finite.
    """
    start = _parse(kind)
    if start.source == "random":
        generator = torch.default_generator if generator is None else generator
        return _random_starts(start, [(out_features, in_features)], rank, [generator], std, "cpu")[0]
    require_rank(rank, (out_features, in_features))
    if weight is None or tuple(weight.shape) != (out_features, in_features):
        found = "no weight" if weight is None else f"a weight of shape {list(weight.shape)}"
        raise TLoRAError(f'The start "{kind}" needs a weight of {out_features} x {in_features} but got {found}.')
    if not torch.isfinite(weight).all():
        raise TLoRAError(f'The start "{kind}" got a weight with NaN or infinite values; use a "random" start.')
    U, S, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    selected = _selected(start.part, S.shape[0], rank)
    return U[:, selected].contiguous(), S[selected].contiguous(), Vh[selected].contiguous()


def orthogonal_starts(
    kind: str,
    shapes: Sequence[tuple[int, int]],
    rank: int,
    seed: int,
    names: Iterable[str] | None = None,
    std: float | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = lambda done, total: None,
) -> list[StartFactors]:
    """The random starts of many layers at once; shapes are (out_features, in_features).

    kind: a "_random" key of STARTS. std: standard deviation of R's entries; None is 1 / rank, as in the reference code.
    Each layer has its own random stream, from seed and its name, or its position if names is None. Layers are
    therefore independent: except for float32 rounding, the start of one does not depend on the rest of the call. Equal
    seeds give equal starts on one machine.

    Returns one (B0, S0, A0) per shape on device; see orthogonal_start for shapes, order and errors. The tensors of
    several layers may be views of one storage.
    """
    start = _parse(kind)
    if start.source != "random":
        raise TLoRAError(f'The start "{kind}" decomposes weights one at a time; use orthogonal_start.')
    labels = range(len(shapes)) if names is None else names
    generators = [generator_for(seed, label) for label in labels]
    return _random_starts(start, shapes, rank, generators, std, device, progress)


def _random_starts(
    start: Start,
    shapes: Sequence[tuple[int, int]],
    rank: int,
    generators: Sequence[Generator],
    std: float | None,
    device: str | torch.device,
    progress: Progress = lambda done, total: None,
) -> list[StartFactors]:
    for shape in shapes:
        require_rank(rank, shape)
    std = 1 / rank if std is None else std
    # Each stream is read in a fixed order, chi variables first, so the two halves can then run in parallel.
    chi = [chi_squares(max(shape), min(shape), g) for shape, g in zip(shapes, generators)]
    with ThreadPoolExecutor(1) as pool:
        values = pool.submit(_all_singular_values, start.part, chi, rank)
        sides = [_Side(*shape, start.completed) for shape in shapes]
        turned = [_Side(side.other, side.width, side.completed) for side in sides]
        count = len(shapes)
        B = _all_frames(sides, rank, generators, device, lambda done: progress(done // 2, count), rows=False)
        A = _all_frames(turned, rank, generators, device, lambda done: progress((count + done) // 2, count), rows=True)
    S = [(std * s).to(device) for s in values.result()]
    return list(zip(B, S, A))


def _all_singular_values(part: str, chi: list[tuple[Tensor, Tensor]], rank: int) -> list[Tensor]:
    result: list[Tensor] = [torch.empty(0)] * len(chi)
    for k, members in _by_key([a.shape[0] for a, _ in chi]).items():
        selected = _selected(part, k, rank)
        # singular_values counts from the smallest value, an SVD from the largest.
        values = singular_values([chi[i] for i in members], first=k - selected.stop, count=rank)
        for i, ascending in zip(members, values):
            result[i] = ascending.flip(0)
    return result


class _Side(NamedTuple):
    """The width of one side of a layer and of the other side; completed: as in Start."""

    width: int
    other: int
    completed: bool

    def frames(self, rank: int, generators: Sequence[Generator], device: str | torch.device, rows: bool) -> Tensor:
        if not (self.completed and self.width > self.other):
            return _haar_frames(self.width, rank, generators, device, rows)
        haar = _haar_frames(self.other, rank, generators, device, rows=True)
        completed = last_completed_rows(self.width, haar, generators, device)
        return completed if rows else completed.mT.contiguous()


def _all_frames(
    sides: list[_Side],
    rank: int,
    generators: Sequence[Generator],
    device: str | torch.device,
    progress: Callable[[int], object],
    rows: bool,
) -> list[Tensor]:
    """One frame per side: orthonormal rows [r, width] or, transposed, orthonormal columns [width, r]."""
    result: list[Tensor] = [torch.empty(0)] * len(sides)
    done = 0
    for side, members in _by_key(sides).items():
        for start in range(0, len(members), _CHUNK):
            progress(done)
            chunk = members[start : start + _CHUNK]
            frames = side.frames(rank, [generators[i] for i in chunk], device, rows)
            for i, frame in zip(chunk, frames):
                result[i] = frame
            done += len(chunk)
    progress(done)
    return result


def counted(items: Sequence, progress: Progress) -> Iterator:
    """The items one by one, with the progress before each and after the last."""
    for done, item in enumerate(items):
        progress(done, len(items))
        yield item
    progress(len(items), len(items))


def exact_device(device: str | torch.device) -> torch.device:
    """The device itself, or the CPU if it may lack float64: Apple's GPUs do, and many of Intel's and DirectML's."""
    exact = torch.device(device)
    return exact if exact.type in ("cpu", "cuda") else torch.device("cpu")


def _haar_frames(
    width: int, rank: int, generators: Sequence[Generator], device: str | torch.device, rows: bool
) -> Tensor:
    """[L, r, width] with orthonormal rows, or [L, width, r] with orthonormal columns; each Haar-distributed.

    The Q of a Gaussian's QR factorisation is Haar only if R's diagonal is positive (Mezzadri 2007).
    """
    G = torch.empty(len(generators), rank, width)
    for matrix, generator in zip(G, generators):
        matrix.normal_(generator=generator)
    G = G.to(exact_device(device))
    if width < 4 * rank:
        # Nearly square Gaussians are too ill-conditioned for the Gram matrix below.
        Q, R = torch.linalg.qr(G.mT.double())
        Q = (Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]).float()
        return (Q.mT if rows else Q).contiguous().to(device)
    # G = L Q with L the Cholesky factor of G G^T, whose diagonal is positive. With width >= 4 r the condition
    # number of G is about 3, and one float32 pass leaves Q orthonormal to 1e-6. 100 times faster than QR.
    L = torch.linalg.cholesky((G @ G.mT).double())
    eye = torch.eye(rank, dtype=L.dtype, device=L.device).expand_as(L)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False).float()
    return (inverse @ G if rows else G.mT @ inverse.mT).to(device)


def _selected(part: str, k: int, rank: int) -> slice:
    """The indices of a start's components among k singular values in descending order."""
    first = {"principal": 0, "middle": (k - rank + 1) // 2, "last": k - rank}[part]
    return slice(first, first + rank)


def _by_key(keys: list) -> dict:
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    return groups


def _parse(kind: str) -> Start:
    require_choice("start", kind, STARTS)
    return STARTS[kind]


def require_rank(rank: int, shape: tuple[int, int], name: str | None = None) -> None:
    """Raises TLoRAError for a rank that a layer of shape (out_features, in_features) cannot hold; name: the layer's."""
    if not 1 <= rank <= min(shape):
        layer = "a layer" if name is None else f'the layer "{name}"'
        raise TLoRAError(
            f"rank is {rank}, but {layer} is {shape[0]} x {shape[1]}; set it to a number from 1 to {min(shape)}."
        )
