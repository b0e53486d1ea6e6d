"""Finds the browser for the browser tests."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")
ABSENT = "Chromium was not found: install it (Debian: apt install chromium), or set CHROMIUM to a browser's path."


def find_chromium() -> str | None:
    """The path in the environment variable CHROMIUM, or the first known browser on the search path."""
    chosen = os.environ.get("CHROMIUM")
    candidates = [chosen] if chosen else NAMES
    return next((path for path in map(shutil.which, candidates) if path), None)
