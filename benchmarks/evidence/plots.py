"""The report's plots."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tlora_core.packages import required

from .analysis import Lines
from .claims import ByLikeness, Claim

COLOURS = {"confirmed": "C2", "contradicted": "C3", "not separable": "0.45"}


def _pyplot():
    required("matplotlib", "The report").use("Agg")
    from matplotlib import pyplot

    return pyplot


def over_steps(lines: dict[str, Lines], title: str, file: Path) -> None:
    """IS against TS over the steps: faint, each unit; bold, their mean at each step."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=110)
    for i, (name, units) in enumerate(lines.items()):
        colour = f"C{i % 10}"
        for line in units.values():
            axes.plot([p.is_ for p in line], [p.ts for p in line], color=colour, alpha=0.2, linewidth=0.8)
        steps = sorted(set.intersection(*({p.step for p in line} for line in units.values())))
        at = [[next(p for p in line if p.step == step) for line in units.values()] for step in steps]
        axes.plot(
            [np.mean([p.is_ for p in ps]) for ps in at],
            [np.mean([p.ts for p in ps]) for ps in at],
            "o-",
            color=colour,
            label=name,
        )
    axes.set(xlabel="IS (likeness to the concept)", ylabel="TS (prompt followed)", title=title)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    _save(figure, file)


def differences(made: Sequence[Claim], title: str, file: Path) -> None:
    """The difference of each claim that has an interval, from the top. Right of 0, the claim holds."""
    shown = [claim for claim in made if claim.found is not None and claim.found.low is not None]
    figure, axes = _pyplot().subplots(figsize=(7, 0.6 + 0.2 * max(1, len(shown))), dpi=110)
    for row, claim in enumerate(shown):
        axes.plot([claim.found.low, claim.found.high], [row, row], color=COLOURS[claim.verdict], linewidth=1.4)
        axes.plot([claim.found.mean], [row], "o", color=COLOURS[claim.verdict], markersize=4)
    axes.axvline(0, color="0.2", linewidth=0.8)
    axes.set(ylim=(max(1, len(shown)) - 0.5, -0.5), title=title)
    axes.set_yticks(range(len(shown)), [claim.text for claim in shown], fontsize=7)
    axes.grid(axis="x", alpha=0.3)
    _save(figure, file)


def by_likeness(made: Sequence[ByLikeness], file: Path) -> None:
    """The differences in TS at each level of IS, side by side, with their intervals."""
    names, levels = list(dict.fromkeys(row.text for row in made)), sorted({row.level for row in made})
    figure, axes = _pyplot().subplots(figsize=(9, 4.5), dpi=110)
    for row in made:
        place = names.index(row.text)
        x = levels.index(row.level) + 0.8 * ((place + 0.5) / len(names) - 0.5)
        if row.ts.low is not None:
            axes.plot([x, x], [row.ts.low, row.ts.high], color=f"C{place}", linewidth=1.4)
        axes.plot(
            [x], [row.ts.mean], "o", color=f"C{place}", markersize=4, label=row.text if row.level == levels[0] else None
        )
    axes.axhline(0, color="0.2", linewidth=0.8)
    axes.set(title="Difference in TS, all units that reach the IS", xlabel="IS (likeness to the concept)")
    axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    axes.grid(axis="y", alpha=0.3)
    _save(figure, file)


def _save(figure, file: Path) -> None:
    figure.savefig(file, bbox_inches="tight")
    _pyplot().close(figure)
