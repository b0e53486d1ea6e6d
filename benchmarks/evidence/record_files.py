"""The files of records: JSON lines, appended to FOLDER/NAME.jsonl, and packed into FOLDER/NAME.jsonl.xz beside it.

Readers name a file NAME.jsonl; both parts are read, the packed one first.
"""

import json
import lzma
from pathlib import Path

from tlora_core.files.atomic import write_whole


def files_of(folder: Path, scale: str = "") -> list[Path]:
    """The files of one scale, or of all scales, sorted by name; each may be plain, packed or both."""
    packed = {path.with_suffix("") for path in folder.glob(f"{scale}*.jsonl.xz")}
    return sorted(packed.union(folder.glob(f"{scale}*.jsonl")))


def read(*files: Path) -> list[dict]:
    """The records of files, without a last line that a killed run left incomplete."""
    records = []
    for file in files:
        lines = _text(file).splitlines()
        for i, line in enumerate(lines):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                if i != len(lines) - 1:
                    raise
    return records


def mend(file: Path) -> None:
    """Removes a last line that a killed run left incomplete."""
    if file.exists() and (text := file.read_text()) and not text.endswith("\n"):
        file.write_text(text[: text.rfind("\n") + 1])


def pack(folder: Path) -> None:
    """Moves the records of all plain files into the packed files beside them. No run may append to them meanwhile."""
    for file in sorted(folder.glob("*.jsonl")):
        mend(file)
        packed = lzma.compress(_text(file).encode(), preset=9 | lzma.PRESET_EXTREME)
        write_whole(_packed(file), lambda path, packed=packed: path.write_bytes(packed))
        file.unlink()


def _packed(file):
    return file.with_name(f"{file.name}.xz")


def _text(file):
    packed = _packed(file)
    before = lzma.decompress(packed.read_bytes()).decode() if packed.exists() else ""
    return before + (file.read_text() if file.exists() else "")
