"""Lays out the quickstart's results as one picture: the training picture, then the pictures with the T-LoRA above those
without it.

    python3 tools/host.py run "workflows/01 Quickstart.json" --out FOLDER
    python3 tools/host.py python tools/readme_picture.py FOLDER/quickstart_00001_.png docs/quickstart.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tlora_core.tiny import world

SIDE, GAP, LABEL = 160, 8, 26
SCENES = ("in a meadow", "in the snow", "yellow background", "under the sea")
CONCEPT = "lime circle"
SHEET_GAP, SHEET_MARGIN = 6, 16  # of the quickstart's sheet, with one column with the T-LoRA and one without


def training_picture() -> Image.Image:
    """The output of Sample Concept with the quickstart's values."""
    scenes = world.concept_scenes(
        next(c for c in world.CONCEPTS if c.name == CONCEPT), 1, np.random.default_rng(0), "beach", "centre"
    )
    return Image.fromarray(np.round(world.render(scenes, 128)[0] * 255).astype(np.uint8))


def drawn(whole: Image.Image, column: int, row: int) -> Image.Image:
    """One picture of the quickstart's sheet."""
    left, top = (
        edge - SHEET_MARGIN - number * (SIDE + SHEET_GAP) + SHEET_GAP
        for edge, number in ((whole.width, 2 - column), (whole.height, len(SCENES) - row))
    )
    return whole.crop((left, top, left + SIDE, top + SIDE))


def main(made: Path, target: Path) -> None:
    whole = Image.open(made).convert("RGB")
    sheet = Image.new("RGB", (GAP + 5 * (SIDE + GAP) + GAP, 2 * (SIDE + GAP) + LABEL), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)

    def place(picture, column, row, text=None):
        x, y = GAP + column * (SIDE + GAP) + (GAP if column else 0), LABEL + row * (SIDE + GAP)
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        if text:
            draw.text((x + SIDE / 2, y - 6), text, "black", font=font, anchor="ms")

    place(training_picture(), 0, 0, "the one picture")
    for column, scene in enumerate(SCENES):
        for row in range(2):
            place(drawn(whole, row, column), column + 1, row, None if row else scene)
    draw.text(
        (GAP + SIDE, LABEL + 1.5 * SIDE),
        "above: with the T-LoRA\nright: without it",
        "black",
        font=font,
        anchor="rm",
        align="right",
    )
    sheet.save(target)
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
