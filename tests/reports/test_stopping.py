"""The stopping rule, on made-up curves and on those of real trainings of the tiny base.

`recorded/` holds the scores of three T-LoRA trainings, seen by the tiny world's scorer: at step 0 and after every 25 of
375 steps, four prompts with two seeds each.
"""

import json
from pathlib import Path

import pytest

from tlora_core.reports import stopping
from tlora_core.reports.live_scores import PictureScores, StepScores
from tlora_core.reports.stopping import TOLERANCE, best_index, trade_off, verdict

RECORDED = Path(__file__).parent / "recorded"
COPY = PictureScores(likeness=1.0, obedience=0.1, copying=0.9)
BARE = (0.6, 0.3, 0.4)


def scores(step, likeness, obedience, copying, copy=COPY, noise=(0.0, 0.0)):
    """Two neutral pictures and two others. noise: added to the likeness of the one neutral picture and the other."""
    moved = [None if likeness is None else likeness + by for by in noise]
    neutral = [PictureScores(value, obedience, None) for value in moved]
    return StepScores.of(step, [neutral, [PictureScores(None, obedience, copying)] * 2], copy)


def curve(*rows, **more):
    return [scores(100 * i, *row, **more) for i, row in enumerate(rows)]


def recorded(name):
    return [StepScores.from_json(one) for one in json.loads((RECORDED / f"{name}.json").read_text())]


def test_trade_off_is_the_geometric_mean_of_the_three_shares():
    found = trade_off(scores(0, *BARE), scores(100, 0.8, 0.25, 0.5))
    assert found == pytest.approx((0.5 * 0.75 * 0.8) ** (1 / 3))
    assert trade_off(scores(0, *BARE), scores(100, 0.5, 0.3, 0.4)) == 0, "less like it than before"
    assert trade_off(scores(0, *BARE), scores(100, *(1.0, 0.1, 0.9))) == 0, "the training picture itself"
    assert trade_off(scores(0, *BARE), scores(100, 1.0, 0.4, 0.3)) == 1, "more than the bare model's does not count"
    nothing_copied = scores(0, 0.6, 0.3, 0.0), scores(100, 0.8, 0.3, 0.45)
    assert trade_off(*nothing_copied) == pytest.approx((0.5 * 0.5) ** (1 / 3)), "a score of 0 is a score"


def test_as_like_as_it_gets():
    found = verdict(curve(BARE, (0.75, 0.3, 0.42), (0.9, 0.29, 0.45), (0.9, 0.22, 0.7), (0.91, 0.2, 0.8)))
    assert (found.best, found.past) == (200, 2)
    assert found.sentence == (
        "step 200: as like as it gets; after it prompts are followed less and the background is copied more."
    )


def test_more_like_it_at_a_price():
    found = verdict(curve(BARE, (0.8, 0.29, 0.45), (0.95, 0.2, 0.8)))
    assert (found.best, found.past) == (100, 1)
    assert found.sentence == (
        "step 100: the best balance; after it the subject gets more alike, but prompts are followed less and the "
        "background is copied more."
    )


def test_nothing_is_gained_any_more():
    found = verdict(curve(BARE, (0.8, 0.3, 0.4), (0.8, 0.3, 0.4), (0.79, 0.3, 0.4)))
    assert (found.best, found.past, found.sentence) == (
        100,
        2,
        "step 100: as like as it gets; after it nothing is gained.",
    )


def test_changes_too_small_to_tell_are_not_told():
    found = verdict(curve(BARE, (0.8, 0.3, 0.4), (0.8, 0.295, 0.41)))
    assert found.sentence == "step 100: as like as it gets; after it nothing is gained."


def test_more_like_it_by_less_than_counts():
    found = verdict(curve(BARE, (0.8, 0.3, 0.4), (0.84, 0.3, 0.4)), tolerance=0.1)
    assert found.sentence == "step 100: the best balance; after it the subject gets more alike, but no better."


def test_still_learning():
    found = verdict(curve(BARE, (0.7, 0.3, 0.4), (0.8, 0.3, 0.4)))
    assert (found.best, found.is_better, found.past) == (200, True, 0)
    assert found.sentence == "step 200: the best so far; still learning."


def test_never_became_like_it():
    found = verdict(curve(BARE, (0.6, 0.3, 0.4), (0.58, 0.3, 0.4)))
    assert (found.best, found.is_better, found.past) == (200, False, 0)
    assert found.sentence == "step 200: no step so far is better than step 0; still learning."


def test_a_single_validation():
    found = verdict(curve(BARE))
    assert (found.best, found.past, found.sentence) == (0, 0, "step 0: the first with scores; still learning.")
    with pytest.raises(ValueError):
        verdict([])


def test_a_gain_within_its_noise_does_not_count():
    first, early = scores(0, *BARE), scores(100, 0.8, 0.3, 0.4)
    certain, noisy = (scores(200, 0.9, 0.3, 0.4, noise=(by, -by)) for by in (0.0, 0.5))
    assert best_index([first, early, certain]) == 2 and best_index([first, early, noisy]) == 1
    # The same noise in both is no noise of their difference.
    assert best_index([first, scores(100, 0.8, 0.3, 0.4, noise=(0.5, -0.5)), noisy]) == 2
    # All is counted from the first, so its noise is in every gain.
    assert stopping._gain(scores(0, *BARE, noise=(0.2, -0.2)), early, certain)[1] > 0
    assert stopping._gain(first, early, certain)[1] == pytest.approx(0, abs=1e-9)


def test_two_pictures_are_enough_to_know_the_noise():
    rows = [
        StepScores.of(100 * i, [[PictureScores(likeness + by, 0.3, None) for by in (noise, -noise)]], COPY)
        for i, (likeness, noise) in enumerate(((0.6, 0), (0.8, 0), (0.86, 0.5)))
    ]
    assert best_index(rows) == 1


def test_a_gain_within_the_tolerance_does_not_count():
    first, early, later = curve(BARE, (0.8, 0.3, 0.4), (0.82, 0.3, 0.4))
    assert trade_off(first, later) - trade_off(first, early) < TOLERANCE
    assert best_index([first, early, later]) == 1 and best_index([first, early, later], 0.0) == 2


@pytest.mark.parametrize("left", ["likeness", "obedience", "copying"])
def test_what_is_not_measured_is_left_out(left):
    place = ["likeness", "obedience", "copying"].index(left)
    rows = [list(BARE), [0.8, 0.28, 0.5], [0.95, 0.12, 0.85]]
    for row in rows:
        row[place] = None
    copy = PictureScores(**{"likeness": 1.0, "obedience": 0.1, "copying": 0.9, left: None})
    found = curve(*rows, copy=copy)
    shares = {"likeness": 0.5, "obedience": 0.9, "copying": 0.8}
    del shares[left]
    first, second = shares.values()
    assert trade_off(found[0], found[1]) == pytest.approx((first * second) ** 0.5)
    worse = {"obedience": "prompts are followed less", "copying": "the background is copied more"}
    if worse.pop(left, None):
        assert verdict(found).sentence.endswith(f"but {worse.popitem()[1]}.")


def test_where_nothing_is_measured_no_step_is_better():
    found = curve(*[(None, None, None)] * 3)
    assert trade_off(found[0], found[1]) == 0 and verdict(found).sentence.startswith("step 200: no step so far is")


@pytest.mark.parametrize("of_copy", [0.3, 0.4])
def test_a_measure_in_which_the_copy_is_no_worse_than_the_bare_model_is_left_out(of_copy):
    copy = PictureScores(likeness=1.0, obedience=of_copy, copying=0.9)
    found = curve(BARE, (0.8, 0.1, 0.4), copy=copy)
    assert trade_off(*found) == pytest.approx(0.5**0.5)


def test_a_single_picture_of_a_prompt_is_enough():
    rows = [
        StepScores.of(100 * i, [[PictureScores(likeness, 0.3, None)], [PictureScores(None, 0.3, 0.4)]], COPY)
        for i, likeness in enumerate((0.6, 0.8, 0.81))
    ]
    assert best_index(rows) == 1
    # Each of its pictures is the only one of its measure, so none can be left out, and no noise is known.
    later = [[PictureScores(0.95, 0.3, None)], [PictureScores(None, 0.3, 0.5)]]
    assert best_index([*rows[:2], StepScores.of(200, later, COPY)]) == 2


@pytest.mark.parametrize("name, best", [("peach_circle", 75), ("green_star", 100), ("brown_heart", 50)])
def test_recorded_trainings_end_where_the_truth_is_best_or_near_it(name, best):
    scores = recorded(name)
    found = verdict(scores)
    assert found.best == best and found.past == scores.index(scores[-1]) - best // 25
    assert found.sentence == (
        f"step {best}: the best balance; after it the subject gets more alike, but prompts are followed less and the "
        "background is copied more."
    )


@pytest.mark.parametrize("name", ["peach_circle", "green_star", "brown_heart"])
def test_the_best_is_always_the_one_before_or_the_newest(name):
    scores, before = recorded(name), None
    for end in range(1, len(scores) + 1):
        found = verdict(scores[:end])
        assert found.best in (before, scores[end - 1].step)
        before = found.best


def test_recorded_scores_hold_still_in_another_order_of_seeds():
    scores = recorded("peach_circle")
    turned = [StepScores.of(one.step, [row[::-1] for row in one.pictures], one.copy) for one in scores]
    assert verdict(turned) == verdict(scores)
