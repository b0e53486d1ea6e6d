"""From raw records to figures: IS, TS, diversity and copying; comparison at equal IS; bootstrap intervals.

A unit is one concept with one seed, the same training picture, prompts and noise for every method. Methods are compared
within
units, and intervals come from drawing concepts, then seeds within them, with replacement: bootstrap percentiles, moved
outwards as few concepts need it (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 3.3).
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from tlora_core.method.adapters import METHODS

from .prompts import KINDS, NEUTRAL
from .record_files import files_of, read
from .study import Cell, Scale, cell_of, rate_name

REPRODUCED = 0.5  # IS from which a concept counts as reproduced: nearer to the concept than to what the base drew
CONTROL_LOSS = 0.1  # share of attributes that prompts without the concept may lose before the model counts as damaged
LEVELS = (0.2, 0.3, 0.4)  # IS at which methods are compared: nearly every training of the sweep reached it
RESAMPLES = 10_000
FEWEST = 6  # concepts that an interval needs: five are all on one side by chance once in sixteen
TRUSTED = 0.95  # accuracy on a concept's rendered pictures from which a scorer counts for that concept


@dataclass(frozen=True)
class Point:
    """The measurement of one training at one step. is_: 0 for what the bare base draws, 1 for the concept seen through
    the autoencoder. ts: share of asked attributes that are right, with equal weight for each kind of prompt;
    by_attribute: the share for each attribute, over all prompts that ask for it. copied_background, copied_place: share
    of pictures that show the training picture's, where the prompt leaves it open. spread: mean distance of the places
    in neutral pictures from their centre, in half-widths. control: share of right attributes in prompts without the
    concept. of_class: the same in prompts of its class without the token; leak: how like the concept pictures of the
    class word alone are, 0 for what the bare base draws, 1 for the concept; both None where none were drawn."""

    cell: Cell
    step: int
    is_: float
    ts: float
    by_attribute: dict[str, float]
    copied_background: float
    copied_place: float
    spread: float
    control: float
    effective_rank: float | None
    record: dict
    of_class: float | None = None
    leak: float | None = None


def load_sweep(folder: Path) -> list[dict]:
    return read(*files_of(folder, "sweep"))


def left_out(folder: Path) -> set[tuple[str, str]]:
    """The pairs (concept, attribute) that count in no figure, because the scorer is not accurate enough there. Raises
    SystemExit if that was not measured."""
    file = folder / "scorers.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing; run check-scorers first.")
    accuracy = json.loads(file.read_text())["attributes"]
    return {
        (concept, name)
        for name, by_concept in accuracy.items()
        for concept, share in by_concept.items()
        if share < TRUSTED
    }


def points(records: Sequence[dict], without: Collection[tuple[str, str]] = ()) -> list[Point]:
    """A point for each record of a training, measured against the bare base for the same concept, seed and prompts; and
    the records of the bare base themselves as step 0. without: the result of `left_out`. Raises SystemExit if a record
    of the bare base is missing."""
    cells = [cell_of(record) for record in records]
    references = {_reference(cell): record for cell, record in zip(cells, records) if cell.method == "none"}
    made = []
    for cell, record in zip(cells, records):
        if "diverged" in record:
            continue
        if _reference(cell) not in references:
            raise SystemExit(f"There is no record of the bare base ({cell.base}) for {cell.concept}, seed {cell.seed}.")
        made.append(_point(cell, record, references[_reference(cell)], without))
    return made


def _reference(cell):
    """The fields that a cell shares with the bare base it is measured against."""
    return cell.concept, cell.seed, cell.draws, cell.base


def _point(cell, record, reference, without):
    base, top = _distance(reference), reference["ceiling"]
    training = record["training"]
    rows = [
        {**row, "asked": {name: value for name, value in row["asked"].items() if (cell.concept, name) not in without}}
        for row in record["rows"]
    ]
    shares = [_right([row for row in rows if row["kind"] == kind]) for kind in KINDS]
    places = np.array([row["pose"][:2] for row in rows if row["kind"] == NEUTRAL])
    ranks = record.get("effective_rank_B")
    return Point(
        cell,
        record["step"],
        (base - _distance(record)) / (base - top),
        _mean(share for share in shares if share is not None),
        _by_attribute(rows),
        _copied(record["rows"], training, "background"),
        _copied(record["rows"], training, "place"),
        float(np.linalg.norm(places - places.mean(0), axis=1).mean()),
        _right(record["control"]),
        float(np.mean(ranks)) if ranks else None,
        record,
        _right(record.get("of_class", ())),
        _leak(record, reference, top),
    )


def _leak(record, reference, top):
    ours, base = (
        [row["distance"] for row in each.get("of_class", ()) if not row["asked"]] for each in (record, reference)
    )
    return (_mean(base) - _mean(ours)) / (_mean(base) - top) if ours and base else None


def _distance(record):
    return _mean(row["distance"] for row in record["rows"] if row["kind"] == NEUTRAL)


def _right(rows):
    """Share of asked attributes that are seen; None if nothing was asked."""
    right = [row["seen"][name] == value for row in rows for name, value in row["asked"].items()]
    return _mean(right) if right else None


def _by_attribute(rows):
    right = defaultdict(list)
    for row in rows:
        for name, value in row["asked"].items():
            right[name].append(row["seen"][name] == value)
    return {name: _mean(values) for name, values in right.items()}


def _copied(rows, training, name):
    left_open = [
        row["seen"][name] == training[name] for row in rows if name not in row["asked"] and name in row["seen"]
    ]
    return _mean(left_open) if left_open else float("nan")


def _mean(values):
    return float(np.mean(list(values)))


# --- methods against each other ---

Variant = Callable[[Cell], str | None]  # the name of a cell's row in a table, None where it has none
# Unit -> its points in the order of steps, the bare base first.
Lines = Mapping[tuple[str, int], Sequence[Point]]


def curves(given: Sequence[Point], variant: Variant) -> dict[str, Lines]:
    """variant -> Lines."""
    bare = {_reference(p.cell): p for p in given if p.cell.method == "none"}
    found: dict = defaultdict(lambda: defaultdict(list))
    for point in sorted(given, key=lambda p: p.step):
        name = variant(point.cell) if point.cell.method != "none" else None
        if name is not None:
            unit = found[name][point.cell.concept, point.cell.seed]
            if not unit:
                unit.append(bare[_reference(point.cell)])
            unit.append(point)
    return found


def value_at(line: Sequence[Point], level: float, value: Callable[[Point], float]) -> float | None:
    """`value` where the training first reaches the IS `level`, interpolated linearly between the measured steps around
    it; None if it never does."""
    for before, after in zip(line, line[1:]):
        if before.is_ < level <= after.is_:
            share = (level - before.is_) / (after.is_ - before.is_)
            return (1 - share) * value(before) + share * value(after)
    return None


def past_at_first(given: Sequence[Point], scale: Scale) -> list[Cell]:
    """The trainings of a scale that are already past the lowest level at their first measured step, so that the step at
    which they reached it is unknown."""
    return [p.cell for p in given if p.cell.steps == scale.steps and p.step == min(scale.steps) and p.is_ > LEVELS[0]]


def not_learnt(given: Sequence[Point], scale: Scale) -> list[Cell]:
    """The trainings of a scale that reproduce the concept at none of their measured steps."""
    best: dict[Cell, float] = defaultdict(float)
    for p in given:
        if p.cell.steps == scale.steps and p.cell.method != "none":
            best[p.cell] = max(best[p.cell], p.is_)
    return [cell for cell, is_ in best.items() if is_ < REPRODUCED]


@dataclass(frozen=True)
class Estimate:
    """A mean over units with its 95% interval, which is None below FEWEST concepts. units, concepts: the number of
    units, and of their concepts."""

    mean: float
    low: float | None
    high: float | None
    units: int
    concepts: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3f} (n = {self.units})"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(by_unit: Mapping[tuple[str, int], float], seed: int = 0) -> Estimate | None:
    """None without units. Resamples concepts first, then seeds within each."""
    groups = defaultdict(list)
    for (concept, _), value in sorted(by_unit.items()):  # equal draws in every process
        if value is not None and np.isfinite(value):
            groups[concept].append(value)
    if not groups:
        return None
    sizes = np.array([len(values) for values in groups.values()])
    # [concepts, largest number of seeds]
    padded = np.array([values + [0.0] * (sizes.max() - len(values)) for values in groups.values()])
    low, high = _interval(padded, sizes, np.random.default_rng(seed)) if len(groups) >= FEWEST else (None, None)
    return Estimate(float(padded.sum() / sizes.sum()), low, high, int(sizes.sum()), len(groups))


def _interval(padded, sizes, rng):
    drawn = rng.integers(len(sizes), size=(RESAMPLES, len(sizes)))
    of_each = sizes[drawn][..., None]  # [resamples, concepts, 1]
    seeds = (rng.random((*drawn.shape, padded.shape[1])) * of_each).astype(int)
    counted = np.arange(padded.shape[1]) < of_each
    sums = (padded[drawn[..., None], seeds] * counted).sum((1, 2))
    return tuple(float(v) for v in np.percentile(sums / counted.sum((1, 2)), percentiles(len(sizes))))


def percentiles(concepts):
    """Percentiles 2.5 and 97.5 for many concepts, wider ones for few. Plain percentiles of six concepts would contain
    the true mean in 85% of cases; these contain it in 93%."""
    tail = 100 * stats.norm.cdf(-np.sqrt(concepts / (concepts - 1)) * stats.t.ppf(0.975, concepts - 1))
    return tail, 100 - tail


def at_level(lines: Lines, level: float, value: Callable[[Point], float]) -> dict:
    """Unit -> `value` at that IS, for the units that reach it."""
    found = {unit: value_at(line, level, value) for unit, line in lines.items()}
    return {unit: v for unit, v in found.items() if v is not None}


def difference(ours: Mapping, others: Mapping) -> dict:
    """ours - others, for the units that both have."""
    return {unit: ours[unit] - others[unit] for unit in ours.keys() & others.keys()}


def mean_over_levels(lines, value: Callable[[Point], float], levels: Sequence[float] = LEVELS) -> dict:
    """Unit -> mean of `value` over the levels, for the units that reach all of them. One number, instead of a level
    picked by hand."""
    each = [at_level(lines, level, value) for level in levels]
    return {unit: _mean(e[unit] for e in each) for unit in set.intersection(*(set(e) for e in each))}


# --- gates ---


def is_damaged(point: Point, base: Point) -> bool:
    """Whether the model follows prompts without the concept worse than the bare base, by more than CONTROL_LOSS."""
    return point.control is not None and base.control is not None and base.control - point.control > CONTROL_LOSS


def sound(lines: Lines) -> Lines:
    """The units that reach every level of LEVELS and are damaged at none. Only these are compared."""
    control = [at_level(lines, level, lambda point: point.control) for level in LEVELS]
    return {
        unit: line
        for unit, line in lines.items()
        if all(unit in at and line[0].control - at[unit] <= CONTROL_LOSS for at in control)
    }


def gate(lines: Lines) -> dict[str, float]:
    """The share of units that reproduce the concept at any step, and the share of these that are undamaged at the first
    such step."""
    first = {unit: next((p for p in line[1:] if p.is_ >= REPRODUCED), None) for unit, line in lines.items()}
    reached = {unit: p for unit, p in first.items() if p is not None}
    sound = [not is_damaged(point, lines[unit][0]) for unit, point in reached.items()]
    return {"reproduced": len(reached) / len(first), "undamaged": _mean(sound) if sound else float("nan")}


def choose_rates(records: Sequence[dict]) -> dict[str, float]:
    """Each method's rate from the sweep, by `rate_name`: the one that reproduces the concept in most units without
    damage, and among equals the one with the highest TS there. TS is taken at IS REPRODUCED, so that learning less is
    not an advantage. Methods that were not swept are omitted. Raises SystemExit if none was."""
    given, chosen = points(records), {}
    for name in (rate_name(method, base) for base in ("noise", "flow") for method in METHODS):
        by_rate = curves(
            given,
            lambda cell, name=name: f"{cell.learning_rate}" if rate_name(cell.method, cell.base) == name else None,
        )
        if not by_rate:
            continue

        def merit(rate, by_rate=by_rate):
            passed, there = gate(by_rate[rate]), at_level(by_rate[rate], REPRODUCED, lambda p: p.ts)
            return passed["reproduced"] * np.nan_to_num(passed["undamaged"]), _mean(there.values()) if there else 0.0

        chosen[name] = float(max(by_rate, key=merit))
    if not chosen:
        raise SystemExit("There is no sweep of any method; run the study `rates` first.")
    return chosen
