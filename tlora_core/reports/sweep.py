"""Sweeps: a grid of T-LoRA variants over the values of one or two settings."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from ..errors import TLoRAError
from ..files.foreign import rescheduled
from ..files.tlora_file import TLoRAFile
from ..method.adapters import METHODS

FILE, NONE = "file", "none"
MAX_CELLS = 64
MAX_STRENGTH = 10.0  # absolute value


@dataclass(frozen=True)
class Axes:
    """The labels of a sweep's columns and rows; rows is empty without a second axis."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]

    @property
    def cells(self) -> int:
        return len(self.columns) * max(len(self.rows), 1)


@dataclass(frozen=True)
class Axis:
    """One setting and its values; source: the name of their input."""

    source: str
    kind: str
    values: tuple[Any, ...]

    @classmethod
    def from_text(cls, source: str, kind: str, text: str, files: Sequence[str] = ()) -> "Axis":
        """kind: a key of KINDS. text: numbers separated by commas or line breaks; for "file", names of `files` or
        patterns like "run/*.safetensors". The order of the text is kept; the matches of a pattern are sorted by the
        numbers in their names.

        Raises TLoRAError, naming `source`, for an empty text, a value that is not a number or out of range, and a name
        without a match.
        """
        read = KINDS[kind]
        values = _found(source, text, files) if read is None else tuple(read(source, word) for word in _words(text))
        if not values:
            example = "run/heart_step*.safetensors" if kind == FILE else "1, 2, 4"
            raise TLoRAError(f"{source} is empty; give {kind} its values, for example {example}.")
        return cls(source, kind, values)

    @property
    def labels(self) -> tuple[str, ...]:
        if self.kind != FILE:
            return tuple(f"{self.kind} {value:g}" for value in self.values)
        names = [PurePosixPath(_slashed(name)) for name in self.values]
        stems = tuple(name.stem for name in names)
        return stems if len(set(stems)) == len(stems) else tuple(map(str, names))


@dataclass(frozen=True)
class Sweep:
    """x varies along the columns, an optional y along the rows. Raises TLoRAError for a grid of more than MAX_CELLS."""

    x: Axis
    y: Axis | None = None

    @classmethod
    def from_text(cls, x: str, x_values: str, y: str, y_values: str, files: Sequence[str] = ()) -> "Sweep":
        """x, y: different keys of KINDS; y may be NONE. Raises TLoRAError for equal ones; see also Axis.from_text."""
        if x == y:
            raise TLoRAError(f"x and y are both {x}; choose another y, or none.")
        return cls(
            Axis.from_text("x_values", x, x_values, files),
            None if y == NONE else Axis.from_text("y_values", y, y_values, files),
        )

    def __post_init__(self) -> None:
        if self.labels.cells > MAX_CELLS:
            columns, rows = len(self.labels.columns), len(self.labels.rows)
            size = f"x_values and y_values make {columns} x {rows}" if self.y else f"x_values makes {columns}"
            raise TLoRAError(f"{size} models; {MAX_CELLS} is the most, so give fewer values.")

    @property
    def labels(self) -> Axes:
        return Axes(self.x.labels, self.y.labels if self.y else ())

    @property
    def files(self) -> tuple[str, ...]:
        """The values of the file axis; empty without one."""
        return next((axis.values for axis in (self.x, self.y) if axis and axis.kind == FILE), ())

    def cells(self) -> list[dict[str, Any]]:
        """The settings of each cell by kind, row by row."""
        rows = [{self.y.kind: value} for value in self.y.values] if self.y else [{}]
        return [{self.x.kind: value, **row} for row in rows for value in self.x.values]

    def variant(self, tlora: TLoRAFile, cell: Mapping[str, Any]) -> TLoRAFile:
        """The T-LoRA with a cell's rank, min_rank and alpha, set in this order; it shares the memory of `tlora`.

        Raises TLoRAError, naming the input, for a value that is not valid for the T-LoRA.
        """
        for kind, change in _CHANGES.items():
            for axis in (self.x, self.y):
                if axis and axis.kind == kind:
                    try:
                        tlora = change(tlora, cell[kind])
                    except TLoRAError as error:
                        raise TLoRAError(f"{axis.source}: {error}") from error
        return tlora


def first_components(tlora: TLoRAFile, rank: int) -> TLoRAFile:
    """The T-LoRA with only the first `rank` components of each layer, and a schedule up to this rank."""
    if METHODS[tlora.method].of_weight:
        raise TLoRAError(f'the method "{tlora.method}" has no components to leave out; sweep its strength instead.')
    schedule = tlora.schedule.up_to(rank)
    layers = {name: layer.first(min(rank, layer.rank)) for name, layer in tlora.layers.items()}
    return replace(tlora, layers=layers, schedule=schedule)


def _another_schedule(tlora: TLoRAFile, **changes) -> TLoRAFile:
    if tlora.schedule.points:
        raise TLoRAError(
            f"the T-LoRA follows a free curve, which has no {' or '.join(changes)}; sweep its strength or rank instead."
        )
    return rescheduled(tlora, **changes)


# In this order, as min_rank is checked against the new rank.
_CHANGES: dict[str, Callable[[TLoRAFile, Any], TLoRAFile]] = {
    "rank": first_components,
    "min_rank": lambda tlora, value: _another_schedule(tlora, min_rank=value),
    "alpha": lambda tlora, value: _another_schedule(tlora, alpha=value),
}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.replace("\n", ",").split(",") if word.strip()]


def _whole(source: str, word: str) -> int:
    return _number(int, source, word, "whole number", "4, 8, 16")


def _real(source: str, word: str) -> float:
    return _number(float, source, word, "number", "0.5, 1, 1.5")


def _number(kind: Callable[[str], Any], source: str, word: str, called: str, examples: str) -> Any:
    try:
        return kind(word)
    except ValueError as error:
        raise TLoRAError(
            f'{source} has "{word}", which is not a {called}; write numbers with commas, such as {examples}.'
        ) from error


def _strength(source: str, word: str) -> float:
    value = _real(source, word)
    if not -MAX_STRENGTH <= value <= MAX_STRENGTH:  # NaN fails both comparisons
        raise TLoRAError(f"{source} has the strength {word}; use values from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}.")
    return value


# Setting -> the reader of one value; None for files, which are looked up.
KINDS: dict[str, Callable[[str, str], Any] | None] = {
    "strength": _strength,
    "min_rank": _whole,
    "rank": _whole,
    "alpha": _real,
    FILE: None,
}


def _found(source: str, text: str, files: Sequence[str]) -> tuple[str, ...]:
    """The files named in the lines of text, without repetition; a line holds several names, or one name with commas."""
    by_name = {_slashed(name): name for name in files}
    found = {}
    for line in map(_slashed, text.splitlines()):
        for word in [line] if line in by_name else _words(line):
            names = [word] if word in by_name else sorted((n for n in by_name if fnmatchcase(n, word)), key=_natural)
            if not names:
                raise TLoRAError(
                    f'{source}: no file in the loras folders is called "{word}"; write names as in Load T-LoRA\'s '
                    "list, or a pattern, for example run/heart_step*.safetensors."
                )
            found |= dict.fromkeys(by_name[name] for name in names)
    return tuple(found)


def _slashed(name: str) -> str:
    """The name with forward slashes."""
    return name.strip().replace("\\", "/")


def _natural(name: str) -> list[str | int]:
    """A sort key that puts step 100 after step 20."""
    parts = re.split("([0-9]+)", name)  # every second part is digits
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)]
