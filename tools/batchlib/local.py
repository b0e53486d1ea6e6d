"""Runs rows one after the other, in one process that stays warm."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .jobs import Job
from .worker import Event, Lost, OnSheet, Worker

Begin = Callable[[Job], bytes | None]
LOST = "lost"  # the event of a row whose worker has ended in its middle


def unreadable(error: OSError) -> Event:
    """The end of a row whose picture was there when the table was read, and is no longer."""
    return {"event": "end", "state": "failed", "error": f"{error.filename} cannot be read ({error.strerror})."}


class Local:
    parallel = False

    def __init__(self, settings: dict[str, Any]):
        self.worker = Worker(settings)

    def check(self, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.worker.check(jobs)

    def run(self, todo: deque[Job], begin: Begin) -> Iterator[tuple[Job, Event]]:
        """Each row's events, to its "end" or "lost". todo: may grow and shrink between events. begin: gives the state
        of a row that begins."""
        while todo:
            job = todo.popleft()
            try:
                payload = job.payload()
            except OSError as error:
                yield job, unreadable(error)
                continue
            try:
                for event in self.worker.run(payload, begin(job)):
                    yield job, event
            except Lost as lost:
                yield job, {"event": LOST, "error": str(lost)}

    def cancel(self) -> None:
        """Ends the rows that run; called from a signal handler."""
        self.worker.cancel()

    def sheet(self, rows: Sequence[OnSheet]) -> bytes:
        return self.worker.sheet(rows)

    def close(self) -> None:
        self.worker.close()
