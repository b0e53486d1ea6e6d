"""The settings that the reference's trainer records in `logs/hparams.yml` beside its `checkpoint-*` folders."""

import re
from pathlib import Path

from ...errors import TLoRAError

MAX_BYTES = 1_000_000
_LINE = re.compile(r"^(\w+):(.*)$", re.MULTILINE)


def find_hparams(weights: Path) -> Path | None:
    """The settings file of run/checkpoint-100/pytorch_lora_weights.safetensors, run/logs/hparams.yml; None without."""
    for folder in list(weights.absolute().parents)[:2]:
        found = folder / "logs" / "hparams.yml"
        if found.is_file():
            return found
    return None


def read_hparams(path: Path) -> dict[str, str]:
    """The settings as text. The file is a flat table of "name: value" lines; other YAML syntax is ignored."""
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
    """A whole number from the settings. Raises TLoRAError for any other value."""
    value = settings.get(name, "")
    if value in ("", "null", "~", "None"):
        return default
    if not re.fullmatch(r"\d{1,9}", value):
        raise TLoRAError(
            f"{name} in the hparams.yml beside it is {value[:50]!r}, not a whole number; correct it or move it away."
        )
    return int(value)


def real(settings: dict[str, str], name: str, default: float) -> float:
    """A number from the settings. Raises TLoRAError for any other value."""
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
    """True or false from the settings. Raises TLoRAError for any other value."""
    value = settings.get(name, "")
    if value in ("", "null", "~", "None"):
        return default
    if value.lower() not in ("true", "false"):
        raise TLoRAError(
            f"{name} in the hparams.yml beside it is {value[:50]!r}, not true or false; correct it or move it away."
        )
    return value.lower() == "true"
