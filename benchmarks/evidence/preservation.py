"""The section on what keeps the class as it was: prior preservation, output preservation, and neither."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tlora_core.training.config import TrainConfig

from . import markdown
from .analysis import (
    LEVELS,
    Lines,
    Point,
    at_level,
    curves,
    difference,
    estimate,
    gate,
    left_out,
    points,
)
from .claims import verdict
from .record_files import files_of, read
from .run import whole
from .study import SCALES, WAYS

NEITHER, (PRIOR, OUTPUT) = "neither", WAYS
LEVEL = LEVELS[0]
# What should be low, by its name in the tables.
LOST: dict[str, Callable[[Point], float]] = {
    "class becomes the concept": lambda p: _number(p.leak),
    "class prompts lost": lambda p: 1 - _number(p.of_class),
    "other prompts lost": lambda p: 1 - p.control,
    "background copied": lambda p: p.copied_background,
}
COLUMNS = {**LOST, "TS": lambda p: p.ts}
_PAIRS = ((OUTPUT, NEITHER), (PRIOR, NEITHER), (OUTPUT, PRIOR))


def section(results: Path) -> str:
    """Empty if the study was not run."""
    records = whole(read(*files_of(results, "preservation")))
    if not records:
        return ""
    lines = curves(points(records, left_out(results)), _way)
    return "\n\n".join((_about(lines), _verdicts(lines), _tables(lines)))


def _way(cell) -> str | None:
    weights = {"prior_weight": cell.prior_weight, "preservation_weight": cell.preservation_weight}
    given = {name: weight for name, weight in weights.items() if weight}
    return next((name for name, way in {NEITHER: {}, **WAYS}.items() if way == given), None)


def _about(lines: Mapping[str, Lines]) -> str:
    scale = SCALES["preservation"]
    units = {unit for each in lines.values() for unit in each}
    concepts = {concept for concept, _ in units}
    return (
        "## What keeps the class as it was\n\n"
        f"T-LoRA with neither, with prior preservation (`prior_weight` 1: {TrainConfig().prior_count} pictures of the "
        "class that the base draws) and with output preservation (`preservation_weight` 1: the base's own prediction "
        "for the caption without the token, on the subject's noised latents). "
        f"{len(concepts)} concepts, {len(units)} units, batches of "
        f"{scale.batch_size}, measured after {', '.join(map(str, scale.steps))} steps. **Class becomes the concept**: "
        "how like the concept pictures of the class word alone are, as IS. **Class prompts lost** and **other prompts "
        "lost**: the share of attributes that is wrong in prompts of the class, and of other objects, without the "
        "token. Compared at equal IS, but without the gate, as damage is what is measured, and at IS "
        f"{LEVEL:g} alone, the lowest level of this page: few trainings with prior preservation come further in these "
        "steps. After the last step the trainings differ in likeness, too."
    )


def _verdicts(lines: Mapping[str, Lines]) -> str:
    rows, by_verdict = [], {}
    for ours, others in _PAIRS:
        for name, value in LOST.items():
            less = _compared(lines, ours, others, lambda p, value=value: -value(p))
            trained = {concept for concept, _ in lines.get(ours, {}).keys() & lines.get(others, {}).keys()}
            at_end = estimate(_at_the_end(lines, ours, others, lambda p, value=value: -value(p)))
            claim, here = f"{ours}, less than {others}: {name}", verdict(less, len(trained))
            rows.append([claim, here, markdown.text_of(less), markdown.text_of(at_end)])
            by_verdict.setdefault(here, []).append(claim)
    head = ["claim", "here", f"less by, at IS {LEVEL:g}", "less by, after the last step"]
    settled = "".join(
        f" {kind.capitalize()}: {'; '.join(by_verdict[kind])}."
        for kind in ("confirmed", "contradicted")
        if kind in by_verdict
    )
    return f"{len(rows)} claims.{settled or ' None is settled.'}\n\n{markdown.table(head, rows)}"


def _compared(lines, ours, others, value):
    return estimate(difference(*(at_level(lines.get(name, {}), LEVEL, value) for name in (ours, others))))


def _at_the_end(lines, ours, others, value) -> dict:
    return difference(*({unit: value(line[-1]) for unit, line in lines.get(n, {}).items()} for n in (ours, others)))


def _tables(lines: Mapping[str, Lines]) -> str:
    head = ["", "units", "reproduced", f"steps to IS {LEVEL:g}", *COLUMNS]
    at_equal = [
        [
            name,
            str(len(units)),
            f"{gate(units)['reproduced']:.0%}",
            markdown.text_of(estimate(at_level(units, LEVEL, lambda p: p.step))),
            *(markdown.text_of(estimate(at_level(units, LEVEL, value))) for value in COLUMNS.values()),
        ]
        for name, units in _in_order(lines)
    ]
    last = [
        [name, *(markdown.text_of(estimate(_last(units, value))) for value in (lambda p: p.is_, *COLUMNS.values()))]
        for name, units in _in_order(lines)
    ]
    return (
        f"At IS {LEVEL:g}, of the units that reach it:\n\n{markdown.table(head, at_equal)}\n\nAfter the last step, "
        "whatever the likeness:\n\n"
        f"{markdown.table(['', 'IS', *COLUMNS], last)}"
    )


def _in_order(lines: Mapping[str, Lines]) -> Sequence[tuple[str, Lines]]:
    return [(name, lines[name]) for name in (NEITHER, *WAYS) if name in lines]


def _last(units: Lines, value: Callable[[Point], float]) -> dict:
    return {unit: value(line[-1]) for unit, line in units.items()}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
