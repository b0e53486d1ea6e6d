"""Shows a training on the terminal or in a log, and cancels it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from hostlib.progress import ProgressLine

TRAINING = "tlora.training"  # the event that tells a run's state


class Watch:
    """What a run tells. state, message: its last. loss: running mean of the last step's, or None before it.
    scores: as LiveRun.state has them, or None. cancelled_by: the number of the signal that cancelled it, or 0."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.line = ProgressLine(self.stream)
        self.state, self.message, self.cancelled_by = "", "", 0
        self.loss: float | None = None
        self.scores: dict[str, Any] | None = None
        self._title = ""

    def hear(self, event: str, data: dict[str, Any]) -> None:
        """A listener for page.pages.heard_by."""
        if event != TRAINING:
            return
        self.state = data["state"]
        self._say(data["title"], self._title)
        self._title = data["title"]
        if data["points"]:
            self.loss = data["points"][-1][2]
        self.scores = data.get("scores")
        if self.state != "running":
            self.line.finish()
        elif data["step"]:
            self.line.step("training", f"training, loss {self.loss or 0:.4f}", data["step"], data["steps"])
        if self.state == "running":
            self._say(data["message"], self.message)
        self.message = data["message"]

    def _say(self, text: str, before: str) -> None:
        if text and text != before:
            self.line.finish()
            print(text, file=self.stream, flush=True)

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Within the block, Ctrl-C and SIGTERM cancel the run, and ComfyUI's progress bars outside the training itself
        are shown here. A bar also ends a cancelled run: ComfyUI's server does the same."""
        import comfy.utils
        from comfy.model_management import throw_exception_if_processing_interrupted

        def show(value: float, total: float, *_more: object, **_others: object) -> None:
            throw_exception_if_processing_interrupted()
            if self.state != "running":
                self.line.step("preparing", "preparing", value, total)

        handlers = {number: signal.signal(number, self.cancel) for number in (signal.SIGINT, signal.SIGTERM)}
        comfy.utils.set_progress_bar_global_hook(show)
        try:
            yield
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.line.finish()

    def cancel(self, number: int, _frame: object) -> None:
        """A signal handler: ends the run at its next step; the second time, the process at once."""
        import comfy.model_management

        if self.cancelled_by:
            raise KeyboardInterrupt
        self.cancelled_by = int(number)
        comfy.model_management.interrupt_current_processing()
