"""Progress of a long node: the host's bar, a line of text with the time left, and a picture."""
import time
from collections.abc import Callable

from comfy.utils import ProgressBar
from PIL import Image
from server import PromptServer

PICTURE_EVERY = 2.0  # seconds


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def say(text: str, node_id: str | None) -> None:
    """Shows text on the node, where there is one and a page to show it on."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


class Progress:
    """Call `update` after each step, counted from `first` + 1. It raises the host's interrupt when the user has pressed cancel."""

    def __init__(self, total: int, node_id: str | None, picture: Callable[[], Image.Image] | None = None, first: int = 0):
        self.total, self.node_id, self.picture, self.first = total, node_id, picture, first
        self.bar = ProgressBar(total, node_id=node_id)
        self.began = time.monotonic()
        self.shown = 0.0

    def update(self, step: int, text: str) -> None:
        now = time.monotonic()
        preview = None
        if now - self.shown > PICTURE_EVERY or step == self.total:
            self.shown = now
            preview = None if self.picture is None else ("JPEG", self.picture(), None)
            left = (now - self.began) / (step - self.first) * (self.total - step)
            say(f"step {step} of {self.total}, {text}, {duration(left)} left", self.node_id)
        self.bar.update_absolute(step, self.total, preview)


def counting(what: str, node_id: str | None) -> Callable[[int, int], None]:
    """A callback (done, total) that shows progress as `Progress` does, from its first call on, which tells done = 0."""
    progress = None

    def update(done: int, total: int) -> None:
        nonlocal progress
        if done == 0:
            progress = Progress(total, node_id)
        else:
            progress.update(done, what)

    return update
