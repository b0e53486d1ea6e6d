"""Makes a contact sheet: `sheet.py OUT.jpg`, with JSON on standard input, [[title, [path, ...]], ...].

A validation's picture shows several prompts, and is taken apart.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from tlora_core.reports.sheet import MAX_PIXELS, comparison_sheet
from tlora_core.training.run_folder import PROMPTS

CELL, SMALLEST = 256, 32
_EMPTY = (24, 26, 31)


def main(out: str) -> None:
    told = json.load(sys.stdin)
    rows = [(title, [part for path in paths for part in _apart(path)]) for title, paths in told]
    wide = max(1, *(len(pictures) for _, pictures in rows))
    cell = CELL
    while cell > SMALLEST and len(rows) * (wide + 1) * cell**2 > MAX_PIXELS // 2:
        cell //= 2
    columns = [torch.stack([_cell(pictures[place : place + 1], cell) for _, pictures in rows]) for place in range(wide)]
    comparison_sheet(columns, [""] * wide, [title for title, _ in rows], cell).save(out, "JPEG", quality=90)


def _apart(path: str) -> list[Image.Image]:
    opened = Image.open(path)
    parts = len(json.loads(opened.info.get(PROMPTS, "[0]")))
    picture, (width, height) = opened.convert("RGB"), opened.size
    return [picture.crop((i * width // parts, 0, (i + 1) * width // parts, height)) for i in range(parts)]


def _cell(pictures: Sequence[Image.Image], side: int) -> torch.Tensor:
    """The picture [side, side, 3] in 0..1; an empty one where there is none."""
    picture = pictures[0] if pictures else Image.new("RGB", (side, side), _EMPTY)
    return torch.from_numpy(np.asarray(ImageOps.pad(picture, (side, side), color=_EMPTY), np.float32) / 255)


if __name__ == "__main__":
    main(sys.argv[1])
