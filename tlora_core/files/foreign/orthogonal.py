"""Orthogonal adapters of other programs, B S A - B0 S0 A0, converted to our difference form.

The reference (SDXL and FLUX) stores both terms. LyCORIS stores only the first; its base term is the singular value
decomposition of the model's weight, recomputed here when the model is given.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import TLoRAError
from ...method.adapters import LowRank, difference_form
from ...method.layer_name import LayerName
from ..untrusted import Contents
from .model_description import Matches
from .modules import Parts, is_convolution, matrix, number, require, scale_of

_PARTS = ("q", "p", "lambda")
_BASE = ("base_q", "base_p", "base_lambda")
# Mean cosine between a file's directions and the base's: near 1 after training from this base, else near 0.
MIN_LIKENESS = 0.5

Triple = tuple[Tensor, Tensor, Tensor]
Progress = Callable[[int, int], object]


def is_orthogonal(parts: Parts) -> bool:
    return bool({*_PARTS, *_BASE} & parts.keys())


def read_orthogonal(
    contents: Contents, modules: Mapping[str, Parts], matches: Matches, progress: Progress | None = None
) -> None:
    """Adds a LowRank with two columns a component. Recomputing base terms is slow: progress(done, total) is called
    before the first and after each of these layers. Raises TLoRAError for damaged layers, and for a base term that is
    not stored and cannot be recomputed."""
    without_base = [module for module, parts in modules.items() if is_orthogonal(parts) and not {*_BASE} & parts.keys()]
    report = progress if progress and without_base else lambda done, total: None
    report(0, len(without_base))
    for module, parts in modules.items():
        if not is_orthogonal(parts):
            matches.reject(parts.values(), "it is not orthogonal, unlike the adapters in the rest of its file")
            continue
        if is_convolution(contents.tensors, parts) and not matches.is_linear(module):
            matches.reject(parts.values(), "it belongs to a convolution; a T-LoRA changes linear layers")
            continue
        _read_layer(contents.tensors, module, parts, matches)
        if module in without_base:
            report(without_base.index(module) + 1, len(without_base))


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
                f'the base term of its layer "{module}" does not have the shape of the trained term; get it again.'
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


def _recompute_base(name: LayerName, trained: Triple, matches: Matches) -> Triple:
    """The decomposition of the model's weight from which the layer was trained, with the file's signs.

    Raises TLoRAError without a model, and when the trained factors resemble neither the principal nor the middle nor
    the last components of this weight: a random start cannot be recomputed.
    """
    if matches.model is None:
        raise TLoRAError(
            "its base term is not stored and must be recomputed from the weights; connect the model it was trained on."
        )
    rows, rank = trained[0].shape
    decomposed = singular_vectors(matches.model.weight(name, rows).to(matches.model.device))
    candidates = [_candidate(*decomposed, first, trained) for first in _firsts(len(decomposed[1]), rank)]
    best = max(candidates, key=lambda base: _likeness(trained, base))
    if _likeness(trained, best) < MIN_LIKENESS:
        raise TLoRAError(
            f"its base term is not stored, and its layer {name} did not start from this model's weight: it started "
            "from another model's, or from a random start, which cannot be recomputed; connect that model, or export a "
            "plain LoRA from the program that trained it."
        )
    return best


def singular_vectors(weight: Tensor) -> Triple:
    """(U [out, k], S [k], Vh [k, in]) of a weight [out, in], k the smaller side, S descending: float64, on its device.

    Uses the eigenvectors of the smaller Gram matrix, which is no slower than an SVD in float32 (benchmarks/files.py).
    In float64, the squared singular values keep more digits than float32 has. Where S is 0, the vector of the longer
    side is 0 too.
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
    """The first index of the principal, middle and last components."""
    return {0, max(0, (count - rank) // 2), max(0, count - rank)}


def _candidate(U: Tensor, values: Tensor, Vh: Tensor, first: int, trained: Triple) -> Triple:
    """The components from `first` on, padded with zeros like LyCORIS. The sign of a singular vector is arbitrary; the
    trained vector's sign keeps the difference of the two small."""
    B, S, A = trained
    kept = slice(first, first + len(S))
    B0, S0, A0 = (part.to("cpu", torch.float32) for part in (U[:, kept], values[kept], Vh[kept]))
    missing = len(S) - len(S0)
    B0, S0, A0 = F.pad(B0, (0, missing)), F.pad(S0, (0, missing)), F.pad(A0, (0, 0, 0, missing))
    signs = torch.where((B * B0).sum(0) + (A * A0).sum(1) < 0, -1.0, 1.0)
    return B0 * signs, S0, A0 * signs[:, None]


def _likeness(trained: Triple, base: Triple) -> float:
    """The mean cosine between the rows of A and A0, without A0's padding."""
    A, A0 = trained[2], base[2]
    return float(F.cosine_similarity(A, A0, dim=1)[A0.any(dim=1)].mean())
