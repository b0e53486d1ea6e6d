"""Tables and figures as Markdown."""

from collections.abc import Sequence

import numpy as np

from .analysis import Estimate


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def text_of(found: Estimate | None) -> str:
    return "-" if found is None else str(found)


def percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0%}"
