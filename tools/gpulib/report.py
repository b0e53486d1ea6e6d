"""The table and the JSON of a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .runner import NOT_RUN, Result

FORMAT = 1  # of the JSON; raise it when a name in it changes its meaning
STATUSES = ("passed", "failed", "skipped", NOT_RUN)
_WIDTH = 150


def summary(results: Sequence[Result]) -> dict[str, int]:
    counted = Counter(result.status for result in results)
    return {status: counted[status] for status in STATUSES}


def line(result: Result) -> str:
    """One row: part, status, seconds, figures or what was wrong."""
    figures = "  ".join(f"{name} {_short(value)}" for name, value in result.figures.items() if _is_shown(value))
    text = "; ".join(part for part in (result.message, figures) if part)
    room = _WIDTH - 58
    text = text if len(text) <= room else f"{text[: room - 4]} ..."
    return f"{result.name:38} {result.status:8} {result.seconds:6.1f} s  {text}".rstrip()


def _is_shown(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(results: Sequence[Result]) -> str:
    """A row for each part, then the counts; what was not run is named as such."""
    counts = ", ".join(f"{number} {status}" for status, number in summary(results).items())
    return "\n".join([*(line(result) for result in results), counts + "."])


def as_json(results: Sequence[Result], **about: Any) -> dict[str, Any]:
    """machine: the figures of the part of that name; empty if it gave none."""
    machine = next((result.figures for result in results if result.name == "machine"), {})
    return {
        "format": FORMAT,
        **about,
        "machine": machine,
        "summary": summary(results),
        "parts": [asdict(result) for result in results],
    }


def write(path: str, report: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def status(results: Sequence[Result]) -> int:
    """0 only if all that ran passed, and something did."""
    counts = summary(results)
    return 0 if counts["passed"] and not counts["failed"] else 1
