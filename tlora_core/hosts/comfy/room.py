"""Checks before the first step that the disks can store what a training writes."""

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...errors import TLoRAError

# Errors that do not depend on the file's name.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
LORAS_ADVICE = "choose another folder with file_name"
RUNS_ADVICE = "start ComfyUI with another --output-directory"


@dataclass(frozen=True)
class Need:
    """A training will write `size` bytes of `what` to the existing `folder`. advice: what to do, apart from freeing
    space."""

    folder: Path
    size: int
    what: str
    advice: str


def refusal(folder: Path, error: OSError, advice: str) -> TLoRAError:
    """The error for a folder that cannot be written to."""
    return TLoRAError(
        f'The folder "{folder}" cannot be written to ({error.strerror or error}); make it writable, or {advice}.'
    )


def require_writable(folder: Path, advice: str) -> None:
    """Writes a temporary file to the existing `folder` and removes it; permissions, mounts and quotas tell less. Raises
    TLoRAError if that fails."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tlora-", suffix=".tmp") as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise refusal(folder, error, advice) from error


def require_room(needs: list[Need]) -> None:
    """Raises TLoRAError, with the folder, the space needed and the space free, if a disk lacks room for all that goes
    there."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        if need.size:
            disks.setdefault(os.stat(need.folder).st_dev, []).append(need)
    for parts in disks.values():
        total, _, free = shutil.disk_usage(parts[0].folder)
        size = sum(part.size for part in parts)
        if total and size > free:  # some network disks report a size of 0
            raise TLoRAError(
                f'The disk of "{parts[0].folder}" has {_in_words(free)} free, but the training needs {_in_words(size)} '
                f"there for {' and '.join(part.what for part in parts)}; free some space, or "
                f"{', or '.join(part.advice for part in parts)}."
            )


def _in_words(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
