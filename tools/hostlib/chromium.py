"""Finds the browser for the browser tests."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")
ABSENT = f"Chromium was not found: set CHROMIUM to its path, or install one of {', '.join(NAMES)}."


def find_chromium() -> str | None:
    """The path in the environment variable CHROMIUM, or the first known browser on the search path."""
    chosen = os.environ.get("CHROMIUM")
    candidates = [chosen] if chosen else NAMES
    return next((path for path in map(shutil.which, candidates) if path), None)
