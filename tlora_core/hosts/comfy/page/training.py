"""Training runs as the page sees them: their progress, and the user's requests to them.

While the server runs, this module keeps the latest run of each node, of RUNS_KEPT nodes at most, with its loss curve
and validation pictures, so that a page that is opened later or reloaded can show all of it; `routes.training` answers
the page. Training runs in the host's prompt thread and the routes in its event loop, so a run locks itself. Without a
server a run only keeps its record.
"""

import functools
import io
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_management
import psutil
import torch
from comfy.model_management import InterruptProcessingException
from PIL import Image

from .pages import tell
from .queued import owner_of, queued_workflow

EVENT = "tlora.training"
EVENT_EVERY = 0.25  # seconds
RATE_OVER = 10.0  # seconds over which steps per second are averaged
RUNS_KEPT = 6
PICTURES_KEPT = 50
PICTURE_SIDE = 768  # pixels of one validation picture; larger ones are shrunk
CURVE_POINTS = 1000

Ended = Literal["done", "found", "stopped", "cancelled", "failed"]
State = Literal["running"] | Ended
Point = tuple[int, float, float]  # step, its loss, running mean of the loss


@dataclass(frozen=True)
class ValidationPicture:
    """A picture of `step` for the page: the bytes of a PNG or JPEG, and its prompts from left to right. scores: of each
    prompt's pictures, values by name that are None where not measured; None for no scores."""

    step: int
    captions: tuple[str, ...]
    content: bytes
    content_type: str
    scores: tuple[Mapping[str, float | None], ...] | None = None


class LiveRun:
    """One training run. The training calls `report` after each step, reads `stop_requested` and
    `take_save_request`, and calls `finish` at the end. The page's routes call `state`, `picture`, `request`."""

    _registry_lock = threading.Lock()
    _runs: dict[str, "LiveRun"] = {}  # oldest first

    def __init__(self, node_id: str | None, workflow: Mapping[str, Any], steps: int, first_step: int, title: str):
        self.id = secrets.token_urlsafe(12)
        self.node_id, self.steps, self.title = node_id, steps, title
        self.workflow_id, self.owner = workflow.get("id"), owner_of(workflow, node_id)
        self._lock = threading.Lock()
        self._state: State = "running"
        self._step = self._first_step = first_step
        self._points: list[Point] = []
        self._sent = 0  # number of points already sent in events
        self._sequence = 0  # number of the event, so that a page can order them
        self._event_at = -math.inf
        self._pace: deque[tuple[float, int]] = deque([(time.monotonic(), first_step)])
        self._pictures: dict[int, ValidationPicture] = {}
        self._pictures_made = 0
        self._scores: Mapping[str, Any] | None = None
        self._message = self._file = ""
        self._way: dict[str, Any] | None = None
        self._wishes: set[Literal["stop", "checkpoint"]] = set()

    @classmethod
    def begin(cls, node_id: str | None, steps: int, first_step: int = 0, title: str = "") -> "LiveRun":
        """A new run of `steps` steps in total, of which `first_step` are already done. It replaces the node's earlier
        run. `node_id` is the host's, "3:7" in a subgraph; None for a run without a node."""
        run = cls(node_id, queued_workflow(), steps, first_step, title)
        with cls._registry_lock:
            for old in [r for r in cls._runs.values() if r.place == run.place]:
                del cls._runs[old.id]
            cls._runs[run.id] = run
            for old_id in list(cls._runs)[:-RUNS_KEPT]:
                del cls._runs[old_id]
        device = comfy.model_management.get_torch_device()
        if device.type == "cuda":  # only if ComfyUI uses the GPU: the call would initialise it and take memory
            torch.cuda.reset_peak_memory_stats(device)
        run._tell()
        return run

    @property
    def place(self) -> tuple[str | None, ...]:
        """Identifies the node that ran it; each node keeps only its latest run."""
        return self.node_id, self.workflow_id, self.owner

    @classmethod
    def find(cls, run_id: str) -> "LiveRun | None":
        """The kept run with that id."""
        with cls._registry_lock:
            return cls._runs.get(run_id)

    @classmethod
    def states(cls) -> list[dict[str, Any]]:
        """`state` of all kept runs, oldest first."""
        with cls._registry_lock:
            runs = list(cls._runs.values())
        return [run.state() for run in runs]

    def report(self, step: int, loss: float) -> None:
        """Records the loss of a step, counted from 1; steps up to `first_step` may be reported too, for the curve.
        Cheap: pages are told a few times a second."""
        now = time.monotonic()
        with self._lock:
            self._step = max(step, self._first_step)
            if math.isfinite(loss):  # JSON has no NaN or infinity
                # The same running mean as in the loss picture at the end.
                window = min(len(self._points) + 1, max(self.steps // 20, 1))
                mean = self._points[-1][2] if self._points else loss
                self._points.append((step, loss, mean + (loss - mean) / window))
            if step > self._first_step:
                self._pace.append((now, step))
            while len(self._pace) > 2 and now - self._pace[1][0] > RATE_OVER:
                self._pace.popleft()
            due = now - self._event_at >= EVENT_EVERY
        if due:
            self._tell()

    def validation(
        self,
        step: int,
        picture: Image.Image,
        captions: Sequence[str],
        scores: Sequence[Mapping[str, float | None]] | None = None,
    ) -> None:
        """Adds a validation picture of `step`. It may show several prompts side by side, with a caption for each, and
        the scores of each; see ValidationPicture."""
        shrunk = picture.convert("RGB")
        shrunk.thumbnail((PICTURE_SIDE * max(len(captions), 1), PICTURE_SIDE))
        kind = "PNG" if max(shrunk.size) <= 256 else "JPEG"
        content = io.BytesIO()
        shrunk.save(content, kind, quality=90)
        rated = None if scores is None else tuple(scores)
        made = ValidationPicture(step, tuple(captions), content.getvalue(), f"image/{kind.lower()}", rated)
        with self._lock:
            self._pictures[self._pictures_made] = made
            self._pictures_made += 1
            if len(self._pictures) > PICTURES_KEPT:
                # Drop every second one, but not the first and the newest, so that they still span the whole training.
                for index in list(self._pictures)[1:-1:2]:
                    del self._pictures[index]
        self._tell()

    def scored(self, scores: Mapping[str, Any]) -> None:
        """Shows the scores of all validations so far, as JSON values: steps, best, past and sentence."""
        with self._lock:
            self._scores = scores
        self._tell()

    def note(self, message: str) -> None:
        """Shows a line on the panel, such as where a file was saved."""
        with self._lock:
            self._message = message
        self._tell()

    def way(self, memory: str, in_ram: int | None, weights: int) -> None:
        """Shows how the training uses memory: its setting, and how many of the weights' bytes stay in RAM. None: the
        host streams whatever does not fit, and does not tell how much."""
        with self._lock:
            self._way = {"memory": memory, "in_ram": in_ram, "weights": weights}

    @property
    def stop_requested(self) -> bool:
        """Whether the user has pressed Stop and keep."""
        return "stop" in self._wishes

    def take_save_request(self) -> bool:
        """Whether the user has pressed Checkpoint now since the last call."""
        with self._lock:
            asked = "checkpoint" in self._wishes
            self._wishes.discard("checkpoint")
        return asked

    def finish(
        self, state: Literal["done", "found", "stopped", "cancelled", "failed"], message: str = "", file: str = ""
    ) -> None:
        """Ends the run; "found" means that an equal run was found and not trained again. `message` is for the user,
        `file` the name in Load T-LoRA's list."""
        with self._lock:
            self._state, self._message, self._file = state, message, file
            self._wishes.discard("checkpoint")
        self._tell()

    def request(self, wish: Literal["stop", "checkpoint"]) -> bool:
        """The page's Stop and keep or Checkpoint now. False if the run has already ended."""
        with self._lock:
            if self._state != "running":
                return False
            self._wishes.add(wish)
        self._tell()
        return True

    def picture(self, index: int) -> ValidationPicture | None:
        """The picture with this index from `state`; None if it was dropped."""
        with self._lock:
            return self._pictures.get(index)

    def state(self) -> dict[str, Any]:
        """All that the page shows, as JSON values, with at most CURVE_POINTS points of the loss curve."""
        with self._lock:
            return self._as_json(thinned(self._points))

    @classmethod
    def of(cls, node_id: str | None) -> "LiveRun | None":
        """The newest run of this node in the running workflow."""
        workflow = queued_workflow()
        place = node_id, workflow.get("id"), owner_of(workflow, node_id)
        with cls._registry_lock:
            return next((run for run in reversed(cls._runs.values()) if run.place == place), None)

    def _tell(self) -> None:
        """Sends one event to all pages, with the points since the last event."""
        with self._lock:
            self._sequence += 1
            state = self._as_json(self._points[self._sent :])
            self._sent = len(self._points)
            self._event_at = time.monotonic()
            # This only queues the event; inside the lock, so that events stay in order.
            tell(EVENT, state)

    def _as_json(self, points: Sequence[Point]) -> dict[str, Any]:
        (began, first), (ended, last) = self._pace[0], self._pace[-1]
        rate = (last - first) / (ended - began) if last > first and ended > began else None
        kind, memory = _memory()
        return {
            "id": self.id,
            "sequence": self._sequence,
            "node": self.node_id,
            "workflow": self.workflow_id,
            "owner": self.owner,
            "title": self.title,
            "state": self._state,
            "step": self._step,
            "steps": self.steps,
            "points": points,
            "rate": rate,
            "left": (self.steps - self._step) / rate if rate else None,
            "memory": memory,
            "memory_kind": kind,
            "way": self._way,
            "pictures": [
                {"index": index, "step": p.step, "captions": p.captions, "scores": p.scores}
                for index, p in self._pictures.items()
            ],
            "scores": self._scores,
            "wishes": sorted(self._wishes),
            "message": self._message,
            "file": self._file,
        }


def shown_when_it_fails(execute: Callable) -> Callable:
    """Decorates a node's `execute`, below its @classmethod: shows an error or a cancel that no run has reported; the
    page would otherwise still show an older run. The node must have `hidden.unique_id`."""

    @functools.wraps(execute)
    def shown(node, *args, **inputs):
        before = LiveRun.of(node.hidden.unique_id)
        try:
            return execute(node, *args, **inputs)
        except InterruptProcessingException:
            _end_of(node.hidden.unique_id, before, "cancelled", "Cancelled before the first step; press Run to start.")
            raise
        except Exception as error:
            _end_of(node.hidden.unique_id, before, "failed", str(error) or type(error).__name__)
            raise

    return shown


def _end_of(node_id: str | None, before: LiveRun | None, state: Ended, message: str) -> None:
    run = LiveRun.of(node_id)
    if run is None or run is before:
        run = LiveRun.begin(node_id, steps=0)
    if run.state()["state"] == "running":
        run.finish(state, message)


def thinned(points: Sequence[Point], most: int = CURVE_POINTS) -> list[Point]:
    """At most `most` evenly chosen points, including the last one."""
    if len(points) <= most:
        return list(points)
    return [points[(i + 1) * len(points) // most - 1] for i in range(most)]


def _memory() -> tuple[str, float]:
    """(kind, MB of 2^20 bytes): the GPU's peak since the run began, or else the memory that the process holds now."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        return "device peak", torch.cuda.max_memory_allocated(device) / 2**20
    return "process", psutil.Process().memory_info().rss / 2**20
