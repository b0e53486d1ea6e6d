"""How a worker talks to its child process, which holds ComfyUI: lines of JSON, commands in and events out.

The first line is the settings. Commands: {"do": "check", "jobs": [...]}, {"do": "run", "job": {...}}, {"do": "cancel"}.
Events: "checked", "progress", and "end" after each run. The end of the commands is the end of the worker: the child
then ends at once, so that none is left behind whatever happens to the worker.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Talk:
    """The child's side.

    settings: from the worker. cancelled: whether a cancel has come. on_cancel: called when one comes, from another
    thread. on_end: called before the child ends because its worker has.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = json.loads(sys.stdin.readline())
        # What libraries print must not come between the events.
        self._events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        sys.stdout = sys.stderr
        self._commands: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lock = threading.Lock()
        self.cancelled = threading.Event()
        self.on_cancel: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "cancel":
                self.cancelled.set()
                self.on_cancel()
            else:
                self._commands.put(command)
        self.on_end()
        self._remove_private()
        os._exit(0)

    def _remove_private(self) -> None:
        """What runs may still be writing there, hence several tries."""
        for _ in range(20):
            shutil.rmtree(self.settings["private"], ignore_errors=True)
            if not os.path.exists(self.settings["private"]):
                return
            time.sleep(0.05)

    def tell(self, event: str, **what: Any) -> None:
        with self._lock:
            self._events.write(json.dumps({"event": event, **what}) + "\n")

    def commands(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self._commands.get()
