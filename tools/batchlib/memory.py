"""The peak of a process's memory, where the system tells it: on Linux."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path


def forget_peak(pid: int) -> None:
    """Begins anew: the peak is that from now on."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def peak_gib(pid: int) -> float | None:
    """The most memory that the process has held, in GiB; None where it cannot be known."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return round(int(found[1]) / 2**20, 3) if found else None
