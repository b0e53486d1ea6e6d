"""Folders that are expensive to build, kept outside the repository and built at most once.

A folder's name contains a hash of everything it is built from. It counts as complete only if its marker file exists,
which is written last and atomically. A folder without a marker comes from an interrupted build, and is removed and
built again. Virtual environments cannot be moved, so they are built in their final place instead of being renamed into
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import HostError

MARKER = "complete.json"
# Part of every key: raise it when the way of building changes, so that older folders are not reused.
LAYOUT = 1


def cache_root() -> Path:
    """The user's cache folder for this project; TLORA_HOST_CACHE overrides it."""
    chosen = os.environ.get("TLORA_HOST_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    return _user_cache() / "comfyui-t-lora"


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def key_of(**parts: object) -> str:
    """A short hash of the given parts and of the Python and platform that build with them."""
    # base_prefix is in it because a virtual environment dies with the Python it was made from.
    where = [LAYOUT, sys.version, sys.base_prefix, sys.platform, platform.machine()]
    text = json.dumps([where, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_complete(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, calling `build(folder)` first unless an earlier call finished it."""
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{folder.name}.lock"):
        if not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                raise HostError(f"The unfinished set-up in {folder} cannot be removed; delete it and try again.")
            folder.mkdir()
            build(folder)
            _mark_complete(folder)
    return folder


def _mark_complete(folder: Path) -> None:
    unfinished = folder / f"{MARKER}.tmp"
    unfinished.write_text(json.dumps({"built": time.strftime("%Y-%m-%dT%H:%M:%S")}), encoding="utf-8")
    os.replace(unfinished, folder / MARKER)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an operating-system lock, which a killed process releases by itself."""
    with open(path, "a+b") as handle:
        told = False
        while not try_lock(handle):
            if not told:
                print("Another set-up of the same host is running; waiting for it ...", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.5)
        yield


def try_lock(handle) -> bool:
    """Takes the operating system's lock of an open file, which lasts until it is closed; False if another has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
