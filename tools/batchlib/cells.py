"""From a cell of a table to the value of a workflow's input, by what the node says about it."""

from __future__ import annotations

import json
import math
from typing import Any

from hostlib.errors import HostError
from hostlib.overrides import resolve
from hostlib.widgets import GROUPS, UPLOAD_OPTIONS, WIDGET_TYPES

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_cell(prompt: dict, column: str, value: Any, object_info: dict, is_file: bool) -> tuple[Any, bool]:
    """The value for the input that `column` names, and whether it is a file to give to ComfyUI. is_file: whether the
    cell names a file on the user's machine. Raises HostError."""
    node_id, name = resolve(prompt, column, object_info, "it names no input")
    groups = object_info.get(prompt[node_id]["class_type"], {}).get("input", {})
    spec = next((groups[group][name] for group in GROUPS if name in (groups.get(group) or {})), None)
    if spec is None:  # of a dynamic combo's branch
        return _guessed(value), False
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list):
        kind, options = "COMBO", {**options, "options": kind}
    if any(options.get(option) for option in UPLOAD_OPTIONS):
        return _file(value, options.get("options") or [], is_file)
    if kind not in WIDGET_TYPES and isinstance(value, str | int | float) and not options.get("widgetType"):
        raise HostError(f"it is a connection of the kind {kind}; only an input with a value can be a column.")
    return _READERS.get(kind, lambda given, _: _guessed(given))(value, options), False


def _file(value: Any, listed: list, is_file: bool) -> tuple[Any, bool]:
    if not is_file and value not in listed:
        raise HostError(f'there is no file "{value}", neither beside the table nor in ComfyUI\'s input folder.')
    return value, is_file


def _whole(value: Any, options: dict) -> int:
    if isinstance(value, float) and value != int(value) or isinstance(value, bool):
        raise HostError(f"it is {value!r}; give a whole number.")
    try:
        return _within(int(value), options)
    except (TypeError, ValueError) as error:
        raise HostError(f"it is {value!r}; give a whole number.") from error


def _number(value: Any, options: dict) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise HostError(f"it is {value!r}; give a number.") from error
    if not math.isfinite(number) or isinstance(value, bool):
        raise HostError(f"it is {value!r}; give a number.")
    return _within(number, options)


def _within(number: Any, options: dict) -> Any:
    for name, wrong, word in (("min", lambda a, b: a < b, "least"), ("max", lambda a, b: a > b, "most")):
        if name in options and wrong(number, options[name]):
            raise HostError(f"it is {number}; give {options[name]} at {word}.")
    return number


def _truth(value: Any, _: dict) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise HostError(f"it is {value!r}; give true or false.")
    return text in _TRUE


def _choice(value: Any, options: dict) -> Any:
    choices = options.get("options")
    if not choices:  # loaded from elsewhere by the page
        return value
    found = [choice for choice in choices if str(choice) == str(value)]
    if not found:
        shown = ", ".join(map(str, choices[:20])) + (" and more" if len(choices) > 20 else "")
        raise HostError(f'it is "{value}"; choose one of {shown}.')
    return found[0]


def _guessed(value: Any) -> Any:
    """JSON where it can be, and a plain text otherwise, as with --set."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


_READERS = {
    "INT": _whole,
    "FLOAT": _number,
    "BOOLEAN": _truth,
    "COMBO": _choice,
    "STRING": lambda value, _: str(value) if not isinstance(value, list) else "\n".join(value),
}
