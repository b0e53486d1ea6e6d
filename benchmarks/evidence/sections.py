"""The page's sections of figures: the sweep of learning rates, each table, and effective ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tlora_core.method.adapters import METHODS
from tlora_core.method.starts import STARTS

from . import markdown, plots
from .analysis import (
    CONTROL_LOSS,
    LEVELS,
    REPRODUCED,
    Lines,
    Point,
    at_level,
    choose_rates,
    curves,
    difference,
    estimate,
    gate,
    load_sweep,
    mean_over_levels,
    points,
    sound,
)
from .study import BLOCKS, RANK, rate_name
from .tables import Table, ranks


def sweep(results: Path) -> str:
    """The learning rates that were tried; empty if there was no sweep."""
    records = load_sweep(results)
    if not records:
        return ""
    given, rows, at_an_end = points(records), [], []
    for name, chosen in choose_rates(records).items():
        by_rate = curves(given, lambda c, n=name: f"{c.learning_rate:g}" if rate_name(c.method, c.base) == n else None)
        rows += [
            [name, f"**{rate}**" if float(rate) == chosen else rate, *_of_rate(lines)]
            for rate, lines in by_rate.items()
        ]
        at_an_end += [name] if chosen in (min(map(float, by_rate)), max(map(float, by_rate))) else []
    return (
        f"## Learning rates\n\nSwept for each method at rank {RANK} (OFT, GSOFT: {BLOCKS['oft']} and "
        f"{BLOCKS['gsoft']} blocks). Reproduced: IS {REPRODUCED} at any measured step. Undamaged: at the first such "
        f"step, prompts without the concept lose at most {CONTROL_LOSS:.0%} of their attributes. The chosen rate, in "
        "bold, is the one that reproduces most units undamaged, and among equals the one with the highest TS. Methods "
        f"whose chosen rate is at an end of the swept range: {', '.join(at_an_end) or 'none'}.\n\n"
        + markdown.table(["method", "rate", "units", "reproduced", "undamaged", f"TS at IS {REPRODUCED}"], rows)
    )


def _of_rate(lines):
    passed = gate(lines)
    return (
        str(len(lines)),
        f"{passed['reproduced']:.0%}",
        markdown.percent(passed["undamaged"]),
        markdown.text_of(estimate(at_level(lines, REPRODUCED, _ts))),
    )


def in_order(lines: Mapping[str, Lines]) -> dict[str, Lines]:
    """Rows by method, rank and the rest, in whatever order they were trained."""

    def place(item):
        cell = next(iter(item[1].values()))[-1].cell
        return (
            list(METHODS).index(cell.method),
            cell.rank,
            cell.images,
            list(STARTS).index(cell.start),
            cell.curve,
            cell.alpha,
            cell.noise_from,
            cell.noise_to,
            cell.min_share,
            cell.pace,
        )

    return dict(sorted(lines.items(), key=place))


def section(table: Table, lines: Mapping[str, Lines], pictures: Path) -> str:
    """One table, its means over the levels, and its plot."""
    plots.over_steps(dict(lines), table.title, pictures / f"{table.name}.png")
    compared = {name: sound(units) for name, units in lines.items()}
    head = [
        "",
        "units",
        "reproduced",
        "pass the gate",
        f"steps to IS {LEVELS[1]:g}",
        *(f"TS at IS {v:g}" for v in LEVELS),
    ]
    rows = [_row(name, units, compared[name]) for name, units in lines.items()]
    others = {name: table.other(units) for name, units in lines.items()}
    return (
        f"## {table.title}\n\n{markdown.table(head, rows)}\n\nMeans over the three levels of IS, of the units that "
        f"pass the gate. After each comes its difference to {table.against_text}, within units:\n\n"
        f"{_means(compared, others)}\n\n![IS and TS over the steps](evidence/{table.name}.png)"
    )


def _row(name, units, compared):
    steps = at_level(compared, LEVELS[1], lambda p: p.step).values()
    return [
        name,
        str(len(units)),
        f"{gate(units)['reproduced']:.0%}",
        str(len(compared)),
        f"{np.mean(list(steps)):.0f}" if steps else "-",
        *(markdown.text_of(estimate(at_level(units, level, _ts))) for level in LEVELS),
    ]


_MEANS = {
    "TS": lambda p: p.ts,
    "place as asked": lambda p: p.by_attribute.get("place", np.nan),
    "place copied": lambda p: p.copied_place,
    "background copied": lambda p: p.copied_background,
    "spread of places": lambda p: p.spread,
}


def _means(lines, others):
    """others: the row that each row is compared with."""
    rows = []
    for name, units in lines.items():
        cells, other = [], lines.get(others[name], {}) if others[name] != name else {}
        for value in _MEANS.values():
            ours = mean_over_levels(units, value)
            cells.append(markdown.text_of(estimate(ours)))
            apart = estimate(difference(ours, mean_over_levels(other, value))) if other else None
            cells.append(markdown.text_of(apart))
        rows.append([name, *cells])
    return markdown.table(["", *(text for name in _MEANS for text in (name, "difference"))], rows)


def effective_rank(given: Sequence[Point]) -> str:
    """Empty if no training recorded it."""
    rows = []
    for name, units in curves(given, ranks).items():
        last = {unit: line[-1].effective_rank for unit, line in units.items() if line[-1].effective_rank is not None}
        if last:
            rows.append([name, str(len(last)), markdown.text_of(estimate(last))])
    head = ["", "units", "effective rank of B, mean over layers"]
    return "## Figures 4 and 9: effective rank after the last step\n\n" + markdown.table(head, rows) if rows else ""


def _ts(point):
    return point.ts
