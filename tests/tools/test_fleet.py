"""The plan of many subjects on several GPUs: its sums, where it saturates, and what it counts of a step."""

import json
import sys

import pytest
from places import REPO

sys.path.append(str(REPO / "benchmarks"))

HOUR, GB = 3600, 1e9


@pytest.fixture
def work(comfy):
    import fleet

    # Half an hour on the card, and 9 GB to the results: 5 MB a second.
    return fleet.Work(train=1500, draw=300, bytes=9 * GB, start=0, model=0)


def test_rows_are_dealt_to_cards_in_whole_rounds(work):
    import fleet

    for gpus, hours in ((1, 500), (8, 62.5), (999, 1), (1000, 0.5), (2000, 0.5)):
        planned = fleet.plan(work, 1000, gpus, 1 * GB, 1e6 * GB)
        assert (planned["hours"], planned["bound_by"]) == (hours, "cards")


def test_more_cards_than_the_link_takes_bring_nothing(work):
    import fleet

    link = 1 * GB  # a second: 9 seconds a row
    assert fleet.saturates(work, link) == 200
    at, beyond = (fleet.plan(work, 100_000, gpus, 1 * GB, link) for gpus in (200, 400))
    assert at["hours"] == beyond["hours"] == 250 and beyond["bound_by"] == "link"
    assert fleet.plan(work, 100_000, 100, 1 * GB, link)["link_used"] == 0.5


def test_the_store_of_the_models_serves_all_workers_together(work):
    import fleet

    slow = work._replace(start=60, model=6 * GB)
    planned = fleet.plan(slow, 8, 8, 0.1 * GB, 1e6 * GB)
    assert planned["hours"] == round((60 + 8 * 60 + 1800) / HOUR, 2)
    assert planned["loading_share"] == round(540 / 2340, 3)


def test_a_steps_arithmetic_is_that_of_both_passes(comfy, monkeypatch):
    import fleet
    import memory
    import random_models
    import roofline
    import torch

    monkeypatch.setitem(roofline.TEXT_TOKENS, "flux", 6)
    with memory.host_on_meta():
        model = random_models.flux(256, (1, 1), 64, 32, dtype=torch.bfloat16, device=memory.META)
    step = fleet.training_step(model, "flux", 8, 4)
    with memory.host_on_meta():
        forward = roofline.evaluation(model, "flux", 8, model)
    ratio = sum(each.flops for each in step.all) / sum(each.flops for each in forward.all)
    # The gradients of what goes through frozen layers take as much again; those of the adapters little.
    assert 1.7 < ratio < 2.6
    names = [each.name for each in step.all]
    assert names.count("attention") == names.count("attention_backward") == 2
    there, back = (
        sum(each.flops for each in step.all if each.name == name) for name in ("attention", "attention_backward")
    )
    assert back == 2.5 * there
    assert step.state > 3 * 4 * sum(8 * 256 for _ in range(2)), "each adapter, and the optimizer's two means"
    assert len(step.all) < 6 * len(forward.all), "one step, not two"


def test_times_and_sizes_are_counted_for_a_step_and_a_whole_picture(comfy, monkeypatch):
    import fleet
    import random_models

    flux = random_models.flux
    monkeypatch.setattr(random_models, "flux", lambda **more: flux(256, (1, 1), 64, 32, **more))
    step, draw, file, state = fleet.counted("flux", "H200", 4)
    # A picture is 20 evaluations and a step two or three; a state has five times the numbers of a file, in float32.
    assert 5 < draw / step < 12 and 9 < state / file < 12
    assert fleet.counted("flux", "H200", 8)[2] == 2 * file


def test_a_row_is_its_steps_its_pictures_and_what_it_sends(comfy, monkeypatch):
    import fleet

    for steps, wanted in (("0", 800), ("10", 10)):
        given = ["--steps", steps, "--pictures", "3", "--states", "2", "--start-seconds", "7"]
        monkeypatch.setattr(sys, "argv", ["fleet.py", *given])
        work = fleet.work_of(fleet._arguments(), step=2, draw=5, file=100, state=1000)
        assert work == fleet.Work(train=2 * wanted, draw=15, bytes=100 + 2000 + 3 * 1.5e6, start=7, model=6.9 * GB)


def test_given_figures_take_the_place_of_the_counted_ones(comfy, monkeypatch, capsys):
    import comfy.options
    import fleet

    monkeypatch.setattr(comfy.options, "enable_args_parsing", lambda: None)
    monkeypatch.setattr(fleet, "counted", lambda *asked: (1.0, 5.0, 1e6, 2e6))
    # A row takes 800 seconds and sends 8.012 GB; the link takes 1 GB a second, and the store of the models gives 0.1.
    given = ["--step-seconds", "0.5", "--draw-seconds", "50", "--file-mb", "8000", "--state-mb", "0", "--pictures", "8"]
    told = ["--link-gbit", "8", "--load-gbit", "0.8", "--subjects", "100", "--gpus", "4", "--json"]
    monkeypatch.setattr(sys, "argv", ["fleet.py", *given, *told])
    fleet.main()
    row, planned = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["step_seconds"] == "0.5 (given)" and row["row_mb"] == 8012 and row["saturates_at_gpus"] == 99
    assert planned["hours"] == round((30 + 4 * 69 + 25 * 800) / HOUR, 2)
    monkeypatch.setattr(sys, "argv", ["fleet.py", *given[2:], *told])
    fleet.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["step_seconds"] == "1 (counted bound)"
