"""The page's pictures: the sheets of two trainings of each concept."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .prompts import prompts, settings
from .run import concept_named, sheet_path
from .study import RATES, SCALES, Cell, meaningful

_METHODS = ("lora", "tlora")


def samples(results: Path, pictures: Path) -> str:
    """Two trainings of each concept, their sheets one above the other; empty without sheets."""
    if not RATES.exists():
        return ""
    scale, rates = SCALES["full"], json.loads(RATES.read_text())
    shown = {}
    for name in scale.concepts:
        cells = [
            meaningful(Cell(name, 0, m, learning_rate=rates[m], steps=scale.steps, draws=scale.draws)) for m in _METHODS
        ]
        files = [sheet_path(results / "sheets", cell) for cell in cells]
        if file := _joined(files, pictures / f"{name.replace(' ', '_')}.webp"):
            shown[name] = file.name
    if not shown:
        return ""
    first = next(iter(shown))
    others = ", ".join(f"[{name}](evidence/{file})" for name, file in shown.items() if name != first)
    return (
        _caption(first, scale)
        + (f" Other concepts: {others}." if others else "")
        + (f"\n\n![Sheets of two trainings](evidence/{shown[first]})")
    )


def _caption(name, scale):
    concept = concept_named(name)
    texts = "; ".join(f"*{p.text}*" for p in prompts(concept, 0, scale.draws, settings(concept, 0)[0]))
    return (
        f"## By eye\n\nThe {name}, trained with {_METHODS[0]} (above) and {_METHODS[1]} (below). The training picture "
        f"comes first, then a row for each of the steps {', '.join(map(str, scale.steps))}. The prompts from left to "
        f"right: {texts}; the last {scale.draws.control} pictures show other things. Every training leaves such a "
        "sheet in `benchmarks/results/sheets`."
    )


def _joined(files: Sequence[Path], whole: Path) -> Path | None:
    """The pictures `files` below one another, saved as `whole`. If some are missing: the picture of an earlier report,
    or None."""
    if all(file.exists() for file in files):
        parts = [Image.open(file).convert("RGB") for file in files]
        sheet = Image.new(
            "RGB", (max(p.width for p in parts), sum(p.height for p in parts) + 16 * (len(parts) - 1)), "white"
        )
        top = 0
        for part in parts:
            sheet.paste(part, (0, top))
            top += part.height + 16
        sheet.save(whole, quality=80)
    return whole if whole.exists() else None
