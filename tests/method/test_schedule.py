"""r(t): the paper's numbers, its edges, and agreement between its scalar and tensor forms."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlora_core import RankSchedule, TLoRAError

schedules = st.integers(1, 256).flatmap(
    lambda rank: st.builds(RankSchedule, st.just(rank), st.integers(0, rank), st.floats(0.1, 8))
)


def test_paper_schedule_at_rank_64():
    schedule = RankSchedule(64, 32)
    assert [schedule.active_rank(t) for t in (999, 750, 749, 500, 250, 0)] == [32, 40, 40, 48, 56, 64]


@pytest.mark.parametrize("rank", [4, 8, 64, 100])
@pytest.mark.parametrize("num_timesteps", [1000, 999, 50])
def test_linear_schedule_follows_the_formula_in_its_order_of_operations(rank, num_timesteps):
    schedule = RankSchedule(rank, rank // 2)
    for t in range(num_timesteps + 1):
        expected = int(((num_timesteps - t) / num_timesteps) ** 1.0 * (rank - rank // 2)) + rank // 2
        assert schedule.active_rank(t, num_timesteps) == expected


def test_formula_is_not_rewritten_as_one_minus_t_over_T():
    # Equal on paper; in floating point the other form differs by a rank at these t.
    schedule = RankSchedule(100, 50)
    for t, rank in [(340, 83), (560, 72), (680, 66), (780, 61)]:
        assert schedule.active_rank(t) == rank != math.floor(50 * (1 - t / 1000)) + 50


@given(schedules, st.lists(st.floats(-10, 1100, allow_nan=False), min_size=1, max_size=8), st.sampled_from([1, 1000]))
def test_tensor_and_scalar_agree_exactly(schedule, times, num_timesteps):
    for dtype in (torch.float64, torch.float32):
        t = torch.tensor(times, dtype=dtype)
        found = schedule.active_of_layers([schedule.rank], t, num_timesteps)[schedule.rank]
        ranks = torch.as_tensor(found)
        assert ranks.dtype == torch.long and ranks.expand(len(t)).tolist() == [
            schedule.active_rank(v, num_timesteps) for v in t.tolist()
        ]


@given(schedules, st.lists(st.floats(0, 1), min_size=1, max_size=4), st.data())
def test_a_layers_ranks_are_one_number_where_all_agree(schedule, times, data):
    layer_rank = data.draw(st.integers(1, schedule.rank))
    wanted = [schedule.for_rank(layer_rank).active_rank(t, 1) for t in torch.tensor(times).tolist()]
    found = schedule.active_of_layers({layer_rank}, torch.tensor(times), 1)[layer_rank]
    assert found == wanted[0] and isinstance(found, int) if len(set(wanted)) == 1 else found.tolist() == wanted


@given(schedules, st.floats(0, 1), st.floats(0, 1))
def test_rank_falls_with_noise_between_its_ends(schedule, a, b):
    low, high = sorted((a, b))
    assert schedule.active_rank(0, 1) == schedule.rank and schedule.active_rank(1, 1) == schedule.min_rank
    assert schedule.rank >= schedule.active_rank(low, 1) >= schedule.active_rank(high, 1) >= schedule.min_rank


def test_flow_time_runs_the_whole_range():
    # T = 1000 for a time that runs to 1 would leave nearly every rank on.
    schedule = RankSchedule(64, 32)
    assert [schedule.active_rank(s, 1) for s in (1.0, 0.5, 0.0)] == [32, 48, 64]


def test_times_outside_are_clamped_and_nan_is_refused():
    schedule = RankSchedule(8, 2)
    assert [schedule.active_rank(t) for t in (-math.inf, -5, 1000.5, math.inf)] == [8, 8, 2, 2]
    with pytest.raises(TLoRAError, match="NaN"):
        schedule.active_rank(math.nan)
    with pytest.raises(TLoRAError, match="NaN"):
        schedule.active_of_layers([8], torch.tensor([1.0, math.nan]), 1000)


@pytest.mark.parametrize("num_timesteps", [0, -1, math.nan, math.inf])
def test_impossible_number_of_timesteps_is_refused(num_timesteps):
    with pytest.raises(TLoRAError, match="num_timesteps"):
        RankSchedule(8, 2).active_rank(0, num_timesteps)


def test_alpha_above_one_drops_components_sooner():
    assert RankSchedule(64, 0, alpha=2.0).active_rank(500) == 16
    assert RankSchedule(64, 0, alpha=0.5).active_rank(750) == 32


@given(schedules, st.integers(1, 256))
def test_smaller_layers_run_on_their_own_rank(schedule, layer_rank):
    if layer_rank > schedule.rank:
        with pytest.raises(TLoRAError, match=f"rank {layer_rank}"):
            schedule.for_rank(layer_rank)
        return
    own = schedule.for_rank(layer_rank)
    assert own.rank == layer_rank and own.alpha == schedule.alpha
    assert 0 <= Fraction(own.min_rank) - Fraction(schedule.min_rank * layer_rank, schedule.rank) < 1
    assert own.is_constant or not schedule.is_constant


def test_constant_schedule_is_plain_lora():
    schedule = RankSchedule(16, 16)
    assert schedule.is_constant and {schedule.active_rank(t) for t in range(0, 1001, 50)} == {16}


def test_curve_has_both_ends():
    assert RankSchedule(4, 2).curve(3) == [(0, 4), (500, 3), (1000, 2)]
    assert RankSchedule(4, 2).curve(2, num_timesteps=1) == [(0, 4), (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0), "rank is 0"),
        ((-4, 0), "rank is -4"),
        ((4, 5), "min_rank is 5"),
        ((4, -1), "min_rank is -1"),
        ((4.0, 2), "rank is 4.0"),
        ((True, 1), "rank is True"),
        ((4, True), "min_rank is True"),
        (("4", 2), "rank is '4'"),
        ((4, 2, 0), "alpha is 0"),
        ((4, 2, -1.0), "alpha is -1.0"),
        ((4, 2, math.nan), "alpha is nan"),
        ((4, 2, math.inf), "alpha is inf"),
        ((4, 2, 10**400), "alpha is 1000"),
        ((4, 2, True), "alpha is True"),
        ((4, 2, None), "alpha is None"),
    ],
)
def test_bad_fields_are_one_sentence_each(arguments, named):
    with pytest.raises(TLoRAError, match=named):
        RankSchedule(*arguments)


def test_free_curve_goes_straight_between_its_points_and_through_them():
    schedule = RankSchedule.from_text(64, 0, 3.0, "0:64, 0.5:48; 1:8")
    assert [schedule.active_rank(t) for t in (-5, 0, 250, 500, 750, 1000)] == [64, 64, 56, 48, 28, 8]
    assert schedule.min_rank == 8 and not schedule.is_constant and schedule.is_falling
    assert [schedule.active_rank(t, 1) for t in (0.0, 0.5, 1.0)] == [64, 48, 8]
    inner = RankSchedule.from_text(8, 0, 1.0, "0.2:8, 0.8:2")
    assert [inner.active_rank(t, 1) for t in (0, 0.1, 0.5, 0.9, 1)] == [8, 8, 5, 2, 2]
    assert not RankSchedule.from_text(8, 0, 1.0, "0:2, 1:8").is_falling
    assert RankSchedule.from_text(8, 4, 1.0, "  ") == RankSchedule(8, 4)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 64)), min_size=2, max_size=6, unique_by=lambda p: p[0]))
def test_every_point_of_a_curve_has_its_own_rank_and_others_lie_between(points):
    points = tuple((level / 100, active) for level, active in sorted(points))
    schedule = RankSchedule(64, min(a for _, a in points), 1.0, points)
    for (left, low), (right, high) in zip(points, points[1:]):
        assert schedule.active_rank(left, 1) == low and schedule.active_rank(right, 1) == high
        assert min(low, high) <= schedule.active_rank((left + right) / 2, 1) <= max(low, high)
    layer = schedule.for_rank(16)
    assert layer.rank == 16 and all(0 < a for _, a in layer.points if _ and 0 < dict(points)[_])


@pytest.mark.parametrize(
    "curve",
    ["0:64", "0:64, x:1", "0.5:1, 0.2:3", "0:65, 1:2", "0:64, 2:1", "0:64, 1:-1", "0 64, 1 32", "0:64, 0:32", ", ;"],
)
def test_curve_that_cannot_be_is_refused(curve):
    with pytest.raises(TLoRAError, match="curve"):
        RankSchedule.from_text(64, 32, 1.0, curve)
