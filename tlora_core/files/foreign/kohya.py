"""The schedule of a T-LoRA in the metadata of trainers built on kohya's scripts: `ss_network_module`,
`ss_network_args`, `ss_*`.

Each of them has its own names and its own r(t); here is what they do, as far as their code is public. With p from 0 at
    pure noise to 1: power       floor((r - r_min) p^a) + r_min, p = 1 - t / T     forks of sd-scripts for Anima;
    min_rank and alpha_rank_scale boundary    the same above a noise level, all ranks below it   a fork of musubi-tuner
    for Wan linear      round((r - r_min) p) + r_min                       forks of sd-scripts with networks.tlora;
    cosine is their default cosine      the same of (1 - cos(pi p)) / 2
All but the first are free curves in our terms, and equal to theirs at every noise level.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import TLoRAError
from ...method.schedule import RankSchedule
from ..untrusted import text_of

_MODULE = re.compile(r"(^|_)t_?lora")  # of the last part: networks.tlora_flux, networks.lora_tlora_anima
_ROUNDING = ("tlora", "tlora_anima", "tlora_flux")  # modules whose schedule is linear or cosine
_MIN_RANK = ("tlora_min_rank", "min_rank")
_EXPONENT = ("tlora_alpha_rank_scale", "alpha_rank_scale", "tlora_alpha")
_SHAPE, _BOUNDARY, _MAXIMUM = "tlora_rank_schedule", "tlora_boundary_timestep", "tlora_max_timestep"
_USUAL_MIN_RANK, _USUAL_BOUNDARY = 1, 875  # of all these trainers; of the one that has it


class _Told:
    """What the metadata says, and what of it was asked for. Arguments come before the `ss_` keys of the same names."""

    def __init__(self, metadata: Mapping[str, str]):
        self.module = text_of(metadata.get("ss_network_module")).lower().rpartition(".")[2]
        told = {key.removeprefix("ss_"): value for key, value in metadata.items() if key.startswith("ss_")}
        self.values = {**told, **_arguments(metadata)}
        self.used: list[str] = []

    def get(self, *names: str) -> str:
        """The first of these that is there, as text; else ""."""
        for name in names:
            text = text_of(str(self.values.get(name, "")))
            if text not in ("", "None", "null"):
                self.used.append(f"{name} {text}")
                return text
        return ""

    def number(self, *names: str, default: float) -> float:
        """Raises ValueError where it is none, or is not finite."""
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


def told_schedule(metadata: Mapping[str, str], rank: int) -> tuple[RankSchedule | None, str]:
    """(the schedule for `rank` that a file's metadata tells, a note for the user); (None, "") where it tells of no
    T-LoRA, and (None, note) where what it tells cannot be read."""
    told = _Told(metadata)
    if not told.is_tlora:
        return None, ""
    try:
        schedule, remark = _schedule(told, rank)
    except (ValueError, OverflowError, TLoRAError):
        return None, (
            f"Its metadata tells of a T-LoRA, but not a schedule that can be read ({', '.join(told.used)}); set "
            f"min_rank "
            "to the one it was trained with."
        )
    where = (
        ", ".join(told.used)
        or f"only its network_module, {told.module}; min_rank {_USUAL_MIN_RANK} is what its trainer takes then"
    )
    return schedule, (
        f"The schedule is what its trainer wrote into the file ({where}). Some of these trainers draw without the "
        f"mask: "
        f"for that set min_rank to the rank, {rank}.{remark}"
    )


def _schedule(told: _Told, rank: int) -> tuple[RankSchedule, str]:
    min_rank = int(told.number(*_MIN_RANK, default=_USUAL_MIN_RANK))
    if min_rank < 0:
        raise ValueError("a negative rank")
    min_rank = min(min_rank, rank)  # as they do
    exponent, boundary, shape = told.get(*_EXPONENT), told.get(_BOUNDARY), told.get(_SHAPE)
    if min_rank == rank or (exponent and float(exponent) == 0):
        return RankSchedule(rank, rank), ""
    if boundary or "wan" in told.module:
        level = min(max(float(boundary or _USUAL_BOUNDARY) / 1000, 0.0), 0.999)
        a = float(exponent or 1)
        return _curve(rank, min_rank, lambda p: level + (1 - level) * (1 - p ** (1 / a))), ""
    if shape or (told.module in _ROUNDING and not exponent):
        level_of = (lambda p: 1 - p) if shape == "linear" else (lambda p: 1 - math.acos(1 - 2 * p) / math.pi)
        remark = (
            " That trainer also makes the update r / r(t) times as large where only r(t) of its r ranks are on, which "
            "is not done "
            "here."
        )
        return _curve(rank, min_rank, level_of, rounded=True), remark
    maximum = told.number(_MAXIMUM, default=1)
    end, a = maximum if maximum <= 1 else maximum / 1000, float(exponent or 1)
    if end == 1:
        return RankSchedule(rank, min_rank, a), ""
    if not 0 < end < 1:
        raise ValueError("a T beyond the model's")
    return _curve(rank, min_rank, lambda p: end * (1 - p ** (1 / a))), ""


def _curve(rank: int, min_rank: int, level_of: Callable[[float], float], rounded: bool = False) -> RankSchedule:
    """A free curve of min_rank + (rank - min_rank) p, rounded down or to the nearest, where level_of(p) is the noise
    level of p: its points are where it comes to a whole number, so that the lines between them round down to the same
        ranks."""
    half, spread = 0.5 if rounded else 0.0, rank - min_rank
    last = min_rank + 1 if rounded else min_rank
    points = {0.0: rank}
    for active in range(rank, last - 1, -1):
        points.setdefault(level_of((active - min_rank - half) / spread), active)
    points.setdefault(1.0, min_rank)
    return RankSchedule(rank, min_rank, 1.0, _without_those_on_lines(list(points.items())))


def _without_those_on_lines(points: list[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
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
