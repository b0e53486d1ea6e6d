"""Reads files that may be damaged or hostile: returns tensors and text, or raises one sentence about the problem.

Nothing in a file is executed. A safetensors file holds no code. A torch file is a pickle, which torch unpickles in its
weights-only mode; its tensors must be uncompressed and must not overlap, so that a small file cannot claim much memory.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import TLoRAError

# Bytes. Real headers are far smaller; a hostile header takes up to 25 times its size as Python objects.
MAX_HEADER = 25_000_000
MAX_TEXT = 200  # characters shown of a text
PHRASE_KEY = "modelspec.trigger_phrase"  # metadata key: the words that stand for the subject in prompts


@dataclass(frozen=True)
class Contents:
    """tensors: by key, on the CPU, as stored. metadata: from the safetensors header. non_tensors: keys of other
    values."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    non_tensors: tuple[str, ...] = ()


def read_contents(path: Path) -> Contents:
    """Everything in a safetensors file or a file of `torch.save`; the content decides which of them it is.

    Raises TLoRAError, without the file's name, when the file is missing, damaged, or neither kind.
    """
    _require_file(path)
    try:
        return _read_torch(path) if _is_zip(path) else _read_safetensors(path)
    except (OSError, SafetensorError) as error:
        raise TLoRAError(
            f"it cannot be read ({one_line(error)}); check that it is complete, or get it again."
        ) from error


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a safetensors file; empty for a file of `torch.save`. Raises as read_contents does."""
    _require_file(path)
    metadata = {} if _is_zip(path) else check_header(path).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def check_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file. Raises TLoRAError for other kinds of files, and for a header that names a
    tensor twice, since readers differ in the one they use."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
            raise TLoRAError(
                f"it cannot be read as a safetensors file (its header would have {length} bytes); get it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise TLoRAError(f"it cannot be read as a safetensors file ({one_line(error)}); get it again.") from error
    if not isinstance(header, dict):
        raise TLoRAError("it cannot be read as a safetensors file (its header is not a table); get it again.")
    return header


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise TLoRAError("there is no such file; choose one from the list or check the folder.")


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("it repeats a key")
    return table


def _read_safetensors(path: Path) -> Contents:
    check_header(path)
    with safe_open(path, framework="pt") as opened:
        # Copies: on Windows, a memory-mapped file cannot be replaced.
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}
        return Contents(tensors, opened.metadata() or {})


def _read_torch(path: Path) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise TLoRAError("it is a compressed archive, not a file of torch.save; unpack it first.")
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise TLoRAError("it is an archive with overlapping parts, not a file of torch.save; get it again.")
        # Not the path: PyTorch 2.13 reads a file that is named *.safetensors as one, whatever it contains.
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (TLoRAError, OSError):
        raise
    except Exception as error:  # damaged pickles raise nearly any exception
        raise TLoRAError(
            "it is a torch file that holds more than tensors, or is damaged, and was not opened; use a safetensors "
            "file, or get it again."
        ) from error
    if not isinstance(content, dict):
        raise TLoRAError("it is a torch file without a table of tensors; choose the file with the LoRA's weights.")
    size = path.stat().st_size
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and _is_plain(value, size)}
    non_tensors = tuple(str(key)[:200] for key in content if key not in tensors)
    return Contents({key: value.detach() for key, value in tensors.items()}, non_tensors=non_tensors)


def _is_plain(value: Any, size: int) -> bool:
    """Whether it is a dense tensor no larger than its file; strides of 0 make a tensor of any size from a few bytes."""
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_quantized
        or value.device.type != "cpu"
    ):
        return False
    return value.is_contiguous() and value.nbytes <= size


def printable(text: str) -> str:
    """`text` with its unprintable characters as escapes; names in a damaged file may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_of(value: object) -> str:
    """A text of a file's metadata as one line, truncated to MAX_TEXT; empty for a value of another type."""
    return "".join(c for c in value[:MAX_TEXT] if c.isprintable()) if isinstance(value, str) else ""


def check_line(name: str, value: object) -> None:
    """Raises TLoRAError unless value is one line of printable text; pasted words may hold zero-width characters."""
    if not isinstance(value, str):
        raise TLoRAError(f"{name} is {value!r}; it must be one line of text.")
    hidden = dict.fromkeys(printable(c) for c in value if not c.isprintable())
    if hidden:
        raise TLoRAError(f"{name} is {value!r}; it must be one line of text, without {' '.join(hidden)}.")


def one_line(error: Exception) -> str:
    """An exception's message on one line, truncated to 200 characters."""
    return " ".join(str(error).split())[:200]
