"""A worker: owns a child process with ComfyUI, which stays warm between rows, and turns what it makes into bytes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from hostlib import commands
from hostlib.build import Host, ensure_host, has_accelerator, user_host
from hostlib.cache import try_lock
from hostlib.errors import HostError
from hostlib.process import GRACE_SECONDS, start_group, stop_group
from hostlib.server import make_workspace

HERE = Path(__file__).resolve().parent
RUNS, STATE = Path("output", "tlora_runs"), "checkpoint.pt"  # where a training keeps its runs, and its state in one
LOG_TAIL_LINES = 12
_PREFIX, _LOCK = "tlora-batch-", "lock"
_SURELY_HELD_SECONDS = 60  # a younger folder may be about to be locked
_NOT_CARRIED = "events.out"  # TensorBoard's, which begin anew
Event = dict[str, Any]
OnSheet = tuple[str, Sequence[bytes]]  # a row's title and its pictures


class Lost(HostError):
    """The child has ended by itself."""


class Worker:
    """settings: `comfyui`, `python` and `host_version` as on the command line, `workflow` (a dict, or None for
    trainings) and `verbose`. Nothing is started before it is needed."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self._process: subprocess.Popen | None = None
        self._private, self._held = Path(), None
        self._host: Host | None = None

    @property
    def host(self) -> Host:
        """ComfyUI on this machine; set up where there is none."""
        if self._host is None:
            given = self.settings
            self._host = (
                user_host(given["comfyui"], given["python"]) if given["comfyui"] else ensure_host(given["host_version"])
            )
        return self._host

    # --- the child ---

    def _child(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._private, self._held = _private_folder()
            self._process = self._started()
        return self._process

    def _started(self) -> subprocess.Popen:
        kind = "train" if self.settings["workflow"] is None else "workflow"
        log = None if self.settings["verbose"] else open(self._private / "log", "wb")
        try:
            process = start_group(
                [str(self.host.python), str(HERE / f"{kind}_child.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=commands.script_environment(self.host) if kind == "train" else None,
            )
        finally:
            if log is not None:
                log.close()
        self._send(process, self._child_settings())
        return process

    def _child_settings(self) -> dict[str, Any]:
        host = self.host
        workspace = commands.workspace_of(host)
        options = [] if has_accelerator(host.python) else ["--cpu"]
        if workspace is not None:
            make_workspace(workspace)
            options += ["--base-directory", str(workspace)]
        return {
            "comfyui": str(host.comfyui),
            "python": str(host.python),
            "ours": host.ours,
            "workspace": str(workspace or ""),
            "host_arguments": options,
            "private": str(self._private),
            "workflow": self.settings["workflow"],
            "verbose": self.settings["verbose"],
        }

    @staticmethod
    def _send(process: subprocess.Popen, command: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # its end is seen where its events are read
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()

    def _events(self, process: subprocess.Popen) -> Iterator[Event]:
        """The child's events. Raises Lost when it ends."""
        for line in process.stdout:
            yield json.loads(line)
        process.wait()
        log = self._private / "log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        tail = "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
        raise Lost(f"ComfyUI ended with status {process.returncode}; the end of its log:\n{tail}")

    # --- what it can do ---

    def check(self, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Looks at all jobs before any is run: `error`, `row` and `column` of the first that cannot be, or `uploads`,
        the columns whose files a workflow is to be given."""
        process = self._child()
        self._send(process, {"do": "check", "jobs": list(jobs)})
        return next(event for event in self._events(process) if event["event"] == "checked")

    def run(self, job: dict[str, Any], state: bytes | None = None) -> Iterator[Event]:
        """Runs a job: "progress" events, "state" with a training's state as `data` whenever there is a newer one,
        "file" with `name`, `data` and `sha256` for each result, and "end". state: where to go on from."""
        process = self._child()
        self._forget_runs()
        if state is not None:
            _unpack(state, self._private / RUNS)
        files = {column: [self._laid(*file) for file in files] for column, files in job["files"].items()}
        self._send(process, {"do": "run", "job": {**job, "files": files}})
        seen: dict[Path, int] = {path: _stamp(path) for path in self._states()}
        for event in self._events(process):
            yield from self._new_states(seen)
            if event["event"] == "end":
                yield from self._results()
                yield {**event, "error": self._in_the_users_words(event.get("error") or "")}
                return
            yield event

    def _laid(self, name: str, data: bytes) -> str:
        folder = self._private / "given" / hashlib.sha256(data).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        return str(folder / name)

    def _in_the_users_words(self, text: str) -> str:
        """Files go by the names that they came with."""
        return re.sub(re.escape(str(self._private / "given")) + r"[/\\]\w+[/\\]", "", text)

    def _forget_runs(self) -> None:
        for kind in (RUNS, Path("results"), Path("given")):
            shutil.rmtree(self._private / kind, ignore_errors=True)

    def _states(self) -> list[Path]:
        return sorted((self._private / RUNS).glob(f"*/{STATE}"))

    def _new_states(self, seen: dict[Path, int]) -> Iterator[Event]:
        for path in self._states():
            with contextlib.suppress(FileNotFoundError):  # a run that ends removes its state
                if (stamp := _stamp(path)) != seen.get(path):
                    data = _packed(path.parent)
                    seen[path] = stamp
                    yield {"event": "state", "data": data}

    def _results(self) -> Iterator[Event]:
        folder = self._private / "results"
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            data = path.read_bytes()
            yield {"event": "file", "name": path.name, "data": data, "sha256": hashlib.sha256(data).hexdigest()}

    def cancel(self) -> None:
        """Ends the job that runs, which then tells its end; may be called from another thread."""
        if self._process is not None:
            self._send(self._process, {"do": "cancel"})

    def sheet(self, rows: Sequence[OnSheet]) -> bytes:
        """A contact sheet, as a JPEG."""
        with tempfile.TemporaryDirectory() as folder:
            told = []
            for number, (title, pictures) in enumerate(rows):
                paths = [Path(folder, f"{number}_{place}") for place in range(len(pictures))]
                for path, data in zip(paths, pictures):
                    path.write_bytes(data)
                told.append([title, [str(path) for path in paths]])
            out = Path(folder, "sheet.jpg")
            made = subprocess.run(
                [str(self.host.python), str(HERE / "sheet.py"), str(out)],
                input=json.dumps(told),
                capture_output=True,
                text=True,
                env=commands.script_environment(self.host),
            )
            if made.returncode:
                raise HostError(f"The contact sheet could not be made: {made.stderr.strip().splitlines()[-1]}")
            return out.read_bytes()

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # upon which it stops what it has started, and ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
            stop_group(self._process)
            self._process = None
            self._held.close()
            shutil.rmtree(self._private, ignore_errors=True)


def _private_folder() -> tuple[Path, BinaryIO]:
    """A new folder for a child, and the handle that shows, while it is open, that it is in use. Folders of workers that
    were killed, and so could not remove theirs, are removed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), open(lock, "a+b") as handle:
            if time.time() - lock.stat().st_mtime > _SURELY_HELD_SECONDS and try_lock(handle):
                shutil.rmtree(lock.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    held = open(folder / _LOCK, "a+b")
    try_lock(held)
    return folder, held


def _stamp(path: Path) -> int:
    return os.stat(path).st_mtime_ns


def _packed(run: Path) -> bytes:
    """A run's folder as a zip."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(run.rglob("*")):
            if path.is_file() and not path.name.startswith((_NOT_CARRIED, ".")):
                archive.write(path, PurePosixPath(run.name, *path.relative_to(run).parts))
    return content.getvalue()


def _unpack(state: bytes, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(state)) as archive:
        archive.extractall(folder)
