"""Shows the progress of a slow node: the host's bar and a line with the time left."""

import time
from collections.abc import Callable

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from server import PromptServer

SAY_EVERY = 2.0  # seconds


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def say(text: str, node_id: str | None) -> None:
    """Shows text on the node, if there are a node and a server."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def adding_to(text: str, node_id: str | None) -> Callable[[str], None]:
    """Shows a later sentence on the node, below the text that it shows already."""
    return lambda sentence: say(f"{text}\n{sentence}".lstrip(), node_id)


def counting(what: str, node_id: str | None, unit: str = "step") -> Callable[[int, int], None]:
    """A callback (done, total) that shows the node's progress, in units such as layers, and a line once it takes longer
    than SAY_EVERY; the line stays on the node. Its first call must have done = 0. It raises the host's interrupt after
    a cancel."""
    bar, began, said = None, 0.0, 0.0  # said: when the line was last written, or it began

    def update(done: int, total: int) -> None:
        nonlocal bar, began, said
        now = time.monotonic()
        throw_exception_if_processing_interrupted()
        if done == 0:
            bar, began, said = ProgressBar(total, node_id=node_id), now, now
            return
        if now - said > SAY_EVERY or (done == total and said > began):
            said = now
            left = "done" if done == total else f"{duration((now - began) / done * (total - done))} left"
            say(f"{unit} {done} of {total}, {what}, {left}", node_id)
        if bar is not None:
            bar.update_absolute(done, total)

    return update
