"""Child processes that never outlive this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 10
# A script or a test run has servers of its own to stop.
FOREGROUND_GRACE_SECONDS = 30
_PR_SET_PDEATHSIG = 1
# Loaded before a fork, after which little is allowed.
_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def exit_on_signals(leave: Callable[[int], None] = sys.exit) -> None:
    """Turn termination signals into an exception raised by `leave`, so that `finally` blocks run and stop the
    children."""

    def handle(number: int, _frame: object) -> None:
        leave(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handle)


def start_group(command: Sequence[str], bound: bool = False, **options) -> subprocess.Popen:
    """Start a child in a process group of its own, so that it can be stopped together with its children. bound: on
    Linux it is killed when the thread that starts it ends, for whatever reason."""
    if bound and _LIBC is not None:
        options["preexec_fn"] = _die_with_parent
    if sys.platform == "win32":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        options["start_new_session"] = True
    return subprocess.Popen(command, **{"stdin": subprocess.DEVNULL, **options})


def stop_group(process: subprocess.Popen) -> None:
    """Ask the child's whole group to end, and make it end when it does not."""
    if process.poll() is None:
        _signal_group(process, force=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    # The leader may be gone while a grandchild is left.
    _signal_group(process, force=True)
    process.wait()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _signal_group(process: subprocess.Popen, force: bool) -> None:
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)


def run_foreground(command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> int:
    """Run a child on this terminal, pass its exit status on, and end it when this process is told to end."""
    with subprocess.Popen(command, env=dict(env), cwd=cwd) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal has sent Ctrl-C to the child as well; let it finish in its own way.
            return process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(FOREGROUND_GRACE_SECONDS)
            process.kill()
            raise
