"""The section on the stopping rule: what it keeps, against the best that all checkpoints held, and fixed steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from tlora_core.reports.live_scores import StepScores
from tlora_core.reports.stopping import OF_NOISE, TOLERANCE, best_index, verdict

from . import markdown
from .analysis import FEWEST, RESAMPLES, Estimate, Point, estimate, left_out, percentiles, points
from .stopped import EVERY, FILE, LAST, MADE_UP_FILE, Checkpoint, Unit, load

PATIENCE, SCORE_SEEDS = 3, 2  # the Train node's defaults
OTHER_SEEDS = (1, 2, 4)  # numbers of scored pictures of each prompt that are compared
TARGET = 0.95
_COMMAND = "python3 tools/host.py bench stopping"


@dataclass(frozen=True)
class Judged:
    """One training. trade_offs: the truth at each checkpoint, step 0 first. chosen: name of a way to choose -> index of
    the checkpoint that it keeps. ended: index of the checkpoint at which "stop when past it" ends."""

    unit: Unit
    points: Sequence[Point]
    trade_offs: Sequence[float]
    chosen: Mapping[str, int]
    ended: int

    def share(self, way: str) -> float:
        """What the way keeps, as a share of the best trade-off."""
        return self.trade_offs[self.chosen[way]] / max(self.trade_offs)


KEPT, STOPPED, AFTERWARDS, FIXED = (
    "rule, best of all",
    "rule, stopped past it",
    "afterwards, by the truth",
    f"{LAST} steps",
)


def trade_off(point: Point, bare: Point) -> float:
    """The geometric mean of IS, TS and what is not copied, each within 0 and 1. What is copied is the mean for place
    and background of the share of pictures that show the training picture's, beyond that of the bare base."""
    copied = [
        (getattr(point, name) - getattr(bare, name)) / (1 - getattr(bare, name))
        for name in ("copied_place", "copied_background")
    ]
    shares = [np.clip(value, 0, 1) for value in (point.is_, point.ts, 1 - np.mean(np.clip(copied, 0, 1)))]
    return float(prod(shares) ** (1 / 3))


def judged(unit: Unit, checkpoints: Sequence[Checkpoint], without, seeds: int = SCORE_SEEDS) -> Judged:
    """without: the result of `left_out`. seeds: how many pictures of each prompt the rule sees."""
    at = {point.step: point for point in points([one.record for one in checkpoints], without)}
    line = [at[one.live.step] for one in checkpoints]
    values = [trade_off(point, line[0]) for point in line]
    scores = [seen(one.live, seeds) for one in checkpoints]
    ended = next((i for i in range(len(scores)) if verdict(scores[: i + 1]).past >= PATIENCE), len(scores) - 1)
    steps = [one.step for one in scores]
    chosen = {
        KEPT: steps.index(verdict(scores).best),
        STOPPED: steps.index(verdict(scores[: ended + 1]).best),
        AFTERWARDS: int(np.argmax(values)),
        FIXED: len(scores) - 1,
    }
    return Judged(unit, line, values, chosen, ended)


def seen(scores: StepScores, seeds: int) -> StepScores:
    """The scores of the first so many pictures of each prompt."""
    return StepScores.of(scores.step, [of_prompt[:seeds] for of_prompt in scores.pictures], scores.copy)


def section(results: Path) -> str:
    """Empty if the benchmark was not run."""
    found = _newest(results / FILE)
    if not found:
        return ""
    by_seeds = {n: [judged(unit, kept, left_out(results), n) for unit, kept in found] for n in OTHER_SEEDS}
    trained = by_seeds[SCORE_SEEDS]
    parts = (_introduction(trained), _table(trained), _verdict(trained), _by_seeds(by_seeds), *_chosen(results))
    return "\n\n".join(("## When to stop", *parts))


def _newest(file: Path) -> list[tuple[Unit, list[Checkpoint]]]:
    """The trainings of the weights that were measured last."""
    found = load(file)
    return [(unit, kept) for unit, kept in found if unit.weights == found[-1][0].weights]


def _introduction(trained):
    concepts = {one.unit.concept for one in trained}
    return (
        f"`{_COMMAND}` trained {len(trained)} T-LoRAs of {len(concepts)} concepts for {LAST} steps, with a validation "
        f"every {EVERY} steps and the scores that *Train T-LoRA from Image* shows: four prompts, {SCORE_SEEDS} "
        "pictures each, seen by the tiny world's scorer. The rule (`tlora_core/reports/stopping.py`) sees only these. "
        "The truth is measured at the same steps, on other prompts and seeds, as on the rest of this page. The "
        "trade-off is the geometric mean of IS, TS and 1 - copied. Here copied is the mean for place and background of "
        "the share of pictures that show the training picture's, beyond the bare base's share. *Rule, stopped past it* "
        f"ends after {PATIENCE} validations without gain. *Afterwards* is the best of all checkpoints by the truth, "
        "picked from the very figures that it is judged by, which favours it. The rule was made on trainings of other "
        "concepts."
    )


def _table(trained):
    head = ["kept", "step", "steps trained", *_OF_POINTS, "trade-off", "share of the best", "median share"]
    return markdown.table(head, [_row(trained, way) for way in (KEPT, STOPPED, AFTERWARDS, FIXED)])


_OF_POINTS: Mapping[str, Callable[[Point], float]] = {
    "IS": lambda p: p.is_,
    "TS": lambda p: p.ts,
    "place copied": lambda p: p.copied_place,
    "background copied": lambda p: p.copied_background,
}


def _row(trained, way):
    kept = {_key(one): one.points[one.chosen[way]] for one in trained}
    ended = [one.points[one.ended if way == STOPPED else -1].step for one in trained]
    values = [{key: value(point) for key, point in kept.items()} for value in _OF_POINTS.values()]
    shares = {_key(one): one.share(way) for one in trained}
    return [
        way,
        f"{np.mean([point.step for point in kept.values()]):.0f}",
        f"{np.mean(ended):.0f}",
        *(markdown.text_of(estimate(each)) for each in values),
        markdown.text_of(estimate({_key(one): one.trade_offs[one.chosen[way]] for one in trained})),
        markdown.text_of(estimate(shares)),
        markdown.text_of(median(shares)),
    ]


def _verdict(trained):
    of_each = {_key(one): one.share(KEPT) for one in trained}
    shares = median(of_each)
    if shares.low is None:
        return f"No verdict: it needs trainings of {FEWEST} concepts, and there are {shares.concepts}."
    apart = estimate(
        {_key(one): one.trade_offs[one.chosen[KEPT]] - one.trade_offs[one.chosen[FIXED]] for one in trained}
    )
    reached = "reaches" if shares.mean >= TARGET else "misses"
    return (
        f"In the median over concepts, of the means over their trainings, the rule keeps {shares} of the best "
        f"trade-off, which {reached} the target of {TARGET}; in the median over the single trainings it keeps "
        f"{np.median(list(of_each.values())):.3f}. Its trade-off is higher than that of {LAST} steps by {apart}, "
        "within trainings."
    )


def _by_seeds(by_seeds: Mapping[int, Sequence[Judged]]) -> str:
    head = ["pictures of each prompt", "step", "steps trained, stopped past it", "share of the best", "median share"]
    rows = []
    for number, trained in by_seeds.items():
        shares = {_key(one): one.share(KEPT) for one in trained}
        step, ended = (np.mean([one.points[at(one)].step for one in trained]) for at in (_kept, lambda one: one.ended))
        rows.append(
            [str(number), f"{step:.0f}", f"{ended:.0f}", *map(markdown.text_of, (estimate(shares), median(shares)))]
        )
    return (
        "The same trainings with other numbers of pictures for the scores (`score_seeds`), for the rule that keeps the "
        f"best of all:\n\n{markdown.table(head, rows)}"
    )


def _chosen(results: Path) -> list[str]:
    """How the rule does on made-up objects with other numbers; nothing if they were not trained."""
    found, rows = _newest(results / MADE_UP_FILE), []
    if not found:
        return []
    truths = [(kept, judged(unit, kept, set()).trade_offs) for unit, kept in found]
    for of_noise in (0.0, OF_NOISE, 0.5, 1.0):
        for tolerance in (0.02, TOLERANCE):
            means = [_mean_share(truths, n, tolerance, of_noise) for n in OTHER_SEEDS]
            rows.append([f"{of_noise:g}", f"{tolerance:g}", *(f"{mean:.3f}" for mean in means)])
    head = ["of the noise", "tolerance", *(f"share, {n} of each prompt" for n in OTHER_SEEDS)]
    return [
        f"The rule's two numbers ({OF_NOISE:g} of the noise, and {TOLERANCE:g}) were chosen on {len(found)} trainings "
        "of made-up objects (`bench stopping --made-up`), by the mean share of the best trade-off. The differences are "
        f"small for so few trainings:\n\n{markdown.table(head, rows)}"
    ]


def _mean_share(truths, seeds: int, tolerance: float, of_noise: float) -> float:
    """truths: for each training its checkpoints and their trade-offs."""
    shares = []
    for kept, truth in truths:
        place = best_index([seen(one.live, seeds) for one in kept], tolerance, of_noise)
        shares.append(truth[place or -1] / max(truth))  # while none is better, the last is kept
    return float(np.mean(shares))


def _kept(one: Judged) -> int:
    return one.chosen[KEPT]


def median(by_unit: Mapping[tuple[str, int], float], seed: int = 0) -> Estimate:
    """The median over concepts of the means over seeds, with a bootstrap interval over concepts."""
    names = sorted({concept for concept, _ in by_unit})
    means = np.array([np.mean([v for (concept, _), v in by_unit.items() if concept == name]) for name in names])
    low = high = None
    if len(names) >= FEWEST:
        drawn = means[np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))]
        low, high = (float(v) for v in np.percentile(np.median(drawn, axis=1), percentiles(len(means))))
    return Estimate(float(np.median(means)), low, high, len(by_unit), len(names))


def _key(one):
    return one.unit.concept, one.unit.seed
