"""What the rows of a table ask for, and what identifies each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hostlib.errors import WrongArguments
from trainlib import reference
from trainlib.arguments import FILES, PARTS

from .table import NAME, Row

_UNSAFE = re.compile(r"[^\w.-]+")
_NAME_SHOWN, KEY_SHOWN = 40, 8
PROMPTS = {"validation_prompt": "validation_prompts"}  # the option's name, and the input's


@dataclass
class Job:
    """One row's work. asked: JSON for the worker: `parts` and `inputs` of a training, or `sets` of a workflow. files:
    on this machine, by column."""

    row: Row
    asked: dict[str, Any]
    files: dict[str, list[Path]] = field(default_factory=dict)
    workflow: Mapping[str, Any] | None = None

    @cached_property
    def key(self) -> str:
        """A hash of what the row says: its values, the content of its files, and the workflow; not of its place, its
        name or its files' names."""
        digests = {column: [digest(path.read_bytes()) for path in paths] for column, paths in self.files.items()}
        told = {name: value for name, value in self.asked.items() if name != "sets"}
        sets = {name: value for name, value in self.asked.get("sets", {}).items() if name not in digests}
        text = json.dumps([told, sets, digests, self.workflow], sort_keys=True)
        return digest(text.encode())

    @property
    def title(self) -> str:
        """What the row calls itself, or else its first file's name; two rows may have one."""
        first = next(iter(self.files.values()), [Path("row")])
        return str(self.row.cells.get(NAME) or first[0].stem)

    @cached_property
    def name(self) -> str:
        """The name of its folder: a readable part and the beginning of the key."""
        return f"{_UNSAFE.sub('_', self.title)[:_NAME_SHOWN].strip('._') or 'row'}-{self.key[:KEY_SHOWN]}"

    def checked(self) -> dict[str, Any]:
        """For Worker.check: what is asked, without the files themselves."""
        return {**self.asked, "row": self.row.number, "files": {name: len(paths) for name, paths in self.files.items()}}

    def payload(self) -> dict[str, Any]:
        """For Worker.run: what is asked, with the files as bytes, so that a worker may be on another machine."""
        files = {name: [(path.name, path.read_bytes()) for path in paths] for name, paths in self.files.items()}
        return {**self.asked, "name": self.name, "files": files}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def jobs_of(rows: Sequence[Row], folder: Path, workflow: Mapping[str, Any] | None) -> list[Job]:
    """The jobs of all rows. folder: where the rows' relative paths start. Raises WrongArguments."""
    if workflow is None:
        return [_training(row, folder) for row in rows]
    return [_workflow(row, folder, workflow) for row in rows]


def _training(row: Row, folder: Path) -> Job:
    asked: dict[str, Any] = {"parts": {}, "inputs": {}}
    files: dict[str, list[Path]] = {}
    cells = dict(row.cells)
    cells.pop(NAME, None)
    if line := cells.pop("from_reference", None):
        found = _of_reference(row, str(line), bool({"model", "unet"} & cells.keys()))
        asked = {"parts": found["parts"], "inputs": found["inputs"]}
        files = {name: [Path(path) for path in paths] for name, paths in found["files"].items()}
    for column, value in cells.items():
        if column in FILES:
            files[column] = [_existing(row, column, text, folder) for text in _several(value)]
        elif column in PARTS:
            asked["parts"][column] = _several(value) if column == "clip" else str(value)
        else:
            asked["inputs"][PROMPTS.get(column, column)] = "\n".join(value) if isinstance(value, list) else value
    if "unet" in cells:
        asked["parts"].pop("model" if "model" not in cells else "", None)
    _check_training(row, asked, files)
    return Job(row, asked, files)


def _of_reference(row: Row, line: str, has_model: bool) -> dict[str, Any]:
    try:
        found = reference.job_of(line, has_model)
    except WrongArguments as error:
        raise row.wrong(str(error), "from_reference") from error
    if found["environment"]:
        named = ", ".join(found["environment"])
        raise row.wrong(f"it sets {named}, which all rows share; set it before you start the batch.", "from_reference")
    return found


def _check_training(row: Row, asked: Mapping[str, Any], files: Mapping[str, list[Path]]) -> None:
    if "class_word" not in asked["inputs"]:
        raise row.wrong("it is empty; say what the picture shows, such as dog.", "class_word")
    if not files.get("image"):
        raise row.wrong("it is empty; name a picture of the subject.", "image")
    if ("model" in asked["parts"]) == ("unet" in asked["parts"]):
        raise row.wrong("name either a model, or unet with clip, clip_type and vae.", "model")


def _workflow(row: Row, folder: Path, workflow: Mapping[str, Any]) -> Job:
    sets = {column: value for column, value in row.cells.items() if column != NAME}
    for column in sets:
        if "." not in column:
            raise row.wrong("with --workflow a column is NODE.INPUT, NODE an id, title or class.", column)
    # Whether a text that names a file here is meant as one, only the workflow's node can tell.
    texts = {column: value for column, value in sets.items() if isinstance(value, str) and "\n" not in value}
    files = {column: [folder / Path(value).expanduser()] for column, value in texts.items()}
    return Job(row, {"sets": sets}, {column: paths for column, paths in files.items() if _is_file(paths[0])}, workflow)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a long prompt is no path
        return False


def _several(value: Any) -> list[str]:
    """The texts of a cell: a list's, or one a line."""
    return (
        list(value) if isinstance(value, list) else [each.strip() for each in str(value).splitlines() if each.strip()]
    )


def _existing(row: Row, column: str, text: str, folder: Path) -> Path:
    path = folder / Path(text).expanduser()
    if not _is_file(path):
        raise row.wrong(f'there is no file "{text}" in {folder}; check the path.', column)
    return path
