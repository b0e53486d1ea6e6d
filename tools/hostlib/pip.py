"""Virtual environments and pip, with short progress lines and pip's own words when it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from .errors import HostError

TAIL_LINES = 25


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def create_venv(folder: Path) -> Path:
    """Make a virtual environment with pip and return its interpreter."""
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if made.returncode:
        words = (made.stdout + made.stderr).strip()
        raise HostError(
            f"Python could not make a virtual environment (Debian and Ubuntu need the package python3-venv):\n{words}"
        )
    return venv_python(folder)


def pip(python: Path, *arguments: str, purpose: str) -> None:
    """Run pip, showing what it fetches; on failure raise with the end of what pip said."""
    command = [str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(
        command + ["--progress-bar", "off"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            for line in process.stdout:
                tail.append(line.rstrip())
                _show(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = "\n".join(tail)
        raise HostError(f"pip could not {purpose}; it said:\n{said}")


def _show(line: str) -> None:
    """Print one short line for each download and for the installation, and nothing else of pip's output."""
    fetched = re.match(r"\s*(?:Downloading|Using cached|Processing) (\S+)(?: \((\d.+)\))?", line)
    if fetched and not fetched[1].endswith(".metadata"):
        name = re.split(r"[/\\]", fetched[1])[-1].split("-")[0]
        print(f"  {name} {fetched[2] or ''}".rstrip(), flush=True)
    elif line.startswith("Installing collected packages:"):
        print(f"  installing {line.count(',') + 1} packages ...", flush=True)


def site_folders(python: Path) -> Sequence[str]:
    """The interpreter's own package folders (two on systems that keep compiled packages apart)."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib')); print(sysconfig.get_path('platlib'))"
    said = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True)
    return sorted(set(said.stdout.split("\n")) - {""})
