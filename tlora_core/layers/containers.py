"""The tensors in what a module is called with or returns: nested containers and dataclasses."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers, in order."""
    found: list[Tensor] = []
    _walk(value, found.append)
    return found


def with_tensors(value: Any, tensors: Iterable[Tensor]) -> Any:
    """A copy of `value`, in new containers, with its tensors replaced in the order of `tensors_in`."""
    following = iter(tensors)
    return _walk(value, lambda _: next(following))


def _walk(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _walk(v, change) for key, v in value.items()}
    if isinstance(value, tuple | list):
        new = [_walk(v, change) for v in value]
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _walk(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value
