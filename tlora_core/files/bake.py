"""Bakes a T-LoRA into plain LoRAs, for programs without timestep masks.

Each result is a TLoRAFile of method "lora" with a constant schedule. `training` keeps the T-LoRA's settings; its entry
"baked" records how the T-LoRA was baked. Components are kept or weighted, never recomputed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from ..errors import TLoRAError
from ..method.adapters import LowRank
from ..method.schedule import RankSchedule
from .atomic import numbered
from .export import fused
from .tlora_file import TLoRAFile


class PlainLoRA(NamedTuple):
    """A plain LoRA made of a T-LoRA. part: its number from 1, None where it is the only one. note: what to write behind
    its name, so that it is switched on at the right noise level."""

    tlora: TLoRAFile
    part: int | None = None
    note: str = ""

    def path(self, chosen: Path) -> Path:
        """Where it is saved: at the chosen path, a part with its number."""
        return chosen if self.part is None else numbered(chosen, self.part)


def bake(
    tlora: TLoRAFile,
    at: float | None = None,
    interval: tuple[float, float] | None = None,
    parts: int = 0,
) -> list[PlainLoRA]:
    """A T-LoRA as plain LoRAs: as it is at a noise level, its mean over an interval of them, or, with neither, as so
    many parts. Noise levels go from 1, pure noise, to 0.

    Raises TLoRAError as bake_at, bake_interval and split_steps do.
    """
    T = tlora.num_timesteps
    if at is not None:
        return [PlainLoRA(bake_at(tlora, at * T))]
    if interval is not None:
        return [PlainLoRA(bake_interval(tlora, *(level * T for level in interval)))]
    split = split_steps(tlora, parts)
    return [PlainLoRA(part, number, f": {when_on(tlora, t)}") for number, (part, t) in enumerate(split, 1)]


def bake_at(tlora: TLoRAFile, timestep: float) -> TLoRAFile:
    """The components that are on at timestep, 0 to T in the unit of the T-LoRA's noise domain, as a plain LoRA.

    Raises TLoRAError when the timestep is out of that range or no component is on.
    """
    T = tlora.num_timesteps
    _require_timestep("timestep", timestep, T)

    return _baked(tlora, lambda schedule: _on_at(schedule, timestep, T), {"mode": "timestep", "timestep": timestep})


def bake_interval(tlora: TLoRAFile, first: float, last: float) -> TLoRAFile:
    """The T-LoRA's mean over the timesteps between first and last, given in either order, as a plain LoRA.

    The weight of a component is the share of these timesteps at which it is on; all timesteps count equally. The mean
    is the constant update closest to the T-LoRA's in least squares. Raises TLoRAError as bake_at does.
    """
    T = tlora.num_timesteps
    for name, t in (("first", first), ("last", last)):
        _require_timestep(name, t, T)
    low, high = sorted((first, last))

    def weights(schedule: RankSchedule) -> list[float]:
        if low == high:
            return _on_at(schedule, low, T)
        # Rounded, since the time of a component that is on only at one end of the interval is exact only to the last
        # bits.
        return [
            round(sum(max(min(end, high) - max(start, low), 0.0) for start, end in spans) / (high - low), 12)
            for spans in spans_on(schedule, T)
        ]

    return _baked(tlora, weights, {"mode": "interval", "first": first, "last": last})


def split_steps(tlora: TLoRAFile, parts: int) -> list[tuple[TLoRAFile, float]]:
    """`parts` plain LoRAs, each with the largest timestep at which it is on. Together they make a staircase of r(t).

    If min_rank is above 0, the first part holds the components that are always on, and its timestep is T. The
    remaining components form groups of equal size, in the order in which they switch on as the noise falls. A group
    switches on at the median of its components' switch times, the best single time in least squares for components of
    equal size. With one component a group, the staircase is r(t) itself in layers of the file's full rank. Raises
    TLoRAError for an impossible number of parts.
    """
    schedule = tlora.schedule
    if not schedule.is_falling:
        raise TLoRAError(
            "tlora's curve rises with the noise somewhere, which parts cannot follow; bake it at one noise level."
        )
    always, switching = int(schedule.min_rank > 0), schedule.rank - schedule.min_rank
    least, most = always + int(switching > 0), always + switching
    if not isinstance(parts, int) or not least <= parts <= most:
        allowed = f"a whole number from {least} to {most}" if least < most else str(least)
        raise TLoRAError(
            f"parts is {parts}; set it to {allowed}, since of this T-LoRA's {schedule.rank} components "
            f"{schedule.min_rank} are always on and {switching} come on later."
        )
    return [_part(tlora, part, parts, always) for part in range(parts)]


Span = tuple[float, float]


@lru_cache
def spans_on(schedule: RankSchedule, num_timesteps: float) -> tuple[tuple[Span, ...], ...]:
    """For each component the spans of t in [0, T] in which it is on, T = num_timesteps.

    Bisects r(t), so that its formula exists only once. Between two points of a curve, r(t) is monotonic.
    """
    T = float(num_timesteps)
    bends = sorted({0.0, T, *(level * T for level, _ in schedule.points)})
    return tuple(
        tuple(span for ends in zip(bends, bends[1:]) if (span := _span_on(schedule, component, ends, T)))
        for component in range(schedule.rank)
    )


def _span_on(schedule: RankSchedule, component: int, ends: Span, T: float) -> Span | None:
    """The part of a monotonic span in which the component is on."""
    is_on = [schedule.active_rank(t, T) > component for t in ends]
    if is_on[0] == is_on[1]:
        return ends if is_on[0] else None
    on, off = ends if is_on[0] else reversed(ends)
    for _ in range(64):  # enough halvings to make the distance negligible beside T
        middle = (on + off) / 2
        on, off = (middle, off) if schedule.active_rank(middle, T) > component else (on, middle)
    return (ends[0], on) if is_on[0] else (on, ends[1])


def switch_times(schedule: RankSchedule, num_timesteps: float) -> tuple[float, ...]:
    """For each component of a falling schedule, the largest t at which it is on; it is on at every smaller t too."""
    return tuple(max((end for _, end in spans), default=0.0) for spans in spans_on(schedule, num_timesteps))


def when_on(tlora: TLoRAFile, timestep: float) -> str:
    """The setting for ComfyUI's Create Hook Keyframe that switches a LoRA on at timestep and leaves it on."""
    level = timestep / tlora.num_timesteps
    if level == 1:
        return "always on"
    if tlora.noise_domain == "discrete":
        # At 1 the host would switch it on only after the last step.
        return f"start_percent {min(1 - level, 0.999):.3f} (noise level {level:.3f})"
    return f"on from noise level {level:.3f} down; its start_percent depends on the shift of the model's schedule"


def save_all(files: Sequence[tuple[TLoRAFile, Path]], dtype: torch.dtype) -> None:
    """Saves each file at its path. An error or interrupt removes the new files; an existing file stays complete, old
    or replaced."""
    new = [path for _, path in files if not path.exists()]
    try:
        for file, path in files:
            file.save(path, dtype)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def _part(tlora: TLoRAFile, part: int, parts: int, always: int) -> tuple[TLoRAFile, float]:
    """One of split_steps' plain LoRAs and its timestep. always: 1 if the first part holds the always-on components."""
    groups, group = parts - always, part - always

    def members(schedule: RankSchedule) -> range:
        if group < 0:
            return range(schedule.min_rank)
        # Equal shares of a layer's switching components cover equal spans of time at any rank.
        switching = schedule.rank - schedule.min_rank
        return range(*(schedule.min_rank + switching * g // groups for g in (group, group + 1)))

    def weights(schedule: RankSchedule) -> list[float]:
        return [float(component in members(schedule)) for component in range(schedule.rank)]

    times = switch_times(tlora.schedule, tlora.num_timesteps)
    on_below = median(times[component] for component in members(tlora.schedule))
    what = {"mode": "steps", "part": part + 1, "parts": parts, "on_below": on_below}
    return _baked(tlora, weights, what), on_below


def _baked(tlora: TLoRAFile, weights: Callable[[RankSchedule], Sequence[float]], what: dict[str, Any]) -> TLoRAFile:
    """The T-LoRA with weighted components. weights: schedule of a layer -> a weight >= 0 for each component.
    Components of weight 0 are removed, and layers that have no others."""
    layers = {}
    for name, layer in tlora.layers.items():
        scale = (
            torch.tensor(weights(tlora.schedule_of(name)), dtype=torch.float64).repeat_interleave(layer.group).sqrt()
        )
        kept = scale > 0
        if kept.any():
            # The square root goes into each factor, so that both use the range of a half-precision format equally.
            scale = scale[kept].to(layer.up)
            layers[name] = LowRank(layer.up[:, kept] * scale, layer.down[kept] * scale[:, None])
    if not layers:
        raise TLoRAError(
            f"tlora has nothing on at the noise levels to bake (its min_rank is {tlora.schedule.min_rank}); "
            "choose lower noise levels."
        )
    schedule = tlora.schedule
    source = {"method": tlora.method, "rank": schedule.rank, "min_rank": schedule.min_rank, "alpha": schedule.alpha}
    training = {**tlora.training, "baked": {**what, "from": source}}
    baked = replace(tlora, layers=layers, method="lora", schedule=_constant(layers), training=training)
    # Plain LoRAs cannot name a part of a fused module, so parts become one update of the whole module.
    try:
        whole = fused(baked)
    except TLoRAError as error:
        raise TLoRAError(
            "tlora has updates for parts of a layer whose whole size is not known, so it cannot become a plain LoRA; "
            "use it with Apply T-LoRA."
        ) from error
    return replace(baked, layers=whole, schedule=_constant(whole), heights={})


def _on_at(schedule: RankSchedule, t: float, T: float) -> list[float]:
    """1 for each component that is on at t, 0 for the others."""
    active = schedule.active_rank(t, T)
    return [1.0] * active + [0.0] * (schedule.rank - active)


def _constant(layers: Mapping[str, LowRank]) -> RankSchedule:
    rank = max(layer.rank for layer in layers.values())
    return RankSchedule(rank, rank)


def _require_timestep(name: str, t: float, T: float) -> None:
    if not 0 <= t <= T:
        raise TLoRAError(f"{name} is {t:g}; set it to a number from 0 to {T:g}, this T-LoRA's noisiest timestep.")
