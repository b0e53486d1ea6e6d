"""Writes docs/EVIDENCE.md and its plots from the records of the largest scale that was run."""

from pathlib import Path

from . import preservation, stopping_report
from .about import COMMAND, decided, head, limits, scorers
from .analysis import Point, curves, left_out, points
from .record_files import files_of, read
from .run import whole
from .sections import effective_rank, in_order, section, sweep
from .sheets import samples
from .tables import TABLES
from .verdicts import by_likeness, verdicts

_TITLE = f"""# Evidence: does T-LoRA do what its paper says?

`{COMMAND} report` makes this page from `benchmarks/results/`; nothing here is written by hand.

"""


def write(results: Path, docs: Path) -> None:
    """Overwrites docs/EVIDENCE.md and the pictures in docs/evidence."""
    pictures = docs / "evidence"
    pictures.mkdir(parents=True, exist_ok=True)
    scale, given = largest(results)
    parts = [
        _TITLE + head(scale, given),
        *verdicts(given, pictures),
        by_likeness(given, pictures),
        scorers(results),
        sweep(results),
    ]
    for table in TABLES:
        if table.says_something(given):
            parts.append(section(table, in_order(curves(given, table.variant)), pictures))
    parts.append(stopping_report.section(results))
    kept = preservation.section(results)
    parts += [samples(results, pictures), effective_rank(given), kept, decided(results), limits()]
    (docs / "EVIDENCE.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def largest(results: Path) -> tuple[str, list[Point]]:
    """Name and points of the largest scale with records; ("", []) if there are none."""
    return next(((name, given) for name in ("full", "pilot", "quick") if (given := measured(results, name))), ("", []))


def measured(results: Path, scale: str) -> list[Point]:
    """The points of a scale's complete trainings."""
    records = read(*files_of(results, scale))
    return points(whole(records), left_out(results)) if records else []
