"""When a training is at its best: the rule for `keep`, for T-LoRA Evaluate, and for the sentence that users read.

The best step is the first at which the subject is as like as it gets: at which likeness is less than one standard
error below the highest (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3). What follows adds
no likeness that can be told from noise, while copying grows and obedience falls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from .live_scores import StepScores


@dataclass(frozen=True)
class Verdict:
    """best: the best step. past: how many validations have followed it without gain. sentence: for the user."""

    best: int
    past: int
    sentence: str


def verdict(scores: Sequence[StepScores]) -> Verdict:
    """The verdict on the scores of one training, in the order of their steps. All must be of the same prompts and
    seeds, so that the noise of differences can be told. Raises ValueError without scores."""
    if not scores:
        raise ValueError("There are no scores to judge.")
    top = max(scores, key=lambda s: -1 if s.likeness is None else s.likeness.mean)
    chosen = next(s for s in scores if _below(s, top) <= 0)
    past = len(scores) - 1 - scores.index(chosen)
    return Verdict(chosen.step, past, _sentence(scores, chosen.step, past))


def _below(one: StepScores, top: StepScores) -> float:
    """How far the likeness of `one` is below that of `top`, less one standard error of the paired difference."""
    apart = [
        b.likeness - a.likeness
        for x, y in zip(one.pictures, top.pictures)
        for a, b in zip(x, y)
        if a.likeness is not None and b.likeness is not None
    ]
    if not apart:
        return 0.0
    return fmean(apart) - (stdev(apart) / sqrt(len(apart)) if len(apart) > 1 else 0.0)


def _sentence(scores, best, past):
    if len(scores) == 1:
        return f"step {best}: the only step with scores so far."
    if not past:
        return f"step {best}: still learning."
    return f"step {best}: as like as it gets."
