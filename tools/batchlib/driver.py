"""Takes a table's rows through an engine, and keeps what comes back."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

from hostlib.progress import ProgressLine, format_time

from .jobs import Job
from .local import LOST, Begin
from .results import Results
from .worker import Event, OnSheet

TRIES = 3  # of a row whose worker ends in its middle


class Engine(Protocol):
    """parallel: whether several rows run at once."""

    parallel: bool

    def check(self, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]: ...
    def run(self, todo: deque[Job], begin: Begin) -> Iterator[tuple[Job, Event]]: ...
    def cancel(self) -> None: ...
    def sheet(self, rows: Sequence[OnSheet]) -> bytes: ...
    def close(self) -> None: ...


class Batch:
    """jobs: of the table, or of one shard of it, in its order. start: makes the engine for so many rows, once one is
    needed."""

    def __init__(self, jobs: Sequence[Job], results: Results, start: Callable[[int], Engine], stream=None):
        self.jobs, self.results, self._start = jobs, results, start
        self.stream = stream or sys.stderr
        self.line = ProgressLine(self.stream)
        self.cancelled_by = 0
        self._unique = list({job.key: job for job in jobs}.values())
        self._todo: deque[Job] = deque()
        self._lost: Counter[str] = Counter()
        self._waiting = 1

    def go(self) -> int:
        """Runs what is not done yet. The exit status: 0 all is done, 1 some rows failed, 130 or 143 ended by Ctrl-C or
        SIGTERM. Raises WrongArguments before anything is run."""
        waiting = [job for job in self._unique if not self.results.is_done(job)]
        if done := len(self._unique) - len(waiting):
            self._say(f"{done} of {len(self._unique)} rows are done already.")
        try:
            if waiting:
                self._waiting = len(waiting)
                self._check(waiting)
                with self.results.locked():
                    self._run(waiting)
                    self._end(something_ran=True)
            else:
                self._end(something_ran=False)
        finally:
            if "engine" in self.__dict__:
                self.engine.close()
        states = {self.results.record(job)["state"] for job in self._unique}
        return 128 + self.cancelled_by if self.cancelled_by else int(states != {"done"})

    @cached_property
    def engine(self) -> Engine:
        return self._start(self._waiting)

    def _check(self, waiting: Sequence[Job]) -> None:
        self._say("Looking at all rows before the first one is run ...")
        found = self.engine.check([job.checked() for job in waiting])
        if found.get("error"):
            row = next(job.row for job in waiting if job.row.number == found["row"])
            raise row.wrong(found["error"], found["column"])
        if "uploads" in found:
            for job in waiting:
                job.files = {name: paths for name, paths in job.files.items() if name in found["uploads"]}

    def _run(self, waiting: Sequence[Job]) -> None:
        # Another batch may have done some of them before this one had the lock.
        self._todo.extend(job for job in waiting if not self.results.is_done(job))
        with self._cancelled_by_signals():
            for job, event in self.engine.run(self._todo, self.results.begin):
                self._take(job, event)

    def _take(self, job: Job, event: Event) -> None:
        kind = event["event"]
        if kind == "progress":
            self._show(job, event)
        elif kind == "state":
            self.results.keep_state(job, event["data"])
        elif kind == "file":
            self.results.keep(job, event["name"], event["data"], event["sha256"])
        elif kind == LOST:
            self._take_lost(job, event["error"])
        else:
            self._take_end(job, {**event, "state": "done" if event["state"] == "found" else event["state"]})

    def _take_lost(self, job: Job, error: str) -> None:
        self._lost[job.key] += 1
        if self.cancelled_by:
            self._take_end(job, {"state": "cancelled", "error": ""})
        elif self._lost[job.key] < TRIES:
            self._say(f"{job.name}: its worker has ended; the row goes on from its last state.")
            self._todo.appendleft(job)
        else:
            told = f"Its worker ended {TRIES} times. {' '.join(error.split())}"
            self._take_end(job, {"state": "failed", "error": told})

    def _take_end(self, job: Job, event: Event) -> None:
        self.results.end(job, event)
        self.results.report(self.jobs)
        done = sum(self.results.record(each)["state"] == "done" for each in self._unique)
        took = f" in {format_time(event['seconds'])}" if event.get("seconds") else ""
        why = f": {event['error']}" if event["state"] != "done" and event.get("error") else ""
        self._say(f"{job.name} {event['state']}{took}{why} ({done} of {len(self._unique)} done)")

    def _show(self, job: Job, event: Event) -> None:
        if self.engine.parallel:
            return
        loss = f", loss {event['loss']:.4f}" if event.get("loss") else ""
        title = event.get("title")
        text = f"{job.name}{', ' + title if title else ''}{loss}"
        self.line.step(f"{job.name} {title}", text, event["step"], event["steps"])

    def _end(self, something_ran: bool) -> None:
        path = self.results.report(self.jobs)
        for sheet, jobs in self.results.sheets(self._unique):
            if something_ran or not sheet.is_file():
                self.results.write_sheet(sheet, self.engine.sheet([self._on_sheet(job) for job in jobs]))
            self._say(f"Sheet:   {sheet}")
        self._say(f"Report:  {path}")
        if self.cancelled_by:
            self._say("Stopped. The same command goes on.")

    def _on_sheet(self, job: Job) -> OnSheet:
        failed = " (failed)" if self.results.record(job)["state"] == "failed" else ""
        title = f"{job.row.number}: {job.title}{failed}"
        return title, [path.read_bytes() for path in self.results.pictures(job)]

    @contextlib.contextmanager
    def _cancelled_by_signals(self) -> Iterator[None]:
        """Within the block, Ctrl-C and SIGTERM end the rows that run and give no new ones; the second time all ends at
        once."""

        def cancel(number: int, _frame: object) -> None:
            if self.cancelled_by:
                raise KeyboardInterrupt
            self.cancelled_by = int(number)
            self._todo.clear()
            self._say("Stopping ...")
            self.engine.cancel()

        handlers = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _say(self, text: str) -> None:
        self.line.finish()
        print(text, file=self.stream, flush=True)
