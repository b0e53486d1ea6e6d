"""The reference trainer's record of its settings, `logs/hparams.yml` beside the checkpoints' folders."""

import re
from pathlib import Path

from ...errors import TLoRAError

MAX_BYTES = 1_000_000
_LINE = re.compile(r"^(\w+):(.*)$", re.MULTILINE)


def find_hparams(checkpoint: Path) -> Path | None:
    """The file that belongs to run/checkpoint-100/pytorch_lora_weights.safetensors, if it is there:
    run/logs/hparams.yml."""
    for folder in list(checkpoint.absolute().parents)[:2]:
        found = folder / "logs" / "hparams.yml"
        if found.is_file():
            return found
    return None


def read_hparams(path: Path) -> dict[str, str]:
    """Its settings as text. It is a flat table, one "name: value" a line; YAML's other forms are left alone."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TLoRAError("the hparams.yml beside it is not the reference trainer's (too large); move it away.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TLoRAError("the hparams.yml beside it cannot be read; move it away or get it again.") from error
    return {name: _unquoted(value.strip(" \t")) for name, value in _LINE.findall(text)}


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == "'":
        return value[1:-1].replace("''", "'")
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] == '"' else value


def whole(settings: dict[str, str], name: str, default: int | None) -> int | None:
    """A setting that is a whole number. Raises TLoRAError when it is something else."""
    value = settings.get(name, "")
    if value in ("", "null", "~", "None"):
        return default
    if not re.fullmatch(r"\d{1,9}", value):
        raise TLoRAError(
            f"{name} in the hparams.yml beside it is {value[:50]!r}, not a whole number; correct it or move it away."
        )
    return int(value)


def real(settings: dict[str, str], name: str, default: float) -> float:
    """A setting that is a number. Raises TLoRAError when it is something else."""
    value = settings.get(name, "")
    if value in ("", "null", "~", "None"):
        return default
    try:
        return float(value)
    except ValueError as error:
        raise TLoRAError(
            f"{name} in the hparams.yml beside it is {value[:50]!r}, not a number; correct it or move it away."
        ) from error


def flag(settings: dict[str, str], name: str, default: bool) -> bool:
    """A setting that is true or false. Raises TLoRAError when it is something else."""
    value = settings.get(name, "")
    if value in ("", "null", "~", "None"):
        return default
    if value.lower() not in ("true", "false"):
        raise TLoRAError(
            f"{name} in the hparams.yml beside it is {value[:50]!r}, not true or false; correct it or move it away."
        )
    return value.lower() == "true"
