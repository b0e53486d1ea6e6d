"""The rank schedule r(t): the number of active components of an adapter at a timestep.

This is the only copy of the formula; training, sampling and plots all use it.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import LongTensor, Tensor

from ..errors import TLoRAError


@dataclass(frozen=True)
class RankSchedule:
    """r(t) = floor((r - r_min) * ((T - t) / T)^alpha) + r_min (section 3.1 of the T-LoRA paper, where alpha = 1).

    rank: r, the number of components at t = 0, an integer of at least 1.
    min_rank: r_min, the number at t = T, from 0 to rank. If it equals rank, the schedule is constant, as in plain LoRA
        and Ortho-LoRA.
    alpha: exponent, above 0. Above 1, the components switch off sooner as the noise grows.
    points: a free curve instead of the formula: at least two points (t / T, rank), with t / T rising in [0, 1]. Between
        points, ranks are interpolated linearly and rounded down; beyond them, the nearest point's rank holds. min_rank
        must be the smallest of their ranks and alpha 1.

    Raises TLoRAError when a field is out of its range.
    """

    rank: int
    min_rank: int
    alpha: float = 1.0
    points: tuple[tuple[float, int], ...] = ()

    @classmethod
    def from_text(cls, rank: int, min_rank: int, alpha: float, curve: str) -> "RankSchedule":
        """The schedule by the formula, or by the points of `curve` unless empty: "0:64, 0.5:48, 1:32", with t / T
        before each colon."""
        if not curve.strip():
            return cls(rank, min_rank, alpha)
        try:
            pairs = [point.split(":") for point in curve.replace(";", ",").split(",") if point.strip()]
            points = tuple((float(level), int(active)) for level, active in pairs)
            min_rank = min(active for _, active in points)  # raises ValueError too without any point
        except ValueError as error:
            raise TLoRAError(
                f'curve is "{curve}"; write points as noise level:rank, for example "0:64, 0.5:48, 1:32".'
            ) from error
        return cls(rank, min_rank, 1.0, points)

    def __post_init__(self) -> None:
        if self.points:
            self._check_points()
        _require_whole("rank", self.rank)
        _require_whole("min_rank", self.min_rank)
        if self.rank < 1:
            raise TLoRAError(f"rank is {self.rank}; set it to 1 or more.")
        if not 0 <= self.min_rank <= self.rank:
            raise TLoRAError(
                f"min_rank is {self.min_rank}; set it to a whole number from 0 to the rank, which is {self.rank}."
            )
        is_number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not is_number or not 0 < self.alpha <= sys.float_info.max:
            raise TLoRAError(f"alpha is {self.alpha!r}; set it to a finite number above 0 (the paper uses 1).")

    def _check_points(self) -> None:
        levels = [level for level, _ in self.points]
        if len(levels) < 2 or levels != sorted(set(levels)) or not 0 <= levels[0] <= levels[-1] <= 1:
            raise TLoRAError(
                f"curve has the noise levels {', '.join(f'{level:g}' for level in levels)}; give at least two, "
                "rising, from 0 (clean) to 1 (pure noise)."
            )
        for _, active in self.points:
            _require_whole("A rank of the curve", active)
            if not 0 <= active <= self.rank:
                raise TLoRAError(f"curve has the rank {active}; use ranks from 0 to the rank, which is {self.rank}.")
        if self.min_rank != min(active for _, active in self.points) or self.alpha != 1:
            raise TLoRAError(
                f"min_rank is {self.min_rank} and alpha {self.alpha}; for a curve, set min_rank to its smallest rank "
                "and alpha to 1."
            )

    @property
    def is_constant(self) -> bool:
        """True if every timestep has the full rank."""
        return self.min_rank == self.rank

    @property
    def is_falling(self) -> bool:
        """True if a component that is on at one noise level is on at every lower level."""
        ranks = [active for _, active in self.points]
        return ranks == sorted(ranks, reverse=True)

    def __str__(self) -> str:
        if not self.points:
            return f"rank {self.rank}, min_rank {self.min_rank}, alpha {self.alpha:g}"
        return f"rank {self.rank}, curve " + ", ".join(f"{level:g}:{active}" for level, active in self.points)

    def active_rank(self, timestep: float, num_timesteps: float = 1000) -> int:
        """r(t) for t = timestep and T = num_timesteps, both in the unit of the model's noise domain.

        t is clamped to [0, T]. Raises TLoRAError when t is NaN or T is not a finite number above 0.
        """
        if not 0 < num_timesteps <= sys.float_info.max:
            raise TLoRAError(f"num_timesteps is {num_timesteps!r}; it must be a finite number above 0.")
        T, t = float(num_timesteps), float(timestep)
        if math.isnan(t):
            raise TLoRAError("The timestep is NaN; check the sigmas given to the sampler.")
        t = min(max(t, 0.0), T)
        if self.points:
            return self._active_on_curve(t / T)
        # (T - t) / T in the reference's order; 1 - t / T would differ by a rank at some t.
        return math.floor((self.rank - self.min_rank) * ((T - t) / T) ** self.alpha) + self.min_rank

    def _active_on_curve(self, level: float) -> int:
        (left, low), *rest = self.points
        if level <= left:
            return low
        for right, high in rest:
            if level <= right:
                # The small addition corrects an integer that rounding has just missed.
                return math.floor((low * (right - level) + high * (level - left)) / (right - left) + 1e-9)
            left, low = right, high
        return low

    def active_of_layers(
        self, layer_ranks: Iterable[int], timesteps: Tensor, num_timesteps: float
    ) -> dict[int, int | LongTensor]:
        """Rank of layers -> the number of their active components at timesteps [B], for `Overlay`: an int if all
        samples agree, else int64 [B] on the device of timesteps."""
        times, active = timesteps.tolist(), {}  # .tolist() reads a GPU once, for all ranks
        for rank in layer_ranks:
            schedule = self if rank == self.rank else self.for_rank(rank)
            ranks = [schedule.active_rank(t, num_timesteps) for t in times]
            active[rank] = ranks[0] if len(set(ranks)) == 1 else torch.tensor(ranks, device=timesteps.device)
        return active

    def for_rank(self, layer_rank: int) -> "RankSchedule":
        """The schedule of a layer of rank layer_rank <= rank.

        r_min shrinks in proportion and is rounded up, so that a minimum above 0 stays above 0.
        """
        _require_whole("layer_rank", layer_rank)
        if not 1 <= layer_rank <= self.rank:
            raise TLoRAError(
                f"A layer has rank {layer_rank}, but the schedule is for ranks from 1 to {self.rank}; use the schedule "
                "that the layer was trained with."
            )

        def scaled(active: int) -> int:
            return -(-active * layer_rank // self.rank)

        points = tuple((level, scaled(active)) for level, active in self.points)
        return replace(self, rank=layer_rank, min_rank=scaled(self.min_rank), points=points)

    def up_to(self, rank: int) -> "RankSchedule":
        """The schedule limited to the first `rank` components, with min_rank at most `rank`. Raises TLoRAError unless
        rank is from 1 to the schedule's."""
        _require_whole("rank", rank)
        if not 1 <= rank <= self.rank:
            raise TLoRAError(f"rank is {rank}; set it to a whole number from 1 to the T-LoRA's, which is {self.rank}.")
        points = tuple((level, min(active, rank)) for level, active in self.points)
        return replace(self, rank=rank, min_rank=min(self.min_rank, rank), points=points)

    def curve(self, n: int = 101, num_timesteps: float = 1000) -> list[tuple[float, int]]:
        """n points (t, r(t)) with t evenly spaced from 0 to T, both ends included; n >= 2."""
        times = [num_timesteps * i / (n - 1) for i in range(n)]
        return [(t, self.active_rank(t, num_timesteps)) for t in times]


def _require_whole(name: str, value: object) -> None:
    # bool is an int in Python; a rank of True is a wiring mistake.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TLoRAError(f"{name} is {value!r}; it must be a whole number.")
