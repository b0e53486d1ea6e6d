"""The folder of a batch's results: one folder for each row, a report and contact sheets.

<row>/row.json       what the row said and how it ended; it makes a done row known when the batch is started again
      state.zip      the state of a training that has not ended, from which it goes on
      ...            the row's T-LoRA, pictures and other files
report.csv           a line for each row, in the table's order
sheet.jpg            the rows' pictures
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hostlib.cache import try_lock
from hostlib.errors import HostError, WrongArguments

from .jobs import KEY_SHOWN, Job

RECORD, STATE = "row.json", "state.zip"
_LOCK = ".lock"
SCORES = ("likeness", "obedience", "copying")
PEAKS = ("peak_ram_gib", "peak_vram_gib")
COLUMNS = ("number", "row", "state", "seconds", *PEAKS, *SCORES, "file", "error")
_TOLD = ("state", "seconds", "first_step", "error", "message", "loss", "scores", "kept_step", *PEAKS)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_FIRST = (".safetensors", *PICTURES)  # of a row's files, the one for the report
_ON_A_SHEET, _WIDEST = 100, 8  # rows, and pictures of a row


class Results:
    """part: of the reports' names, for a shard. Raises HostError where a file cannot be written."""

    def __init__(self, folder: Path, part: str = ""):
        self.folder, self.part = folder, part
        self._sums: dict[str, dict[str, str]] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block, no other batch that may have the same rows writes here: none but the other parts of the
        same division. Raises WrongArguments where one does."""
        own, of = self.folder / f"{_LOCK}{self.part}", self.part.rpartition("-of-")[2]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = open(own, "a+b")
        except OSError as error:
            raise _unwritten(own, error) from error
        with handle:
            # Its own first: of two batches that begin at once, at least one sees the other.
            others = [path for path in self.folder.glob(f"{_LOCK}*") if path != own]
            overlapping = [path for path in others if not (of and path.name.endswith(f"-of-{of}"))]
            if not _take(handle) or not all(map(_is_free, overlapping)):
                raise WrongArguments(f"Another batch writes to {self.folder}; wait for it, or give another --out.")
            yield

    def of(self, job: Job) -> Path:
        """The row's folder: one with the row's key, whatever the row was called, if there is one."""
        return next(self.folder.glob(f"*-{job.key[:KEY_SHOWN]}"), self.folder / job.name)

    def record(self, job: Job) -> dict[str, Any]:
        """How the row ended, or that it waits."""
        try:
            found = json.loads((self.of(job) / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"state": "waiting"}
        return found if found.get("key") == job.key else {"state": "waiting"}

    def is_done(self, job: Job) -> bool:
        """Whether the row was done before and its files are there."""
        found = self.record(job)
        return found["state"] == "done" and all((self.of(job) / name).is_file() for name in found["files"])

    def begin(self, job: Job) -> bytes | None:
        """Forgets what an earlier try has made, but for the state, which is given."""
        self._sums[job.name] = {}
        folder = self.of(job)
        for path in folder.iterdir() if folder.is_dir() else []:
            if path.is_file() and path.name != STATE:
                path.unlink()
        return (folder / STATE).read_bytes() if (folder / STATE).is_file() else None

    def keep(self, job: Job, name: str, data: bytes, sha256: str) -> None:
        """Writes one of the row's results."""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HostError(f"{name} of {job.name} did not arrive as it was sent; start the batch again.")
        self._write(self.of(job) / name, data)
        self._sums[job.name][name] = sha256

    def keep_state(self, job: Job, data: bytes) -> None:
        self._write(self.of(job) / STATE, data)

    def end(self, job: Job, how: Mapping[str, Any]) -> None:
        """Writes how the row ended; if it is done, its state goes."""
        told = {name: how.get(name) for name in _TOLD}
        said = {"key": job.key, "table": job.row.table, "number": job.row.number, "cells": dict(job.row.cells)}
        record = {**said, **told, "files": self._sums.get(job.name, {})}
        self._write(self.of(job) / RECORD, json.dumps(record, indent=2, ensure_ascii=False).encode())
        if how["state"] == "done":
            (self.of(job) / STATE).unlink(missing_ok=True)

    def report(self, jobs: Sequence[Job]) -> Path:
        """Writes the report of these rows."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self._line(job) for job in jobs)
        path = self.folder / f"report{self.part}.csv"
        self._write(path, text.getvalue().encode())
        return path

    def _line(self, job: Job) -> dict[str, Any]:
        found = self.record(job)
        files = sorted(found.get("files") or {}, key=lambda name: Path(name).suffix.lower() not in _FIRST[:1])
        shown = next((name for name in files if name.lower().endswith(_FIRST)), next(iter(files), None))
        name = self.of(job).name
        file = "" if shown is None else f"{name}/{shown}"
        line = {name: found.get(name) for name in ("state", "seconds", "error", *PEAKS)}
        scores = _scores(found.get("scores"), found.get("kept_step"))
        return {"number": job.row.number, "row": name, **line, **scores, "file": file}

    def sheets(self, jobs: Sequence[Job]) -> list[tuple[Path, list[Job]]]:
        """Each contact sheet's path, and the rows on it: those that have pictures, or have failed."""
        shown = [job for job in jobs if self.pictures(job) or self.record(job)["state"] == "failed"]
        parts = [shown[start : start + _ON_A_SHEET] for start in range(0, len(shown), _ON_A_SHEET)]
        names = [f"sheet{self.part}{'' if number == 1 else f'_{number}'}.jpg" for number in range(1, len(parts) + 1)]
        return [(self.folder / name, part) for name, part in zip(names, parts)]

    def pictures(self, job: Job) -> list[Path]:
        """The row's pictures; of a training's validations the last."""
        named = [name for name in self.record(job).get("files") or {} if name.lower().endswith(PICTURES)]
        validations = sorted(name for name in named if name.startswith("step_"))
        others = sorted(name for name in named if name not in validations and name != "loss.png")
        return [self.of(job) / name for name in (validations[-1:] or others)[:_WIDEST]]

    def write_sheet(self, path: Path, data: bytes) -> None:
        self._write(path, data)

    def _write(self, path: Path, data: bytes) -> None:
        """Writes the file whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _unwritten(path, error) from error


def _take(handle: BinaryIO) -> bool:
    """Takes a lock; a look of another batch's may hold it for a moment."""
    for _ in range(20):
        if try_lock(handle):
            return True
        time.sleep(0.05)
    return False


def _is_free(path: Path) -> bool:
    with open(path, "a+b") as handle:
        return _take(handle)


def _unwritten(path: Path, error: OSError) -> HostError:
    return HostError(f"{path} cannot be written ({error.strerror or error}); the same command goes on.")


def _scores(scores: Sequence[Mapping[str, Any]] | None, kept_step: int | None) -> dict[str, Any]:
    """Those of the step that the file holds, in a scored training, or else the last."""
    steps = scores or []
    told = next((step for step in steps if step["step"] == kept_step), steps[-1] if steps else {})
    return {name: told.get(name) for name in SCORES}
