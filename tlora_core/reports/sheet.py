"""Pictures side by side, to compare settings: a column for each setting, a row for each prompt."""

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import TLoRAError
from ..training.images import check_images, to_picture
from .lettering import Lettering

MAX_PIXELS = 2**27  # 400 MB as the host's IMAGE would be more than most can use
_BACKGROUND, _TEXT, _FAINT = (24, 26, 31), (235, 237, 240), (165, 170, 180)
_GAP, _MARGIN = 6, 16


def comparison_sheet(
    columns: Sequence[Tensor], labels: Sequence[str], prompts: Sequence[str] = (), cell: int = 256, title: str = ""
) -> Image.Image:
    """One picture of all `columns` [N, H, W, 3] in 0..1, with `labels` above them and N optional `prompts` on the left.

    Each picture is scaled to fit a square of `cell` pixels. A prompt too long for its row, and a title of more than two
    lines, end in an ellipsis. Raises TLoRAError when the numbers of pictures, labels or prompts do not match, or the
    sheet would be too large.
    """
    _check(columns, labels, prompts)
    rows = len(columns[0])
    letters = Lettering(max(13, cell // 14))
    line = letters.line
    side = round(cell * 0.9) if prompts else 0
    left = _MARGIN + side
    width = left + len(columns) * (cell + _GAP) - _GAP + _MARGIN
    heads = [letters.wrapped(label, cell - 8) for label in labels]
    titles = letters.wrapped(title, width - 2 * _MARGIN, most=2) if title else []
    top = _MARGIN + line * (len(titles) + bool(titles))
    below = top + line * max(map(len, heads)) + 8
    height = below + rows * (cell + _GAP) - _GAP + _MARGIN
    if width * height > MAX_PIXELS:
        raise TLoRAError(
            f"The sheet would have {width}x{height} pixels; set a smaller cell, or compare fewer pictures."
        )
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(titles):
        letters.write(draw, (_MARGIN, _MARGIN + i * line), text, _TEXT)
    for x, (column, head) in enumerate(zip(columns, heads)):
        at = left + x * (cell + _GAP)
        for i, text in enumerate(head):
            # Labels are aligned at their last lines, just above the pictures.
            letters.write(draw, (at + cell / 2, below - 8 - line * (len(head) - i)), text, _TEXT, "ma")
        for y, picture in enumerate(column):
            sheet.paste(*_fitted(picture, at, below + y * (cell + _GAP), cell))
    for y, prompt in enumerate(prompts):
        lines = letters.wrapped(prompt, side - 12, most=max(cell // line, 1))
        middle = below + y * (cell + _GAP) + cell / 2
        for i, text in enumerate(lines):
            letters.write(draw, (_MARGIN, middle + (i - len(lines) / 2) * line), text, _FAINT)
    return sheet


def _check(columns, labels, prompts) -> None:
    for number, column in enumerate(columns, 1):
        check_images(column, f"images_{number}")
    if len(labels) != len(columns):
        raise TLoRAError(
            f"There are {len(labels)} labels for {len(columns)} inputs of pictures; write one label a line."
        )
    counts = [len(column) for column in columns]
    if len(set(counts)) > 1:
        raise TLoRAError(
            f"The inputs have {', '.join(map(str, counts))} pictures; give each the same number, one for each prompt."
        )
    if prompts and len(prompts) != counts[0]:
        raise TLoRAError(
            f"There are {len(prompts)} prompts for {counts[0]} pictures in each input; give one for each, or none."
        )


def _fitted(picture: Tensor, x: int, y: int, cell: int) -> tuple[Image.Image, tuple[int, int]]:
    """The picture scaled to its cell, and the position of its left top corner."""
    whole = to_picture(picture)
    scale = cell / max(whole.size)
    size = tuple(max(round(side * scale), 1) for side in whole.size)
    fitted = whole if size == whole.size else whole.resize(size, Image.Resampling.LANCZOS)
    return fitted, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2)
