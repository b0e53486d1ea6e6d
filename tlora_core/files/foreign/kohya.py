"""The schedule of a T-LoRA in the metadata of trainers built on kohya's scripts: `ss_network_module`,
`ss_network_args`, `ss_*`.

Each trainer has its own names and its own r(t). Formulas in public code, with p = 0 at pure noise and 1 at no noise:

    power     floor((r - r_min) p^a) + r_min, p = 1 - t / T   forks of sd-scripts for Anima; min_rank, alpha_rank_scale
    boundary  power above a noise level, all ranks below it   a fork of musubi-tuner for Wan
    linear    round((r - r_min) p) + r_min                    forks of sd-scripts with networks.tlora
    cosine    linear, with (1 - cos(pi p)) / 2 for p          the default of these forks

All but the first become free curves here, equal to theirs at every noise level.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import TLoRAError
from ...method.schedule import RankSchedule
from ..untrusted import text_of

_MODULE = re.compile(r"(^|_)t_?lora")  # matches the last part of networks.tlora_flux, networks.lora_tlora_anima
_ROUNDING = ("tlora", "tlora_anima", "tlora_flux")  # modules whose schedule is linear or cosine
_MIN_RANK = ("tlora_min_rank", "min_rank")
_EXPONENT = ("tlora_alpha_rank_scale", "alpha_rank_scale", "tlora_alpha")
_SHAPE, _BOUNDARY, _MAXIMUM = "tlora_rank_schedule", "tlora_boundary_timestep", "tlora_max_timestep"
_DEFAULT_MIN_RANK, _DEFAULT_BOUNDARY = 1, 875  # of all these trainers; of the one with a boundary


class _Statements:
    """The metadata's values, and a record of those in use. Network arguments override `ss_` keys of the same name."""

    def __init__(self, metadata: Mapping[str, str]):
        self.module = text_of(metadata.get("ss_network_module")).lower().rpartition(".")[2]
        keys = {key.removeprefix("ss_"): value for key, value in metadata.items() if key.startswith("ss_")}
        self.values = {**keys, **_arguments(metadata)}
        self.used: list[str] = []

    def get(self, *names: str) -> str:
        """The first of these values that exists, as text; else ""."""
        for name in names:
            text = text_of(str(self.values.get(name, "")))
            if text not in ("", "None", "null"):
                self.used.append(f"{name} {text}")
                return text
        return ""

    def number(self, *names: str, default: float) -> float:
        """The same as a number. Raises ValueError when it is not a finite number."""
        value = float(self.get(*names) or default)
        if not math.isfinite(value):
            raise ValueError(f"{names[0]} is {value}")
        return value

    @property
    def is_tlora(self) -> bool:
        masked = str(self.values.get("use_timestep_mask", "")).lower() in ("true", "1", "yes", "on")
        return bool(
            _MODULE.search(self.module)
            or "tlora_min_rank" in self.values
            or masked
            or self.values.get("adapter") == "tlora"
        )


def stated_schedule(metadata: Mapping[str, str], rank: int) -> tuple[RankSchedule | None, str]:
    """(the schedule for `rank` stated in a file's metadata, a note for the user); (None, "") if the metadata
    describes no T-LoRA, and (None, note) if its schedule cannot be read."""
    stated = _Statements(metadata)
    if not stated.is_tlora:
        return None, ""
    try:
        schedule, remark = _schedule(stated, rank)
    except (ValueError, OverflowError, TLoRAError):
        return None, (
            f"Its metadata describes a T-LoRA, but the schedule cannot be read ({', '.join(stated.used)}); set "
            "min_rank to the value of its training."
        )
    where = (
        ", ".join(stated.used)
        or f"only its network_module, {stated.module}; its trainer's default is min_rank {_DEFAULT_MIN_RANK}"
    )
    return schedule, (
        f"The schedule is from its trainer's metadata ({where}). Some of these trainers sample without the mask: to do "
        f"the same, set min_rank to the rank, {rank}.{remark}"
    )


def _schedule(stated: _Statements, rank: int) -> tuple[RankSchedule, str]:
    min_rank = int(stated.number(*_MIN_RANK, default=_DEFAULT_MIN_RANK))
    if min_rank < 0:
        raise ValueError("a negative rank")
    min_rank = min(min_rank, rank)  # like these trainers
    exponent, boundary, shape = stated.get(*_EXPONENT), stated.get(_BOUNDARY), stated.get(_SHAPE)
    if min_rank == rank or (exponent and float(exponent) == 0):
        return RankSchedule(rank, rank), ""
    if boundary or "wan" in stated.module:
        level = min(max(float(boundary or _DEFAULT_BOUNDARY) / 1000, 0.0), 0.999)
        a = float(exponent or 1)
        return _curve(rank, min_rank, lambda p: level + (1 - level) * (1 - p ** (1 / a))), ""
    if shape or (stated.module in _ROUNDING and not exponent):
        level_of = (lambda p: 1 - p) if shape == "linear" else (lambda p: 1 - math.acos(1 - 2 * p) / math.pi)
        remark = (
            " That trainer also scales the update by r / r(t) while r(t) of its r ranks are on; this is not done here."
        )
        return _curve(rank, min_rank, level_of, rounded=True), remark
    maximum = stated.number(_MAXIMUM, default=1)
    end, a = maximum if maximum <= 1 else maximum / 1000, float(exponent or 1)
    if end == 1:
        return RankSchedule(rank, min_rank, a), ""
    if not 0 < end < 1:
        raise ValueError("a T beyond the model's")
    return _curve(rank, min_rank, lambda p: end * (1 - p ** (1 / a))), ""


def _curve(rank: int, min_rank: int, level_of: Callable[[float], float], rounded: bool = False) -> RankSchedule:
    """A free curve of min_rank + (rank - min_rank) p, rounded down or to the nearest integer. level_of(p): the noise
    level of p. The curve's points are where the rank reaches an integer, so the lines between them round down to the
    same ranks."""
    half, spread = 0.5 if rounded else 0.0, rank - min_rank
    last = min_rank + 1 if rounded else min_rank
    points = {0.0: rank}
    for active in range(rank, last - 1, -1):
        points.setdefault(level_of((active - min_rank - half) / spread), active)
    points.setdefault(1.0, min_rank)
    return RankSchedule(rank, min_rank, 1.0, _simplified(list(points.items())))


def _simplified(points: list[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    """The points without those on a line between their neighbours."""
    kept = points[:1]
    for (level, active), (right, low) in zip(points[1:], points[2:]):
        left, high = kept[-1]
        if abs(high + (low - high) * (level - left) / (right - left) - active) > 1e-10:
            kept.append((level, active))
    return (*kept, points[-1])


def _arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get("ss_network_args")
    try:
        arguments = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}
