"""Runs rows on a Ray cluster: one ComfyUI on each worker, which is an actor with a card of its own.

Ray places the workers, and starts one again that has died. A row whose worker dies goes on from its last state on
whichever worker is free first. The pack itself and all files travel through Ray; no disk is shared.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from hostlib.errors import HostError
from hostlib.pins import REPO
from ray.exceptions import RayActorError, RayError, RayTaskError

from .jobs import Job
from .local import LOST, Begin, unreadable
from .worker import Event, OnSheet

LEFT_OUT = ["/tests", "/docs", "/benchmarks", "/workflows", "__pycache__"]  # of the pack
POLL_SECONDS = 0.5  # a signal is seen between polls
CLOSE_SECONDS = 30
STARTS = 3  # of a local cluster, each of which Ray gives half a minute


class OnRay:
    parallel = True

    def __init__(self, settings: dict[str, Any], address: str, workers: int | None, rows: int):
        _connect(address)
        options = _options(workers, rows)
        self._actors = [_actor_class().options(**options.each).remote(settings) for _ in range(options.count)]
        self._running: dict[Any, tuple[Any, Job]] = {}  # by the stream of the row's events
        self._coming: dict[Any, Any] = {}  # workers by the sign that they are there
        self._expect(self._actors)
        self._cancelled = False

    def check(self, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._ask("check", list(jobs))

    def sheet(self, rows: Sequence[OnSheet]) -> bytes:
        return self._ask("sheet", list(rows))

    def _ask(self, method: str, given: Any) -> Any:
        """What the first worker says that is there."""
        while not (idle := self._arrived()):
            pass
        self._expect(idle)
        try:
            return ray.get(getattr(idle[0], method).remote(given))
        except RayTaskError as error:
            raise _in_words(error) from error

    def run(self, todo: deque[Job], begin: Begin) -> Iterator[tuple[Job, Event]]:
        """As Local.run, with several rows at once."""
        idle: list[Any] = []
        while todo or self._running:
            idle += self._arrived()
            while todo and idle:
                job = todo.popleft()
                try:
                    self._give(idle[-1], job, begin)
                    idle.pop()
                except OSError as error:
                    yield job, unreadable(error)
            if not self._running:
                continue
            ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=POLL_SECONDS)
            for stream in ready:
                yield from self._take(stream)
            self._pass_cancel_on()
        self._expect(idle)

    def _take(self, stream: Any) -> Iterator[tuple[Job, Event]]:
        actor, job = self._running[stream]
        event = self._next(stream)
        if event is None or event["event"] == LOST:
            del self._running[stream]
            # A worker that has died is not there before Ray has started it again.
            self._expect([actor])
        if event is not None:
            yield job, event

    def _expect(self, actors: Sequence[Any]) -> None:
        self._coming.update({actor.ready.remote(): actor for actor in actors})

    def _give(self, actor: Any, job: Job, begin: Begin) -> None:
        payload = job.payload()
        stream = actor.run.options(num_returns="streaming").remote(payload, begin(job))
        self._running[stream] = actor, job

    @staticmethod
    def _next(stream: Any) -> Event | None:
        """The next event of a row; None after its last."""
        try:
            return ray.get(next(stream))
        except StopIteration:
            return None
        except RayTaskError as error:
            return {"event": LOST, "error": str(_in_words(error))}
        except RayError as error:
            return {"event": LOST, "error": f"{type(error).__name__}: the worker's machine or process is gone."}

    def _arrived(self) -> list[Any]:
        """Workers that are there, and have nothing to do. Raises HostError where none can ever be."""
        if not self._coming:
            return []
        # Without a row that runs there is nothing else to wait for.
        ready, _ = ray.wait(list(self._coming), timeout=0 if self._running else POLL_SECONDS)
        arrived = []
        for sign in ready:
            actor = self._coming.pop(sign)
            try:
                ray.get(sign)
                arrived.append(actor)
            except RayTaskError as error:
                raise _in_words(error) from error
            except RayActorError as error:
                if getattr(error, "actor_init_failed", False):
                    raise HostError(f"A worker cannot start: {error}") from error
                self._expect([actor])
        return arrived

    def cancel(self) -> None:
        self._cancelled = True

    def _pass_cancel_on(self) -> None:
        if self._cancelled:
            self._cancelled = False
            for actor, _ in self._running.values():
                actor.cancel.remote()

    def close(self) -> None:
        closed = [actor.close.remote() for actor in self._actors]
        ray.wait(closed, num_returns=len(closed), timeout=CLOSE_SECONDS)
        ray.shutdown()


def _connect(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment = {"working_dir": str(REPO), "excludes": LEFT_OUT}
    for tries_left in reversed(range(STARTS)):
        try:
            ray.init(address or None, runtime_env=environment, logging_level="error", log_to_driver=False)
            return
        except Exception as error:  # Ray raises a bare one when a local start takes too long, as on a busy machine
            ray.shutdown()
            text = " ".join(str(error).split())
            if address:
                raise HostError(f'--ray is "{address}", where no Ray cluster answers ({text}).') from error
            if not tries_left:
                raise HostError(f"Ray could not be started here ({text}).") from error


class _Options:
    """count: of workers. each: options of an actor."""

    def __init__(self, count: int, gpus: int, cpus: int):
        self.count = count
        self.each = {"num_gpus": gpus, "num_cpus": cpus, "max_restarts": -1, "max_concurrency": 3}


def _options(workers: int | None, rows: int) -> _Options:
    """As many workers as the cluster has cards, each with one; without any, as many as it has machines, on their
    processors. All share the processors of a machine evenly."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cards = [node for node in nodes if node.get("GPU", 0) >= 1]
    if cards:
        count = workers or int(sum(node["GPU"] for node in cards))
        return _Options(min(count, rows), 1, max(1, int(min(node["CPU"] // node["GPU"] for node in cards))))
    count = min(workers or len(nodes), rows)
    on_each = math.ceil(count / len(nodes))
    return _Options(count, 0, max(1, int(min(node.get("CPU", 1) for node in nodes) // on_each)))


def _actor_class() -> Any:
    class Actor:
        """A worker in a process of Ray's, with the pack as its working folder."""

        def __init__(self, settings: dict[str, Any]):
            import sys

            sys.path.insert(0, str(Path("tools").absolute()))
            from batchlib.worker import Worker

            self.worker = Worker(settings)

        def ready(self) -> None:
            """Returns once the worker is there."""

        def check(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
            return self.worker.check(jobs)

        def run(self, job: dict[str, Any], state: bytes | None) -> Iterator[Event]:
            yield from self.worker.run(job, state)

        def sheet(self, rows: list[OnSheet]) -> bytes:
            return self.worker.sheet(rows)

        def cancel(self) -> None:
            self.worker.cancel()

        def close(self) -> None:
            self.worker.close()

    return ray.remote(Actor)


def _in_words(error: RayTaskError) -> Exception:
    """What the worker raised: Ray hands it on as the cause, in a class of its own."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    return HostError(str(cause))
