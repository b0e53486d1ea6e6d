"""Writes files atomically, among them safetensors files with the hash of their tensors."""

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TLoRAError

EXTENSION = ".safetensors"
HASH_TO_COME = "tlora-hash-".ljust(64, "0")  # placeholder until the tensors are written


def stem_of(path: Path) -> str:
    """The file's name without ".safetensors". Any other dot, for example in "dog_v1.5", is part of the name."""
    return path.stem if path.suffix.lower() == EXTENSION else path.name


def numbered(path: Path, number: int) -> Path:
    """The path of part `number` of several: "dog_v1.5part2.safetensors"."""
    return path.with_name(f"{stem_of(path)}part{number}{path.name[len(stem_of(path)) :]}")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Makes a file by `write(temporary path)`. An existing file is replaced atomically.

    Raises TLoRAError when the file cannot be written.
    """
    # In the same folder, since a rename is atomic only within one file system; with another suffix, so that no file
    # picker lists it.
    temporary = path.with_name(f".tlora-{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, _usual_mode(temporary))
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        raise TLoRAError(
            f'"{path.name}" was not saved ({error}); free some disk space or choose another folder. '
            "A file of that name is as it was."
        ) from error
    finally:
        _remove(temporary)


def _usual_mode(beside: Path) -> int:
    """The permissions of a new file in this folder. safetensors makes files that only their owner can read."""
    # Reading the umask in Python means setting it, which affects other threads; a probe file shows it safely.
    probe = beside.with_name(f".tlora-{uuid.uuid4().hex}.tmp")
    try:
        probe.touch(exist_ok=False)
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        _remove(probe)


def _remove(path: Path) -> None:
    """Removes the file if it exists and can be removed. On a read-only disk even removing a missing file fails, and
    that error would hide the first one."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically; the hash of its tensors replaces HASH_TO_COME in the metadata.

    Raises TLoRAError when the file cannot be written.
    """

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, dict(metadata))
        _finish_header(temporary)

    write_whole(path, write)


def _finish_header(path: Path) -> None:
    """Puts the SHA-256 of the tensors' bytes, the part of the file after its header, in place of HASH_TO_COME, and the
    metadata in order, so that equal T-LoRAs make equal files: safetensors writes it in a random one."""
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        # The hash is as long as the placeholder, so nothing moves.
        file.seek(8)
        file.write(_in_order(header.replace(HASH_TO_COME.encode(), digest.hexdigest().encode())))


def _in_order(header: bytes) -> bytes:
    """The header with sorted metadata, of the same length."""
    parts = json.loads(header)
    parts["__metadata__"] = dict(sorted(parts.get("__metadata__", {}).items()))
    ordered = json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()
    # JSON has several spellings of some letters; the tensors begin where the header says, so it must not grow.
    return ordered.ljust(len(header)) if len(ordered) <= len(header) else header
