"""Runs the parts in processes of their own, each for no longer than its limit, all within the time there is.

A part that fails, hangs, crashes or is killed for memory ends its process; the others go on in a new one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostlib.process import start_group, stop_group

from .comfyui import CannotStart
from .plan import DYNAMIC, Part

WORKER = Path(__file__).with_name("worker.py")
NOT_RUN = "not run"
START_SECONDS = 180  # for PyTorch and ComfyUI to be imported, from a slow disk too
_GRACE = 15  # seconds beyond a part's limit, at which its process ends itself
_POLL = 0.05


@dataclass
class Result:
    """Of one part. status: "passed", "failed", "skipped" or "not run"."""

    name: str
    host: str
    status: str = NOT_RUN
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class Settings:
    """device: "cuda" or "cpu". size: a name in sizes.SIZES. comfyui: its folder, or "" where it is importable. site: a
    folder with further packages, or ""."""

    device: str
    size: str
    comfyui: str = ""
    site: str = ""
    python: str = sys.executable


def run_parts(
    parts: Sequence[Part],
    settings: Settings,
    seconds: float,
    listen: Callable[[Result], None] = lambda result: None,
    worker: Path = WORKER,
) -> list[Result]:
    """One result for each part, in order; `listen` gets each as it is there. What does not begin within `seconds` is
    not run. Raises CannotStart if ComfyUI cannot be started at all."""
    end = time.monotonic() + seconds
    results = {part.name: Result(part.name, part.host) for part in parts}
    left = list(parts)
    while left:
        if settings.device == "cpu" and left[0].host == DYNAMIC:
            _finish(results[left.pop(0).name], listen, status="skipped", message="dynamic VRAM needs a CUDA card")
            continue
        if time.monotonic() >= end:
            for part in left:
                _finish(results[part.name], listen, message="no time was left")
            break
        batch = _neighbours(left)
        done = _Process(batch, settings, results, listen, worker).run(end)
        left = left[done:]
    return [results[part.name] for part in parts]


def _neighbours(parts: Sequence[Part]) -> list[Part]:
    """The first part and those after it that can share its process."""
    count = next((i for i, part in enumerate(parts) if part.host != parts[0].host), len(parts))
    return list(parts[:count])


def _finish(result: Result, listen: Callable[[Result], None], **what: Any) -> None:
    for name, value in what.items():
        setattr(result, name, value)
    listen(result)


class _Process:
    """A worker and what it has told."""

    def __init__(self, parts, settings: Settings, results: dict[str, Result], listen, worker: Path):
        self.parts, self.settings, self.results, self.listen, self.worker = parts, settings, results, listen, worker
        self.done, self.ready, self.rest = 0, False, ""
        self.since = time.monotonic()  # when the part in progress began, or the process

    def run(self, end: float) -> int:
        """How many parts are over, one way or the other."""
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
            self.events, self.log = Path(folder) / "events", Path(folder) / "log"
            self.events.touch()
            names = [part.name for part in self.parts]
            s = self.settings
            host = self.parts[0].host
            command = [s.python, str(self.worker), str(self.events), s.device, host, s.size, s.comfyui, s.site, *names]
            with open(self.log, "wb") as log, open(self.events, encoding="utf-8") as events:
                process = start_group(command, stdout=log, stderr=subprocess.STDOUT)
                try:
                    self._watch(process, events, end)
                finally:
                    stop_group(process)
                self._read(events)
            self._judge(process.returncode, end)
        return self.done

    def _watch(self, process: subprocess.Popen, events, end: float) -> None:
        while process.poll() is None and self.done < len(self.parts):
            self._read(events)
            if time.monotonic() > self._limit(end):
                return
            time.sleep(_POLL)

    def _limit(self, end: float) -> float:
        """When the process is ended from outside. A part that has begun may use its own limit up to the end of all."""
        if not self.ready:
            return min(self.since + START_SECONDS, end)
        return min(self.since + self.parts[self.done].limit + _GRACE, end) if self.done < len(self.parts) else end

    def _read(self, events) -> None:
        *lines, self.rest = (self.rest + events.read()).split("\n")
        for line in lines:
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "cannot start":
                self._never_began("skipped" if self.parts[0].host == DYNAMIC else "failed", event["message"])
            elif kind == "ready":
                self.ready, self.since = True, time.monotonic()
            elif kind == "start":
                self.since = event["at"]
            elif kind == "end":
                _finish(self.results[event.pop("name")], self.listen, **event)
                self.done += 1

    def _never_began(self, status: str, message: str, said: str = "") -> None:
        """None of the parts. If that is all that is known of this machine, nothing else is worth a try."""
        if all(result.status in (NOT_RUN, "skipped") for result in self.results.values()) and status == "failed":
            raise CannotStart(f"{message}\n{said}".strip())
        for part in self.parts:
            _finish(self.results[part.name], self.listen, status=status, message=message, traceback=said)
        self.done = len(self.parts)

    def _judge(self, code: int | None, end: float) -> None:
        """What became of the part at which the process ended, unless that said so itself."""
        if self.done == len(self.parts) or (self.done and self._status(self.done - 1) == "failed"):
            return
        said = self.log.read_text(encoding="utf-8", errors="replace")[-6000:]
        part, now = self.parts[self.done], time.monotonic()
        taken = now - self.since
        what = {"status": "failed", "message": f"its process {_how_it_ended(code)}", "traceback": said}
        if now >= end:
            what = {"message": f"the time was up {taken:.0f} s after it began" if self.ready else "no time was left"}
        elif not self.ready:
            return self._never_began("failed", f"ComfyUI could not be started: its process {_how_it_ended(code)}", said)
        elif taken >= part.limit:
            what |= {"message": f"took longer than its limit of {part.limit} s"}
        _finish(self.results[part.name], self.listen, seconds=round(taken, 2), **what)
        self.done += 1

    def _status(self, index: int) -> str:
        return self.results[self.parts[index].name].status


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by signal {-code}" + (", as for want of RAM" if code == -9 else "")
    return f"ended with status {code}"
