"""The dot on the rank schedule: what the page learns while a sampler runs, and the cost of telling it."""

import host_models as models
import pytest
import sampling_runs as runs
import torch
from page_clients import opened_pages


@pytest.fixture
def pages(comfy, monkeypatch):
    return opened_pages(monkeypatch)


@pytest.fixture(scope="module")
def model(comfy):
    return models.random_unet()


def shown(model, schedule, node_id="3:7"):
    from tlora_core.hosts.comfy.page.rank import show_active_rank

    return show_active_rank(model.clone(), schedule, node_id)


@pytest.fixture(scope="module")
def schedule():
    from tlora_core import RankSchedule

    return RankSchedule(64, 32)


def test_page_receives_the_rank_of_each_evaluation_and_the_samplers_steps(model, schedule, pages, monkeypatch):
    from tlora_core.hosts.comfy.page import rank as live_rank

    monkeypatch.setattr(live_rank, "EVENT_EVERY", 0.0)
    runs.sample(shown(model, schedule), *runs.texts(), steps=4)
    events = [data for event, data, _ in pages.sent if event == "tlora.sampling"]
    assert {data["node"] for data in events} == {"3:7"}
    assert [data["schedule"] for data in events] == [{"rank": 64, "min_rank": 32, "alpha": 1.0, "points": []}] * 4
    steps = events[0]["steps"]
    assert len(steps) == 4 and steps[0] == [0.999, 32] and steps[-1][1] > 50
    assert [[data["level"], data["rank"]] for data in events] == steps


def test_evaluations_in_quick_succession_are_not_looked_at(model, schedule, pages):
    patched = shown(model, schedule)
    for _ in range(3):
        models.evaluate(patched, [1.0, 1.0])
    assert 1 <= len(pages.sent) <= 3
    [teller] = [w for ws in patched.wrappers["apply_model"].values() for w in ws]
    teller._told_at = float("inf")  # so that none is due

    class NoTensor:
        """Fails at any use, which shows that it is not read: reading it would wait for a GPU."""

    class Executor:
        class_obj = None

        def __call__(self, *args, **kwargs):
            return "output"

    assert teller(Executor(), NoTensor(), NoTensor()) == "output"


def test_output_is_the_same_with_and_without_and_without_a_page_nothing_is_added(model, schedule, pages, monkeypatch):
    plain, told = models.evaluate(model, [2.0]), models.evaluate(shown(model, schedule), [2.0])
    assert torch.equal(plain, told)
    assert shown(model, schedule, None).wrappers == model.wrappers
    from tlora_core.hosts.comfy.page import rank as live_rank

    monkeypatch.delattr(live_rank.PromptServer, "instance")
    assert shown(model, schedule).wrappers == model.wrappers
