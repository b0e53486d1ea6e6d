"""Reading files that may be damaged or hostile: tensors and text come out, or one sentence about what is wrong.

Nothing in a file is executed. A safetensors file holds no code; a torch file is a pickle, which torch unpickles in its
weights-only mode, and only if its tensors lie in it uncompressed and apart, so that a small file cannot ask for a lot
of memory.
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

# Bytes. Real headers have a few; as Python objects a hostile one takes up to 25 times its size.
MAX_HEADER = 25_000_000
MAX_TEXT = 200  # characters of a text that are shown
PHRASE_KEY = "modelspec.trigger_phrase"  # of the metadata: the words that stand for the subject in prompts


@dataclass(frozen=True)
class Contents:
    """tensors: by key, on the CPU, as stored. metadata: of the safetensors header. others: keys whose value is no
    tensor."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()


def read_contents(path: Path) -> Contents:
    """Everything in a safetensors file or a file of `torch.save`, told apart by what is in it.

    Raises TLoRAError, without the file's name, when it is missing, damaged, or neither of the two.
    """
    _require_file(path)
    try:
        return _read_torch(path) if _is_zip(path) else _read_safetensors(path)
    except (OSError, SafetensorError) as error:
        raise TLoRAError(
            f"it cannot be read ({one_line(error)}); check that it is complete, or get it again."
        ) from error


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a safetensors file, and none of any other file. Raises as read_contents does."""
    _require_file(path)
    metadata = {} if _is_zip(path) else check_header(path).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def check_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file. Raises TLoRAError for a file of another kind, and for a header that names a
    tensor
    twice: readers differ in which of the two they take."""
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
        raise TLoRAError("it cannot be read as a safetensors file (its header is no table); get it again.")
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
        raise ValueError("a key stands in it twice")
    return table


def _read_safetensors(path: Path) -> Contents:
    check_header(path)
    with safe_open(path, framework="pt") as opened:
        # Copies: the memory-mapped originals would keep the file from being replaced on Windows.
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}
        return Contents(tensors, opened.metadata() or {})


def _read_torch(path: Path) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise TLoRAError("it is a compressed archive, not a file of torch.save; unpack it first.")
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise TLoRAError("it is an archive whose parts overlap, not a file of torch.save; get it again.")
        # Not the path: PyTorch 2.13 takes a file that is named *.safetensors for one, whatever is in it.
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (TLoRAError, OSError):
        raise
    except Exception as error:  # damaged pickles end in nearly any exception
        raise TLoRAError(
            "it is a torch file that holds more than tensors, or is damaged, and was not opened; "
            "use a safetensors file, or get it again."
        ) from error
    if not isinstance(content, dict):
        raise TLoRAError("it is a torch file without a table of tensors; choose the file with the LoRA's weights.")
    size = path.stat().st_size
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and _is_plain(value, size)}
    others = tuple(str(key)[:200] for key in content if key not in tensors)
    return Contents({key: value.detach() for key, value in tensors.items()}, others=others)


def _is_plain(value: Any, size: int) -> bool:
    """A dense tensor no larger than its file: strides of 0 make tensors of any size from a few bytes."""
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_quantized
        or value.device.type != "cpu"
    ):
        return False
    return value.is_contiguous() and value.nbytes <= size


def printable(text: str) -> str:
    """`text` with what cannot be shown in a line, as names from a damaged file have it, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_of(value: object) -> str:
    """A value of a file's metadata as one line of text, cut short; empty for what is none."""
    return "".join(c for c in value[:MAX_TEXT] if c.isprintable()) if isinstance(value, str) else ""


def check_line(name: str, value: object) -> None:
    """Refuses what is no line of text, or holds characters that cannot be shown, such as zero-width ones pasted with a
    word."""
    if not isinstance(value, str):
        raise TLoRAError(f"{name} is {value!r}; it must be one line of text.")
    hidden = dict.fromkeys(printable(c) for c in value if not c.isprintable())
    if hidden:
        raise TLoRAError(f"{name} is {value!r}; it must be one line of text, without {' '.join(hidden)}.")


def one_line(error: Exception) -> str:
    """An exception's words on one line, cut short."""
    return " ".join(str(error).split())[:200]
