"""One line of progress: a node's title, a bar, and the time left."""

from __future__ import annotations

import sys
import time

BAR_CELLS = 24
# Where the output is not a terminal (a log), a line every so often is enough.
LOG_SECONDS = 15


def format_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d}"


class ProgressLine:
    """Redraws one line on a terminal; prints now and then elsewhere."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._node = ""
        self._started = 0.0
        self._shown = 0.0
        self._width = 0

    def node_started(self, node: str, title: str) -> None:
        if node == self._node:
            return
        self._node, self._started = node, time.monotonic()
        self._shown = self._started
        self._show(title)

    def step(self, node: str, title: str, value: float, maximum: float) -> None:
        self.node_started(node, title)
        now = time.monotonic()
        if not self._terminal and now - self._shown < LOG_SECONDS:
            return
        self._shown = now
        done = value / maximum if maximum else 0
        bar = "#" * int(BAR_CELLS * done)
        line = f"{title} [{bar:<{BAR_CELLS}}] {value:g}/{maximum:g}"
        if 0 < done < 1:
            line += f", {format_time((now - self._started) * (1 - done) / done)} left"
        self._show(line)

    def finish(self) -> None:
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
        self._node, self._width = "", 0

    def _show(self, line: str) -> None:
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(f"  {line}\n")
        self._stream.flush()


class Silent:
    """The listener for callers who only want the result."""

    def node_started(self, node: str, title: str) -> None:
        pass

    def step(self, node: str, title: str, value: float, maximum: float) -> None:
        pass

    def finish(self) -> None:
        pass
