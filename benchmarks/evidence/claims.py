"""The paper's claims, each judged by an interval: confirmed, contradicted, not separable, or not tested."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tlora_core.method.starts import DEFAULT_START

from .analysis import REPRODUCED, Estimate, Point, at_level, curves, difference, estimate, mean_over_levels, sound
from .study import ALPHAS, FREE, FRESH, PAPERS_STARTS, PUBLISHED_START, RANK, RANKS, SMALL, Cell, meaningful

Unit = tuple[str, int]
_LORA, _TLORA, _VANILLA, _ORTHO = ({"method": name} for name in ("lora", "tlora", "vanilla_tlora", "ortho_lora"))
SEVERAL_SEEDS = (_TLORA, _VANILLA, _ORTHO)
_SLOW_LORA = {"method": "lora", "pace": 0.5}
_FLOW = {"base": "flow"}


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
    return [*(_claim(text, gain(given, ours, others)) for text, ours, others in _comparisons()), _gain_grows(given)]


def of_the_end(given: Sequence[Point]) -> list[Claim]:
    return [
        _claim(text, at_the_end(given, ours, others, value)) for text, ours, others, value in _comparisons_at_the_end()
    ]


def of_copying(given: Sequence[Point]) -> list[Claim]:
    later = [point for point in given if point.cell.seed != 0]  # the pictures of seed 0 suggested these claims
    made = []
    for what, value in (
        ("place", lambda point: -point.copied_place),
        ("background", lambda point: -point.copied_background),
    ):
        for who, ours, others in _copying():
            made.append(_claim(f"{what}: {who}", gain(given, ours, others, value)))
            if ours in SEVERAL_SEEDS and others == _LORA:
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
    for text, ours, others in _by_likeness():
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
        ("T-LoRA", _TLORA, _LORA),
        ("Vanilla T-LoRA (mask without start)", _VANILLA, _LORA),
        ("Ortho-LoRA (start without mask)", _ORTHO, _LORA),
        ("on the flow-matching base, Vanilla T-LoRA", {**_VANILLA, **_FLOW}, {**_LORA, **_FLOW}),
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


def _comparisons():
    """(text, ours, others): ours follows prompts better at equal IS."""
    yield f"Tables 1, 2: T-LoRA follows prompts better than LoRA (rank {RANK})", _TLORA, _LORA
    for rank in RANKS[-2::-1]:
        yield (
            f"Table 1: T-LoRA follows prompts better than LoRA (rank {rank})",
            {**_TLORA, "rank": rank},
            {**_LORA, "rank": rank},
        )
    yield (
        f"Table 1: Vanilla T-LoRA (mask without start) follows prompts better than LoRA (rank {RANK})",
        _VANILLA,
        _LORA,
    )
    yield "Tables 1, 2: T-LoRA follows prompts better than LoRA at half its learning rate", _TLORA, _SLOW_LORA
    yield (
        "Table 1: Vanilla T-LoRA follows prompts better than LoRA at half its learning rate, which is about Vanilla's",
        _VANILLA,
        _SLOW_LORA,
    )
    yield "Table 3: T-LoRA follows prompts better than Vanilla T-LoRA at the highest rank", _TLORA, _VANILLA
    yield (
        "Table 3, figure 6: T-LoRA follows prompts better than Ortho-LoRA (start without mask; r_min 100%)",
        _TLORA,
        _ORTHO,
    )
    for other in ("oft", "gsoft", "svdiff"):
        yield f"Table 2: T-LoRA follows prompts better than {other.upper()}", _TLORA, {"method": other}
    yield "Table 4: T-LoRA with one picture follows prompts better than LoRA with two", _TLORA, {**_LORA, "images": 2}
    yield "Table 4: T-LoRA with one picture follows prompts better than LoRA with three", _TLORA, {**_LORA, "images": 3}
    for rank in (RANK, *SMALL):
        lora = {**_LORA, **_FLOW, "rank": rank}
        yield (
            f"Table 5: T-LoRA follows prompts better than LoRA on a flow-matching base (rank {rank})",
            {**_TLORA, **_FLOW, "rank": rank},
            lora,
        )
        yield (
            f"Table 5: Vanilla T-LoRA follows prompts better than LoRA on a flow-matching base (rank {rank})",
            {**_VANILLA, **_FLOW, "rank": rank},
            lora,
        )
    yield (
        "Table 5, figure 6: T-LoRA with r_min 0% follows prompts better than LoRA on a flow-matching base",
        {**_TLORA, **_FLOW, "min_share": 0.0},
        {**_LORA, **_FLOW},
    )
    yield (
        "Figure 2: LoRA trained on t < 500 alone follows prompts better than on all t",
        {**_LORA, "noise_to": 0.5},
        _LORA,
    )
    yield (
        "Figure 2: LoRA trained on t < 800 alone follows prompts better than on all t",
        {**_LORA, "noise_to": 0.8},
        _LORA,
    )
    yield (
        "Figure 2: LoRA trained on t >= 800 alone follows prompts worse than on all t",
        _LORA,
        {**_LORA, "noise_from": 0.8},
    )
    yield (
        "Figure 2: LoRA trained on t < 500 alone follows prompts better than on all t, on a flow-matching base",
        {**_LORA, **_FLOW, "noise_to": 0.5},
        {**_LORA, **_FLOW},
    )
    for start in PAPERS_STARTS:
        if start != DEFAULT_START:
            yield f"Figure 5: {DEFAULT_START} follows prompts better than {start}", _ORTHO, {**_ORTHO, "start": start}
    yield (
        f"Beyond the paper: T-LoRA from {PUBLISHED_START} follows prompts better than from {DEFAULT_START}",
        {**_TLORA, "start": PUBLISHED_START},
        _TLORA,
    )
    yield "Figure 6: r_min 50% follows prompts better than 0%", _TLORA, {**_TLORA, "min_share": 0.0}
    yield "Figure 6: r_min 50% follows prompts better than 25%", _TLORA, {**_TLORA, "min_share": 0.25}
    for alpha in ALPHAS:
        yield (
            f"Beyond the paper: r(t) with alpha {alpha:g} follows prompts better than with 1",
            {**_TLORA, "alpha": alpha},
            _TLORA,
        )
    for curve in FREE:
        yield (
            f"Beyond the paper: r(t) as {curve} follows prompts better than the paper's",
            {**_TLORA, "curve": curve},
            _TLORA,
        )


def _comparisons_at_the_end():
    """(text, ours, others, value): value is higher for ours after the last step."""
    for part, changes in (("t < 800", {"noise_to": 0.8}), ("t < 500", {"noise_to": 0.5})):
        yield (
            f"Figure 2: LoRA trained on {part} alone is less like the concept in the end (IS) than on all t",
            _LORA,
            {**_LORA, **changes},
            lambda point: point.is_,
        )
    for rank in (RANK, 8):
        yield (
            f"Figure 4: B has a higher effective rank in Ortho-LoRA than in LoRA (rank {rank})",
            {**_ORTHO, "rank": rank},
            {**_LORA, "rank": rank},
            lambda point: point.effective_rank,
        )


def _copying():
    """(text, ours, others): ours copies less often."""
    for who, ours in (
        ("T-LoRA", _TLORA),
        ("the mask alone (Vanilla)", _VANILLA),
        ("the start alone (Ortho-LoRA)", _ORTHO),
    ):
        yield f"{who} copies it less than LoRA", ours, _LORA
        yield f"{who} copies it less than LoRA at half its learning rate", ours, _SLOW_LORA
    yield "LoRA at half its learning rate copies it less than LoRA", _SLOW_LORA, _LORA
    for rank in RANKS[-2::-1]:
        yield f"T-LoRA copies it less than LoRA at rank {rank}", {**_TLORA, "rank": rank}, {**_LORA, "rank": rank}
    yield "T-LoRA with r_min 0% copies it less than T-LoRA with 50%", {**_TLORA, "min_share": 0.0}, _TLORA
    yield (
        "T-LoRA with r_min 0% copies it less than LoRA at half its learning rate",
        {**_TLORA, "min_share": 0.0},
        _SLOW_LORA,
    )
    for part, changes in (("t < 800", {"noise_to": 0.8}), ("t < 500", {"noise_to": 0.5})):
        yield f"LoRA trained on {part} alone copies it less than LoRA trained on all t", {**_LORA, **changes}, _LORA
    yield (
        "LoRA trained on all t copies it less than LoRA trained on t >= 800 alone",
        _LORA,
        {**_LORA, "noise_from": 0.8},
    )
    for rank in (RANK, *SMALL):
        for who, ours in (("T-LoRA", _TLORA), ("Vanilla T-LoRA", _VANILLA)):
            yield (
                f"on the flow-matching base, {who} copies it less than LoRA at rank {rank}",
                {**ours, **_FLOW, "rank": rank},
                {**_LORA, **_FLOW, "rank": rank},
            )
    yield (
        "on the flow-matching base, T-LoRA with r_min 0% copies it less than LoRA",
        {**_TLORA, **_FLOW, "min_share": 0.0},
        {**_LORA, **_FLOW},
    )
    yield (
        "on the flow-matching base, LoRA trained on t < 500 alone copies it less than LoRA trained on all t",
        {**_LORA, **_FLOW, "noise_to": 0.5},
        {**_LORA, **_FLOW},
    )


def _by_likeness():
    """(text, ours, others)."""
    for base, fields in (("", {}), (", flow-matching base", _FLOW)):
        lora = {**_LORA, **fields}
        yield f"T-LoRA - LoRA{base}", {**_TLORA, **fields}, lora
        yield f"Vanilla T-LoRA - LoRA{base}", {**_VANILLA, **fields}, lora
        yield f"T-LoRA with r_min 0% - LoRA{base}", {**_TLORA, **fields, "min_share": 0.0}, lora
    yield "Ortho-LoRA - LoRA", _ORTHO, _LORA
    yield "T-LoRA - Ortho-LoRA", _TLORA, _ORTHO
    yield "LoRA at half its learning rate - LoRA", _SLOW_LORA, _LORA
    yield "T-LoRA - LoRA at half its learning rate", _TLORA, _SLOW_LORA


def _gain_grows(given):
    """The gain over LoRA at the highest rank minus that at the lowest at which enough concepts can be compared, within
    units."""
    gains = {rank: gain(given, {**_TLORA, "rank": rank}, {**_LORA, "rank": rank}) for rank in RANKS}
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
