"""Letters in sheets and plots: each language's own, no boxes, and an ellipsis where a text is cut."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tlora_core.reports import lettering
from tlora_core.reports.lettering import Lettering
from tlora_core.reports.plot import _BACKGROUND, _LINE, _step_ticks, bar_chart, loss_curve
from tlora_core.reports.sheet import comparison_sheet


@pytest.fixture
def fonts(monkeypatch):
    """Sets the files that are found."""

    def found(*files):
        monkeypatch.setattr(lettering, "font_files", lambda: files)
        forget()

    def forget():
        for cached in (lettering._fonts, lettering._placed, lettering._warn):
            cached.cache_clear()

    yield found
    monkeypatch.undo()
    forget()


@pytest.fixture
def chinese():
    """A font with Chinese letters and few others."""
    return Path(importlib.util.find_spec("pylopdf_fonts_zh_cn").origin).parent / "NotoSansSC-Regular.otf"


def picture(text, size=20) -> bytes:
    image = Image.new("L", (400, 40))
    Lettering(size).write(ImageDraw.Draw(image), (4, 4), text, 255)
    return image.tobytes()


def differ(letters: str) -> bool:
    """Whether all look unlike one another, unlike nothing and unlike the box and the mark of a letter that is not
    there."""
    return (
        len({picture(letter) for letter in [*letters, "", lettering.NO_FONT, "\U0010fffe"]} | {box()})
        == len(letters) + 3
    )


def box() -> bytes:
    image = Image.new("L", (400, 40))
    ImageDraw.Draw(image).text((4, 4), "\U0010fffe", 255, font=lettering._fonts(20)[0])
    return image.tobytes()


def test_letters_beyond_ascii_have_shapes_of_their_own():
    assert differ("éöñßœ×–…“ЖяЩΩøŁ")
    assert picture("é") == picture("e\u0301")  # an accent of its own is put on its letter


def test_chinese_is_written_where_a_font_has_it_and_stands_on_the_line_of_the_rest(fonts, chinese):
    fonts(lettering.font_files()[0], chinese)
    assert differ("狗海滩雪，")
    rows = [np.nonzero(np.frombuffer(picture(text), np.uint8).reshape(40, 400).any(1))[0] for text in ("H", "狗")]
    assert abs(int(rows[0].max()) - int(rows[1].max())) <= 3
    both, apart = Lettering(20).length("a 狗 b"), [Lettering(20).length(part) for part in ("a ", "狗", " b")]
    assert both == pytest.approx(sum(apart))


def test_letters_without_a_font_are_reported_once_and_marked(fonts, caplog):
    fonts()  # Pillow's own font alone
    assert picture("狗海") == picture("??") and picture("é") == picture("e")
    assert len([line for line in caplog.messages if "CJK" in line and "Install" in line]) == 1


def test_prompts_titles_and_names_that_are_cut_end_in_an_ellipsis(monkeypatch):
    written = []
    write = Lettering.write
    monkeypatch.setattr(
        Lettering,
        "write",
        lambda self, draw, xy, text, *rest: written.append(text) or write(self, draw, xy, text, *rest),
    )
    comparison_sheet([torch.full((1, 16, 16, 3), 0.5)], ["a"], ["many words " * 40], 100, "long title " * 40)
    bar_chart(["0"], [1.0], "long title " * 40, "t")
    cut = [text for text in written if text.endswith("…")]
    assert len(cut) == 3
    letters = Lettering(14)
    assert letters.cut("short", 100) == "short" and letters.length(letters.cut("long " * 40, 100)) <= 100
    assert letters.wrapped("狗" * 40, 100, most=2)[1].endswith("…")


def test_lines_have_smooth_edges():
    image = np.asarray(loss_curve([1 / (i + 1) for i in range(100)])).astype(int)
    inside = image[40:300, 70:600].reshape(-1, 3)
    strong, ground = np.array(_LINE), np.array(_BACKGROUND)
    share = ((inside - ground) @ (strong - ground)) / ((strong - ground) @ (strong - ground))
    assert ((share > 0.5) & (share < 0.9)).sum() > 100  # neither line nor ground
    assert [_step_ticks(count) for count in (0, 1, 4, 350, 800, 1010)] == [
        [1],
        [1],
        [1, 2, 3, 4],
        [1, 100, 200, 300, 350],
        [1, 200, 400, 600, 800],
        [1, 200, 400, 600, 800, 1010],
    ]
