"""The paper's claims, each judged by an interval: confirmed, contradicted, not separable, or not tested."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .analysis import Estimate, Point, curves, difference, estimate, mean_over_levels, sound
from .study import RANK, RANKS, Cell, meaningful

FEWEST = 5  # concepts that a verdict needs


@dataclass(frozen=True)
class Claim:
    """figures: over the units that pass the gate, which the verdict goes by; ungated: over all units that reach the levels."""

    text: str
    verdict: str
    figures: str
    ungated: str


def verdict(found: Estimate | None) -> str:
    """Of a difference that the paper says is above zero. Intervals over a few concepts say little."""
    if found is None:
        return "not tested"
    if found.concepts < FEWEST:
        return f"not tested ({found.concepts} concept{'s' * (found.concepts > 1)})"
    return "confirmed" if found.low > 0 else "contradicted" if found.high < 0 else "not separable"


def judge(given: Sequence[Point]) -> list[Claim]:
    made = [_claim(text, gain(given, ours, others)) for text, ours, others in _comparisons()]
    made.append(_gain_grows(given))
    # Copying was thought of after the pictures of seed 0: the other seeds judge it anew.
    fresh = [point for point in given if point.cell.seed != 0]
    for text, value in _COPYING:
        copies = f"copies {text} less often than LoRA where the prompt leaves it open"
        for method, who in (("tlora", "T-LoRA"), ("vanilla_tlora", "the mask alone (Vanilla)"), ("ortho_lora", "the start alone (Ortho-LoRA)")):
            for where, points in (("", given), (", seeds 1 and 2 alone", fresh)):
                made.append(_claim(f"Section 1: {who} {copies}{where}", gain(points, {"method": method}, {"method": "lora"}, value)))
        for changes, who in (({"method": "tlora"}, "T-LoRA"), ({"method": "vanilla_tlora"}, "Vanilla T-LoRA"),
                             ({"method": "tlora", "min_share": 0.0}, "T-LoRA with r_min 0"),
                             ({"method": "lora", "noise_to": 0.5}, "LoRA trained on t up to 0.5 alone")):
            ours, others = {**changes, "base": "flow"}, {"method": "lora", "base": "flow"}
            made.append(_claim(f"On the flow-matching base {who} {copies}", gain(given, ours, others, value)))
    return made


_COPYING = (("the training picture's place", lambda point: -point.copied_place),
            ("its background", lambda point: -point.copied_background))


def _claim(text: str, by_unit: Callable[[bool], dict]) -> Claim:
    """by_unit: differences by unit; of those that pass the gate, or of all."""
    found, ungated = estimate(by_unit(True)), estimate(by_unit(False))
    return Claim(text, verdict(found), _figures(found), _figures(ungated))


def _figures(found):
    return "" if found is None else f"{found}, {found.units} units"


def gain(given, ours: dict, others: dict, value: Callable[[Point], float] = lambda point: point.ts) -> Callable[[bool], dict]:
    """By unit: `value`, TS by default, of cells with the fields `ours` above that of cells with `others`, at equal IS."""
    lines = curves(given, lambda cell: "ours" if _is(cell, ours) else "others" if _is(cell, others) else None)
    if len(lines) < 2:
        return lambda gated: {}

    def by_unit(gated):
        return difference(*(mean_over_levels(sound(lines[name]) if gated else lines[name], value) for name in ("ours", "others")))
    return by_unit


def _is(cell, changes):
    usual = Cell(cell.concept, cell.seed, **changes)
    same = ("method", "rank", "min_share", "alpha", "curve", "start", "images", "noise_from", "noise_to", "base")
    return all(getattr(cell, name) == getattr(meaningful(usual), name) for name in same)


def _comparisons():
    tlora, lora = {"method": "tlora"}, {"method": "lora"}
    yield f"Table 1, 2: T-LoRA obeys better than LoRA at equal likeness (rank {RANK})", tlora, lora
    yield "Table 1: so does Vanilla T-LoRA (mask without start)", {"method": "vanilla_tlora"}, lora
    yield "Table 3: T-LoRA obeys better than Vanilla T-LoRA at the highest rank", tlora, {"method": "vanilla_tlora"}
    yield "Table 3: T-LoRA obeys better than Ortho-LoRA (start without mask)", tlora, {"method": "ortho_lora"}
    for other in ("oft", "gsoft"):
        yield f"Table 2: T-LoRA obeys better than {other.upper()}", tlora, {"method": other}
    yield "Table 4: T-LoRA with one picture obeys better than LoRA with three", tlora, {**lora, "images": 3}
    flow = {"base": "flow"}
    yield "Table 5: T-LoRA obeys better than LoRA on a flow-matching base", {**tlora, **flow}, {**lora, **flow}
    yield "Table 5: so does Vanilla T-LoRA, the paper's choice there", {"method": "vanilla_tlora", **flow}, {**lora, **flow}
    yield "Table 5, figure 6: r_min 0% obeys better than LoRA there", {**tlora, **flow, "min_share": 0.0}, {**lora, **flow}
    yield "Table 5, figure 2: LoRA trained on t up to 0.5 alone obeys better than LoRA there", {**lora, **flow, "noise_to": 0.5}, {**lora, **flow}
    yield ("Figure 2: LoRA trained without the noisiest timesteps (t >= 800) obeys better than with all", {**lora, "noise_to": 0.8}, lora)
    yield "Figure 5: last of R obeys better than principal of R", {"method": "ortho_lora"}, {"method": "ortho_lora", "start": "principal_random"}
    yield ("Figure 5: last of R obeys better than principal of W (PiSSA)",
           {"method": "ortho_lora"}, {"method": "ortho_lora", "start": "principal_weight"})
    yield "Figure 6: r_min 25% obeys better than 50%", {**tlora, "min_share": 0.25}, tlora
    for curve in ("equal signal", "equal signal, to 0"):
        yield f"Beyond the paper: r(t) moved to where this world decides ({curve}) obeys better than r(t)", {**tlora, "curve": curve}, tlora
    yield "Figure 6: r_min 50% obeys better than 100%, which is Ortho-LoRA", tlora, {"method": "ortho_lora"}


def _gain_grows(given):
    """The gain over LoRA at the highest rank minus that at the lowest at which enough concepts can be compared, within units."""
    gains = {rank: gain(given, {"method": "tlora", "rank": rank}, {"method": "lora", "rank": rank}) for rank in RANKS}

    def growth(rank):
        return lambda gated: difference(gains[RANKS[-1]](gated), gains[rank](gated))

    enough = (rank for rank in RANKS[:-1] if (found := estimate(growth(rank)(True))) and found.concepts >= FEWEST)
    lowest = next(enough, RANKS[0])
    return _claim(f"Table 1: the gain over LoRA grows with the rank ({lowest} to {RANKS[-1]})", growth(lowest))
