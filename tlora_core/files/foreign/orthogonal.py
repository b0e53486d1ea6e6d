"""Orthogonal adapters of other programs, B S A - B0 S0 A0, in the difference form in which we store them.

The reference (SDXL and FLUX) stores both terms. LyCORIS stores only the first; its base term is the singular value
decomposition of the model's own weight, which is made again here when the model is given.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import TLoRAError
from ...method.adapters import LowRank, difference_form
from ..untrusted import Contents
from .modules import Parts, is_convolution, matrix, number, require, scale_of
from .target import Matches

_PARTS = ("q", "p", "lambda")
_BASE = ("base_q", "base_p", "base_lambda")
# Mean cosine between a file's directions and the base's. Trained ones are still near 1, unrelated ones near 0.
MIN_LIKENESS = 0.5

Triple = tuple[Tensor, Tensor, Tensor]
Progress = Callable[[int, int], object]


def is_orthogonal(parts: Parts) -> bool:
    return bool({*_PARTS, *_BASE} & parts.keys())


def read_orthogonal(
    contents: Contents, modules: Mapping[str, Parts], matches: Matches, progress: Progress | None = None
) -> None:
    """Adds a LowRank with two columns a component. progress(done, total) is called before the first and after each
    layer whose base term has to be made again, which takes a while. Raises TLoRAError for damaged layers, and where the
    base term is not stored and cannot be made again."""
    without_base = [module for module, parts in modules.items() if is_orthogonal(parts) and not {*_BASE} & parts.keys()]
    tell = progress if progress and without_base else lambda done, total: None
    tell(0, len(without_base))
    for module, parts in modules.items():
        if not is_orthogonal(parts):
            matches.reject(parts.values(), "its file holds orthogonal adapters and this is none")
            continue
        if is_convolution(contents.tensors, parts) and not matches.is_linear(module):
            matches.reject(parts.values(), "it belongs to a convolution; a T-LoRA changes linear layers")
            continue
        _read_layer(contents.tensors, module, parts, matches)
        if module in without_base:
            tell(without_base.index(module) + 1, len(without_base))


def as_low_rank(trained: Triple, base: Triple) -> LowRank:
    """The update B S A - B0 S0 A0 of (B [out, r], S [r], A [r, in]) and (B0, S0, A0), float32."""
    return LowRank(*difference_form(trained, base), group=2).balanced()


def _read_layer(tensors: Mapping[str, Tensor], module: str, parts: Parts, matches: Matches) -> None:
    trained = _triple(tensors, module, parts, _PARTS)
    out_features, in_features = trained[0].shape[0], trained[2].shape[1]
    if any(part in parts for part in _BASE):
        base = _triple(tensors, module, parts, _BASE)
        if any(a.shape != b.shape for a, b in zip(trained, base)):
            raise TLoRAError(
                f'the base term of its layer "{module}" has other shapes than the trained one; get it again.'
            )
        name = matches.find(module, parts.values(), (out_features, in_features))
    else:
        name = matches.find(module, parts.values(), (out_features, in_features))
        base = None if name is None else _recompute_base(name, trained, matches)
    if name is not None and base is not None:
        scale = scale_of(tensors, parts, trained[2].shape[0])
        matches.layers[name] = as_low_rank(_scaled(trained, scale), _scaled(base, scale))


def _triple(tensors: Mapping[str, Tensor], module: str, parts: Parts, wanted: tuple[str, ...]) -> Triple:
    require(module, parts, wanted)
    q, p, lambda_ = (parts[part] for part in wanted)
    B, S, A = matrix(tensors, p), number(tensors, lambda_).flatten(), matrix(tensors, q)
    if not B.shape[1] == S.shape[0] == A.shape[0]:
        raise TLoRAError(
            f'the parts of its layer "{module}" do not fit: p is {list(B.shape)}, lambda {list(S.shape)}, '
            f"q {list(A.shape)}; get it again."
        )
    return B, S, A


def _scaled(triple: Triple, scale: float) -> Triple:
    B, S, A = triple
    return B, S * scale, A


def _recompute_base(name: str, trained: Triple, matches: Matches) -> Triple:
    """The decomposition of the model's weight from which the layer was trained, with the file's own signs.

    Raises TLoRAError without a model, and when none of the six starts' three parts of this weight is like the trained
    factors: a random start cannot be made again.
    """
    if matches.target is None:
        raise TLoRAError(
            "its base term is not stored and must be made again from the weights; connect the model it was trained on."
        )
    rows, rank = trained[0].shape
    decomposed = singular_vectors(matches.target.weight(name, rows).to(matches.target.device))
    candidates = [_candidate(*decomposed, first, trained) for first in _firsts(len(decomposed[1]), rank)]
    best = max(candidates, key=lambda base: _likeness(trained, base))
    if _likeness(trained, best) < MIN_LIKENESS:
        raise TLoRAError(
            f"its base term is not stored, and its layer {name} did not start from this model's weight but from a "
            f"random "
            "start, which cannot be made again, or from another model's; connect that model, or export it as a plain "
            "LoRA "
            "from the program that trained it."
        )
    return best


def singular_vectors(weight: Tensor) -> Triple:
    """(U [out, k], S [k], Vh [k, in]) of a weight [out, in], k the smaller side, S descending: float64, on its device.

    From the eigenvectors of the smaller Gram matrix, which is no slower than an SVD in float32 (benchmarks/files.py).
    In float64, squaring the values leaves more digits than float32 has. Where S is 0, so is the vector of the longer
    side.
    """
    W = weight.double()
    is_wide = W.shape[0] <= W.shape[1]
    W = W if is_wide else W.T
    short = torch.linalg.eigh(W @ W.T)[1].flip(1)
    long = short.T @ W
    values = long.norm(dim=1)
    long = long / torch.where(values > 0, values, 1.0)[:, None]
    return (short, values, long) if is_wide else (long.T, values, short.T)


def _firsts(count: int, rank: int) -> set[int]:
    """Where the principal, middle and last components begin."""
    return {0, max(0, (count - rank) // 2), max(0, count - rank)}


def _candidate(U: Tensor, values: Tensor, Vh: Tensor, first: int, trained: Triple) -> Triple:
    """The components from `first` on, filled up with zeros as LyCORIS does; a singular vector's sign is arbitrary, and
    with that of the trained one the difference of the two stays small."""
    B, S, A = trained
    kept = slice(first, first + len(S))
    B0, S0, A0 = (part.to("cpu", torch.float32) for part in (U[:, kept], values[kept], Vh[kept]))
    missing = len(S) - len(S0)
    B0, S0, A0 = F.pad(B0, (0, missing)), F.pad(S0, (0, missing)), F.pad(A0, (0, 0, 0, missing))
    signs = torch.where((B * B0).sum(0) + (A * A0).sum(1) < 0, -1.0, 1.0)
    return B0 * signs, S0, A0 * signs[:, None]


def _likeness(trained: Triple, base: Triple) -> float:
    """The mean cosine between the rows of A and of A0 that are not filled up."""
    A, A0 = trained[2], base[2]
    return float(F.cosine_similarity(A, A0, dim=1)[A0.any(dim=1)].mean())
