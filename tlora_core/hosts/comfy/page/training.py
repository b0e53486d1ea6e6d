"""Training runs as the page sees them: where a run stands, and what the user wants of it.

The latest run of each node is kept here while the server lives, of RUNS_KEPT nodes at most, with its loss curve and
validation pictures, so that a page that is opened later, or again, can be told all of it; see `routes.training` for how
a page asks. Training runs in the host's prompt thread and the routes in its event loop, so a run locks itself. Without
a server a run only keeps its record.
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
RATE_OVER = 10.0  # seconds of steps that make the steps per second
RUNS_KEPT = 6
PICTURES_KEPT = 50
PICTURE_SIDE = 768  # pixels of one validation picture; larger ones are shrunk
CURVE_POINTS = 1000

Ended = Literal["done", "found", "stopped", "cancelled", "failed"]
State = Literal["running"] | Ended
Point = tuple[int, float, float]  # step, its loss, running mean of the loss


@dataclass(frozen=True)
class ValidationPicture:
    """A picture of `step` as a page gets it: the bytes of a PNG or JPEG, and what its prompts were, from left to
    right."""

    step: int
    captions: tuple[str, ...]
    content: bytes
    content_type: str


class LiveRun:
    """One training run. The trainer's side: `report` after each step, then `finish`; it looks at `stop_requested` and
    `take_checkpoint_request`. The page's side: `state`, `picture`, `request`."""

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
        self._sent = 0  # points that events have told
        self._sequence = 0  # of events, so that a page can tell old from new
        self._event_at = -math.inf
        self._pace: deque[tuple[float, int]] = deque([(time.monotonic(), first_step)])
        self._pictures: dict[int, ValidationPicture] = {}
        self._pictures_made = 0
        self._message = self._file = ""
        self._wishes: set[Literal["stop", "checkpoint"]] = set()

    @classmethod
    def begin(cls, node_id: str | None, steps: int, first_step: int = 0, title: str = "") -> "LiveRun":
        """A new run of `steps` steps in all, of which `first_step` are already done. It takes the place of the node's
        earlier one. `node_id` is the host's, "3:7" in a sub-graph; None keeps a run without a node."""
        run = cls(node_id, queued_workflow(), steps, first_step, title)
        with cls._registry_lock:
            for old in [r for r in cls._runs.values() if r.place == run.place]:
                del cls._runs[old.id]
            cls._runs[run.id] = run
            for old_id in list(cls._runs)[:-RUNS_KEPT]:
                del cls._runs[old_id]
        device = comfy.model_management.get_torch_device()
        if device.type == "cuda":  # and not where ComfyUI leaves a GPU alone: it would be woken, and hold memory
            torch.cuda.reset_peak_memory_stats(device)
        run._tell()
        return run

    @property
    def place(self) -> tuple[str | None, ...]:
        """The node in the graph that ran it: each has one run here, its latest."""
        return self.node_id, self.workflow_id, self.owner

    @classmethod
    def find(cls, run_id: str) -> "LiveRun | None":
        """The kept run with that id."""
        with cls._registry_lock:
            return cls._runs.get(run_id)

    @classmethod
    def states(cls) -> list[dict[str, Any]]:
        """`state` of every kept run, oldest first."""
        with cls._registry_lock:
            runs = list(cls._runs.values())
        return [run.state() for run in runs]

    def report(self, step: int, loss: float) -> None:
        """After each step, counted from 1: its loss; those up to `first_step` may be told too, for the curve. Cheap:
        pages hear of it a few times a second."""
        now = time.monotonic()
        with self._lock:
            self._step = max(step, self._first_step)
            if math.isfinite(loss):  # JSON has no other numbers
                # The same running mean as the loss picture's at the training's end.
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

    def validation(self, step: int, picture: Image.Image, captions: Sequence[str]) -> None:
        """A picture sampled with the state of `step`; it may show several prompts side by side, a caption for each."""
        shrunk = picture.convert("RGB")
        shrunk.thumbnail((PICTURE_SIDE * max(len(captions), 1), PICTURE_SIDE))
        kind = "PNG" if max(shrunk.size) <= 256 else "JPEG"
        content = io.BytesIO()
        shrunk.save(content, kind, quality=90)
        made = ValidationPicture(step, tuple(captions), content.getvalue(), f"image/{kind.lower()}")
        with self._lock:
            self._pictures[self._pictures_made] = made
            self._pictures_made += 1
            if len(self._pictures) > PICTURES_KEPT:
                # Every second one, so that the strip still spans the whole training; the first and the newest stay.
                for index in list(self._pictures)[1:-1:2]:
                    del self._pictures[index]
        self._tell()

    def note(self, message: str) -> None:
        """A line for the panel, such as where a checkpoint was saved."""
        with self._lock:
            self._message = message
        self._tell()

    @property
    def stop_requested(self) -> bool:
        """Whether the user wants the training to end now and its result to be kept."""
        return "stop" in self._wishes

    def take_checkpoint_request(self) -> bool:
        """Whether the user wants a checkpoint; the next call says no, until he asks again."""
        with self._lock:
            asked = "checkpoint" in self._wishes
            self._wishes.discard("checkpoint")
        return asked

    def finish(self, state: Ended, message: str = "", file: str = "") -> None:
        """The end, "found" being that of a run that was not trained again: `message` for the user, `file` as Load
        T-LoRA lists it."""
        with self._lock:
            self._state, self._message, self._file = state, message, file
            self._wishes.discard("checkpoint")
        self._tell()

    def request(self, wish: Literal["stop", "checkpoint"]) -> bool:
        """The page's Stop and keep, or Checkpoint now; False when the run has ended already."""
        with self._lock:
            if self._state != "running":
                return False
            self._wishes.add(wish)
        self._tell()
        return True

    def picture(self, index: int) -> ValidationPicture | None:
        """By the index that `state` tells of it; None for one that was thinned out."""
        with self._lock:
            return self._pictures.get(index)

    def state(self) -> dict[str, Any]:
        """All that a page shows, as JSON values; the loss curve thinned to at most CURVE_POINTS points."""
        with self._lock:
            return self._as_json(thinned(self._points))

    @classmethod
    def of(cls, node_id: str | None) -> "LiveRun | None":
        """The newest run of this node in the workflow that is being run."""
        workflow = queued_workflow()
        place = node_id, workflow.get("id"), owner_of(workflow, node_id)
        with cls._registry_lock:
            return next((run for run in reversed(cls._runs.values()) if run.place == place), None)

    def _tell(self) -> None:
        """One event to all pages, with the points since the last one."""
        with self._lock:
            self._sequence += 1
            state = self._as_json(self._points[self._sent :])
            self._sent = len(self._points)
            self._event_at = time.monotonic()
            # Only queued there; inside the lock, so that events leave in order.
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
            "pictures": [
                {"index": index, "step": p.step, "captions": p.captions} for index, p in self._pictures.items()
            ],
            "wishes": sorted(self._wishes),
            "message": self._message,
            "file": self._file,
        }


def shown_when_it_fails(execute: Callable) -> Callable:
    """For a node's `execute`, below its @classmethod: what ends it before a run begins, or past the run's own notice,
    is that node's run to the page too, which would else show an older one. The node has `hidden.unique_id`."""

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
    """At most `most` of the points, evenly chosen, the last one among them."""
    if len(points) <= most:
        return list(points)
    return [points[(i + 1) * len(points) // most - 1] for i in range(most)]


def _memory() -> tuple[str, float]:
    """What the number is, and MB (2^20 bytes): the device's peak since the run began, or what the process holds now."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        return "device peak", torch.cuda.max_memory_allocated(device) / 2**20
    return "process", psutil.Process().memory_info().rss / 2**20
