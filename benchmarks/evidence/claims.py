"""The paper's claims, each judged by an interval: confirmed, contradicted, not separable, or not tested."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .analysis import REPRODUCED, Estimate, Point, at_level, curves, difference, estimate, mean_over_levels, sound
from .comparisons import (
    FLOW,
    LORA,
    ORTHO,
    SEVERAL_SEEDS,
    TLORA,
    VANILLA,
    comparisons,
    comparisons_at_the_end,
    comparisons_by_likeness,
    copying,
)
from .study import FRESH, RANKS, Cell, meaningful

Unit = tuple[str, int]


@dataclass(frozen=True)
class Differences:
    """ours - others by unit (concept and seed). sound: for the units that pass the gate; every: for all units that
    reach the levels of IS. trained: the units that were trained both ways."""

    sound: dict[Unit, float]
    every: dict[Unit, float]
    trained: set[Unit]


@dataclass(frozen=True)
class Claim:
    """found: the difference over the units that pass the gate, which decides the verdict; figures: the same in words;
    ungated: the same over all units that reach the levels."""

    text: str
    verdict: str
    found: Estimate | None
    figures: str
    ungated: str


def verdict(found: Estimate | None, trained: int) -> str:
    """The verdict on a difference that should be above zero. trained: the number of concepts trained both ways."""
    if not trained:
        return "not tested"
    if found is None or found.low is None:
        return (
            f"no verdict ({found.concepts if found else 0} of {trained} concept{'s' * (trained > 1)} can be compared)"
        )
    return "confirmed" if found.low > 0 else "contradicted" if found.high < 0 else "not separable"


def of_paper(given: Sequence[Point]) -> list[Claim]:
    return [*(_claim(text, gain(given, ours, others)) for text, ours, others in comparisons()), _gain_grows(given)]


def of_the_end(given: Sequence[Point]) -> list[Claim]:
    return [
        _claim(text, at_the_end(given, ours, others, value)) for text, ours, others, value in comparisons_at_the_end()
    ]


def of_copying(given: Sequence[Point]) -> list[Claim]:
    later = [point for point in given if point.cell.seed != 0]  # the pictures of seed 0 suggested these claims
    made = []
    for what, value in (
        ("place", lambda point: -point.copied_place),
        ("background", lambda point: -point.copied_background),
    ):
        for who, ours, others in copying():
            made.append(_claim(f"{what}: {who}", gain(given, ours, others, value)))
            if ours in SEVERAL_SEEDS and others == LORA:
                made.append(_claim(f"{what}: {who}; without seed 0", gain(later, ours, others, value)))
    return made


@dataclass(frozen=True)
class ByLikeness:
    """One comparison at one level of IS, over all units that reach it both ways, without the gate: `ours` -
    `others`."""

    text: str
    level: float
    ts: Estimate | None
    control: Estimate | None
    copied_background: Estimate | None


def by_likeness(given: Sequence[Point], levels: Sequence[float]) -> list[ByLikeness]:
    """The comparisons level by level. Damage at high likeness also shows in prompts without the concept (control).
    Without the FRESH seeds."""
    seen = [point for point in given if point.cell.seed not in FRESH]
    made = []
    for text, ours, others in comparisons_by_likeness():
        a, b = _lines(seen, ours, others)
        for level in levels:
            found = (
                estimate(difference(at_level(a, level, value), at_level(b, level, value)))
                for value in (lambda p: p.ts, lambda p: p.control, lambda p: p.copied_background)
            )
            made.append(ByLikeness(text, level, *found))
    return made


def of_likeness(given: Sequence[Point]) -> list[Claim]:
    """The claims that `by_likeness` suggested, judged by trainings made afterwards: at IS REPRODUCED, without the
    gate."""
    of_fresh = [point for point in given if point.cell.seed in FRESH]
    made = []
    for who, ours, others in (
        ("T-LoRA", TLORA, LORA),
        ("Vanilla T-LoRA (mask without start)", VANILLA, LORA),
        ("Ortho-LoRA (start without mask)", ORTHO, LORA),
        ("on the flow-matching base, Vanilla T-LoRA", {**VANILLA, **FLOW}, {**LORA, **FLOW}),
    ):
        a, b = _lines(of_fresh, ours, others)
        found = difference(*(at_level(lines, REPRODUCED, lambda point: point.ts) for lines in (a, b)))
        made.append(
            _claim(
                f"{who} follows prompts better than LoRA where both first reach IS {REPRODUCED:g}",
                Differences(found, found, a.keys() & b.keys()),
            )
        )
    return made


def _claim(text: str, differences: Differences) -> Claim:
    found, ungated = estimate(differences.sound), estimate(differences.every)
    return Claim(
        text,
        verdict(found, len({concept for concept, _ in differences.trained})),
        found,
        _figures(found),
        _figures(ungated),
    )


def _figures(found):
    """A difference, and the numbers of units and concepts behind it."""
    if found is None:
        return ""
    number = f"{found.mean:.3f}" if found.low is None else str(found)
    return (
        f"{number}, {found.units} unit{'s' * (found.units > 1)} of {found.concepts} concept{'s' * (found.concepts > 1)}"
    )


def gain(given, ours: dict, others: dict, value: Callable[[Point], float] = lambda point: point.ts) -> Differences:
    """`value`, by default TS, of cells with the fields `ours` minus that of cells with `others`, at equal IS."""
    a, b = _lines(given, ours, others)
    return Differences(
        difference(mean_over_levels(sound(a), value), mean_over_levels(sound(b), value)),
        difference(mean_over_levels(a, value), mean_over_levels(b, value)),
        a.keys() & b.keys(),
    )


def at_the_end(given, ours: dict, others: dict, value: Callable[[Point], float]) -> Differences:
    """Like `gain`, but after the last step that both have. Without the gate, which concerns equal IS."""
    a, b = _lines(given, ours, others)
    found = {}
    for unit in a.keys() & b.keys():
        of_a, of_b = ({point.step: value(point) for point in line[1:]} for line in (a[unit], b[unit]))
        if both := of_a.keys() & of_b.keys():
            found[unit] = of_a[max(both)] - of_b[max(both)]
    return Differences(found, found, a.keys() & b.keys())


def _lines(given, ours, others):
    found = curves(given, lambda cell: "ours" if _is(cell, ours) else "others" if _is(cell, others) else None)
    return found.get("ours", {}), found.get("others", {})


def _is(cell, changes):
    usual = Cell(cell.concept, cell.seed, **changes)
    same = (
        "method",
        "rank",
        "min_share",
        "alpha",
        "curve",
        "start",
        "images",
        "noise_from",
        "noise_to",
        "base",
        "pace",
    )
    return all(getattr(cell, name) == getattr(meaningful(usual), name) for name in same)


def _gain_grows(given):
    """The gain over LoRA at the highest rank minus that at the lowest at which enough concepts can be compared, within
    units."""
    gains = {rank: gain(given, {**TLORA, "rank": rank}, {**LORA, "rank": rank}) for rank in RANKS}
    highest = gains[RANKS[-1]]

    def growth(rank):
        other = gains[rank]
        return Differences(
            difference(highest.sound, other.sound),
            difference(highest.every, other.every),
            highest.trained & other.trained,
        )

    enough = (rank for rank in RANKS[:-1] if (found := estimate(growth(rank).sound)) and found.low is not None)
    lowest = next(enough, RANKS[0])
    return _claim(f"Table 1: the gain over LoRA grows with the rank ({lowest} to {RANKS[-1]})", growth(lowest))
