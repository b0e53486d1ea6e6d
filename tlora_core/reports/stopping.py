"""When a training is at its best: one rule for `keep`, for T-LoRA Evaluate, and for the sentence that users read.

Each measure becomes a share. 0 is the first of the scores, which is best the bare model, and 1 is the training picture
itself, as if the T-LoRA drew it whatever the prompt:

    l = (likeness - likeness_first) / (likeness_copy - likeness_first)          how much of the subject is learnt
    c = (copying - copying_first) / (copying_copy - copying_first)              how much else is copied
    o = (obedience - obedience_copy) / (obedience_first - obedience_copy)       how much of the prompts is left

The trade-off is the geometric mean of l, o and 1 - c, each held within 0 and 1, so that none makes up for the lack of
another. A measure that was not taken, or in which the first scores do not lie on their side of the copy's, is left out.

The best step is found from the first to the last: a step takes the place of the best so far if its trade-off is higher
by more than TOLERANCE and by more than OF_NOISE times its noise. So the best is always the best before or the newest.
The noise is the standard error of the difference by the jackknife over pictures (Efron, The Jackknife, the Bootstrap
and Other Resampling Plans, 1982, chapter 3). The pictures of two steps are paired, as they come from the same prompts
and seeds. Why not the whole of it: the first steps are the noisiest, so a certain gain comes late, and steps at which
the subject was hardly learnt were kept. Both numbers were chosen on 14 trainings of made-up objects, where the step
that was kept had 0.89 of the best trade-off in the mean with a TOLERANCE of 0.02 and the whole noise, and 0.91 with
these; with four pictures of each prompt 0.89 and 0.93.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod, sqrt
from statistics import fmean

from .live_scores import MEASURES, PictureScores, StepScores

OF_NOISE = 0.25
TOLERANCE = 0.05  # smaller differences of the trade-off do not count, however certain they are
_UNLIKE = 0.05  # of the shares; smaller changes are not worth telling


@dataclass(frozen=True)
class Verdict:
    """best: the best step; the last while none is better than the first. is_better: whether one is. past: how many
    validations have followed it without gain. sentence: for the user."""

    best: int
    is_better: bool
    past: int
    sentence: str


def verdict(scores: Sequence[StepScores], tolerance: float = TOLERANCE) -> Verdict:
    """The verdict on the scores of one training in the order of its steps, all of the same prompts and seeds. Raises
    ValueError without scores."""
    if not scores:
        raise ValueError("There are no scores to judge.")
    best, last = best_index(scores, tolerance), len(scores) - 1
    if best == 0:
        reason = f"no step so far is better than step {scores[0].step}" if last else "the first with scores"
        return Verdict(scores[last].step, False, 0, f"step {scores[last].step}: {reason}; still learning.")
    return Verdict(scores[best].step, True, last - best, f"step {scores[best].step}: {why(scores, best)}")


def best_index(scores: Sequence[StepScores], tolerance: float = TOLERANCE, of_noise: float = OF_NOISE) -> int:
    """The place of the best among the scores; 0 if none is better than the first."""
    best = 0
    for i in range(1, len(scores)):
        gain, noise = _gain(scores[0], scores[best], scores[i])
        if gain > max(of_noise * noise, tolerance):
            best = i
    return best


def trade_off(first: StepScores, one: StepScores) -> float:
    """The trade-off of `one`, 0 to 1."""
    return _trade_off(_Row.of(first), _Row.of(one))


def why(scores: Sequence[StepScores], best: int) -> str:
    """What there is to say about the best of the scores, which is not the first, as half a sentence."""
    if best == len(scores) - 1:
        return "the best so far; still learning."
    first, at_best, last = (_shares(_Row.of(scores[0]), _Row.of(scores[i])) for i in (0, best, -1))
    worse = [_WORSE[name] for name in ("obedience", "copying") if name in last and last[name] < at_best[name] - _UNLIKE]
    if last.get("likeness", 0) > at_best.get("likeness", 0) + _UNLIKE:
        return f"the best balance; after it the subject gets more alike, but {' and '.join(worse) or 'no better'}."
    return f"as like as it gets; after it {' and '.join(worse) or 'nothing is gained'}."


_WORSE = {"obedience": "prompts are followed less", "copying": "the background is copied more"}


@dataclass(frozen=True)
class _Row:
    """The scores of a step's pictures in one list, and those of the copy."""

    pictures: Sequence[PictureScores]
    copy: PictureScores

    @classmethod
    def of(cls, scores: StepScores) -> "_Row":
        return cls(list(chain.from_iterable(scores.pictures)), scores.copy)

    def without(self, index: int) -> "_Row":
        return _Row([one for i, one in enumerate(self.pictures) if i != index], self.copy)

    @property
    def measured(self) -> set[str]:
        return {name for name in MEASURES if self.mean(name) is not None}

    def mean(self, name: str) -> float | None:
        measured = [value for one in self.pictures if (value := getattr(one, name)) is not None]
        return fmean(measured) if measured else None


def _shares(first: _Row, one: _Row) -> dict[str, float]:
    """l, o and 1 - c of the module's text, by the names of their measures."""
    shares = {}
    for name in MEASURES:
        start, now, end = first.mean(name), one.mean(name), getattr(first.copy, name)
        if start is None or now is None or end is None:
            continue
        span = end - start if name != "obedience" else start - end
        if span > 0:
            moved = (now - start) / (end - start)
            shares[name] = min(max(moved if name == "likeness" else 1 - moved, 0.0), 1.0)
    return shares


def _trade_off(first: _Row, one: _Row) -> float:
    shares = _shares(first, one).values()
    return prod(shares) ** (1 / len(shares)) if shares else 0.0


def _gain(first: StepScores, before: StepScores, after: StepScores) -> tuple[float, float]:
    """How much higher the trade-off is after than before, and the standard error of that."""
    rows = [_Row.of(scores) for scores in (first, before, after)]

    def apart(rows):
        return _trade_off(rows[0], rows[2]) - _trade_off(rows[0], rows[1])

    fewer = [[row.without(i) for row in rows] for i in range(len(rows[2].pictures))]
    # Without its only picture a measure is gone, so its noise cannot be known.
    left_out = [apart(less) for less in fewer if less[2].measured == rows[2].measured]
    if len(left_out) < 2:
        return apart(rows), 0.0
    middle, share = fmean(left_out), (len(left_out) - 1) / len(left_out)
    return apart(rows), sqrt(share * sum((value - middle) ** 2 for value in left_out))
