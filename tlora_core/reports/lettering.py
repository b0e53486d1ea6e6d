"""Text in pictures. Each letter uses the first font that has it: Noto Sans from the pack's requirements, then the
system's fonts."""

import functools
import importlib.util
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

# Fallbacks for Noto Sans, by file name: fonts of many scripts, then of Chinese, Japanese and Korean.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "segoeui.ttf",
    "Arial.ttf",
    "NotoSansSymbols-Regular.ttf",
    "NotoSansSymbols2-Regular.ttf",
    "seguisym.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "NotoSansSC-Regular.ttf",
    "NotoSansSC-VF.ttf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "simsun.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "AppleSDGothicNeo.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "Nirmala.ttf",
    "LeelawUI.ttf",
    "Arial Unicode.ttf",
    "arialuni.ttf",
)
NO_FONT = "?"


class Lettering:
    """Text of one size in pixels. `line` is the distance between baselines."""

    def __init__(self, size: int):
        self.size = size
        self._fonts = _fonts(size)
        self.line = round(size * 1.3)
        self._ascent, self._descent = self._fonts[0].getmetrics()

    def length(self, text: str) -> float:
        """The width of the text in pixels."""
        return sum(font.getlength(part) for font, part in self._parts(text))

    def write(self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, colour, anchor: str = "la") -> None:
        """Draws one line of text. `anchor` is the position of `xy` in it: l, m or r from left to right, then a (top), m
        or s (baseline)."""
        x = xy[0] - self.length(text) * {"l": 0, "m": 0.5, "r": 1}[anchor[0]]
        # All fonts share one baseline, since their heights differ.
        baseline = xy[1] + {"a": self._ascent, "m": (self._ascent - self._descent) / 2, "s": 0}[anchor[1]]
        for font, part in self._parts(text):
            draw.text((x, baseline), part, colour, font=font, anchor="ls")
            x += font.getlength(part)

    def cut(self, text: str, width: float) -> str:
        """The text, truncated with an ellipsis to fit `width` pixels."""
        if self.length(text) <= width:
            return text
        fits = next((n for n in range(len(text) - 1, 0, -1) if self.length(text[:n].rstrip() + "…") <= width), 0)
        return text[:fits].rstrip() + "…"

    def wrapped(self, text: str, width: float, most: int | None = None) -> list[str]:
        """The text in lines of at most `width` pixels; longer words are broken. If there are more than `most` lines,
        the last one ends in an ellipsis."""
        lines = [""]
        for word in text.split():
            if lines[-1] and self.length(f"{lines[-1]} {word}") > width:
                lines.append("")
            joined = f"{lines[-1]} {word}".strip()
            while self.length(joined) > width and len(joined) > 1:
                fits = next((n for n in range(len(joined) - 1, 1, -1) if self.length(joined[:n]) <= width), 1)
                lines[-1:] = [joined[:fits], ""]
                joined = joined[fits:]
            lines[-1] = joined
        if most is None or len(lines) <= most:
            return lines
        return [*lines[: most - 1], self.cut(f"{lines[most - 1]} {lines[most]}", width)]

    def _parts(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """Runs of letters, each with its font; letters that no font has are replaced by a fallback."""
        placed = [_placed(letter, self.size) for letter in unicodedata.normalize("NFC", text)]
        for number, run in groupby(placed, key=lambda place: place[0]):
            yield self._fonts[number], "".join(letters for _, letters in run)


@functools.lru_cache(maxsize=4096)
def _placed(letter: str, size: int) -> tuple[int, str]:
    """(index of the font for a letter, the text to write)."""
    fonts = _fonts(size)
    if letter.isspace() or unicodedata.category(letter).startswith("C"):
        return 0, " "
    for written in (letter, _plain(letter)):
        for number, font in enumerate(fonts):
            if written and all(_has(font, part) for part in written):
                return number, written
    _warn(unicodedata.name(letter, "unnamed").split()[0])
    return 0, NO_FONT


@functools.cache
def _warn(script: str) -> None:
    """Warns once for each script, the first word of a letter's Unicode name."""
    logging.warning(
        "T-LoRA: no font on this computer has %s letters, so they are %s in pictures. Install one that has them, for "
        "example Noto Sans CJK for Chinese, Japanese and Korean, and start ComfyUI again.",
        script,
        NO_FONT,
    )


def _plain(letter: str) -> str:
    """The letter without its accents."""
    return "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether the font has a glyph for the letter, different from its glyph for an unassigned code."""
    drawn, absent = (font.getmask(one) for one in (letter, "\U0010fffe"))
    return (drawn.size, bytes(drawn)) != (absent.size, bytes(absent))


@functools.lru_cache(maxsize=32)
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """The available fonts in order, with Pillow's own last."""
    found = []
    for path in font_files():
        try:
            found.append(ImageFont.truetype(str(path), size))
        except OSError:  # not a font, or one that FreeType cannot read
            continue
    return (*found, ImageFont.load_default(size))


@functools.lru_cache(maxsize=1)
def font_files() -> tuple[Path, ...]:
    """Noto Sans, and the installed fonts of SYSTEM_FONTS."""
    noto = importlib.util.find_spec("fontpkg_noto_sans")
    first = sorted(Path(noto.origin).parent.glob("files/NotoSans[[]*.ttf")) if noto and noto.origin else []
    wanted = {name.lower() for name in SYSTEM_FONTS}
    found: dict[str, Path] = {}
    for folder in _font_folders():
        for parent, _, names in os.walk(folder):
            for name in names:
                if name.lower() in wanted:
                    found.setdefault(name.lower(), Path(parent, name))
    return (*first, *(found[name.lower()] for name in SYSTEM_FONTS if name.lower() in found))


def _font_folders() -> list[Path]:
    """The font folders of the operating system."""
    home = Path.home()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        folders = [
            Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts",
            *([Path(local) / "Microsoft/Windows/Fonts"] if local else []),
        ]
    elif sys.platform == "darwin":
        folders = [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    else:
        shared = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
        folders = [home / ".fonts", Path(shared) / "fonts", Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]
    return [folder for folder in folders if folder.is_dir()]
