"""Reads a table of jobs, CSV or JSON Lines: one job a row, one input a column."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostlib.errors import WrongArguments

DELIMITERS = ",;\t"  # spreadsheets write one or another, as the system's language has it
JSON_LINES = (".jsonl", ".ndjson")
NAME = "row"  # the column with a row's name


@dataclass(frozen=True)
class Row:
    """One job as the table says it. number: from 1. cells: by column, texts, numbers, booleans or lists of texts; empty
    ones are left out."""

    table: str
    number: int
    cells: Mapping[str, Any]

    def wrong(self, text: str, column: str = "") -> WrongArguments:
        """The error that refuses the table because of this row."""
        return WrongArguments(f"{self.table}, row {self.number}{', column ' + column if column else ''}: {text}")


def read_table(path: Path) -> list[Row]:
    """All rows of a table, which has one at least. Raises WrongArguments, naming row and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise WrongArguments(f"The table {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise WrongArguments(f"The table {path} is not UTF-8 text ({error}); save it as CSV UTF-8.") from error
    read = _json_lines if path.suffix.lower() in JSON_LINES else _csv
    rows = list(read(path.name, text))
    if not rows:
        raise WrongArguments(f"The table {path} holds no rows; write one job a row.")
    return rows


def _csv(table: str, text: str) -> Iterator[Row]:
    header = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [_column(name) for name in next(records, [])]
        _check_header(table, columns)
        filled = (record for record in records if any(cell.strip() for cell in record))
        for number, record in enumerate(filled, 1):
            if len(record) != len(columns):
                raise WrongArguments(
                    f"{table}, row {number}: it has {len(record)} cells, and the header {len(columns)}; put cells that "
                    f'hold a "{delimiter}" or several lines in quotes.'
                )
            yield Row(table, number, {name: cell for name, cell in zip(columns, record) if cell.strip()})
    except csv.Error as error:
        raise WrongArguments(f"{table}, line {records.line_num}: it is not CSV ({error}).") from error


def _check_header(table: str, columns: list[str]) -> None:
    for place, name in enumerate(columns, 1):
        if not name:
            raise WrongArguments(f"{table}, header, column {place}: it has no name; name an input.")
        if columns.index(name) + 1 != place:
            raise WrongArguments(f"{table}, header, column {place}: {name} is there twice; remove one.")


def _json_lines(table: str, text: str) -> Iterator[Row]:
    lines = (line for line in text.splitlines() if line.strip())
    for number, line in enumerate(lines, 1):
        try:
            given = json.loads(line)
        except ValueError as error:
            raise WrongArguments(f"{table}, row {number}: it is not JSON ({error}).") from error
        if not isinstance(given, dict):
            raise WrongArguments(f"{table}, row {number}: it is no JSON object; write {{...}} with an input a name.")
        row = Row(table, number, {_column(name): value for name, value in given.items() if value not in (None, "", [])})
        for name, value in row.cells.items():
            texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
            if not (texts or isinstance(value, str | int | float)):
                raise row.wrong("it is neither a text, a number, true, false nor a list of texts.", name)
        yield row


def _column(name: str) -> str:
    """An option's dashes are an input's underscores; NODE.INPUT, where a title may have dashes, stays."""
    name = name.strip()
    return name if "." in name else name.removeprefix("--").replace("-", "_")
