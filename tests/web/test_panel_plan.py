"""What the training panel says before a run: the values behind 0 and auto, guidance and memory."""

import pytest
from browser import load_workflow, ours
from panel_page import CHANGE, QUICKSTART, TRAIN


def test_the_panel_shows_the_values_behind_zero_before_the_run(page):
    load_workflow(page, QUICKSTART)
    says = (
        r"text => document.querySelector('.tlora-plan').textContent.replace(/, at least 0\.0\d+ of [\d.]+ GiB$/, "
        r"', memory') === text"
    )
    page.wait_for_function(
        says, arg="350 steps, learning rate 1.5e-3, 64 px, tlora 32/16, pictures at CFG 5, 88 layers, memory"
    )
    page.evaluate(
        CHANGE, [TRAIN, {"steps": 0, "learning_rate": 0, "resolution": 0, "method": "auto", "rank": 8, "min_rank": 8}]
    )
    page.wait_for_function(
        says, arg="350 steps, learning rate 1.5e-3, 64 px, tlora 8, pictures at CFG 5, 88 layers, memory"
    )
    page.evaluate(CHANGE, [TRAIN, {"min_rank": 9}])
    page.wait_for_function(says, arg="min_rank is 9; set it to a whole number from 0 to the rank, which is 8.")
    page.evaluate(CHANGE, [TRAIN, {"min_rank": 4}])
    page.evaluate("id => window.app.graph.getNodeById(id).disconnectInput(0)", TRAIN)
    page.wait_for_function("() => /loaded/.test(document.querySelector('.tlora-plan').textContent)")
    assert ours(page.complaints) == []


PLAN = {
    "steps": 500,
    "learning_rate": 1.0,
    "optimizer": "prodigy",
    "resolution": 1024,
    "method": "vanilla_tlora",
    "rank": 64,
    "min_rank": 32,
    "layers": 300,
    "guidance": {"scale": 4.0, "told": None, "told_in_training": None},
    "least_bytes": 13 * 2**30,
    "streamable_bytes": 12 * 2**30,
    "device_bytes": 8 * 2**30,
}


@pytest.mark.parametrize(
    "guidance, says",
    [
        ((4.0, None, None), "64/32, pictures at CFG 4, 300 layers"),
        ((1.0, None, None), "64/32, pictures without CFG, 300 layers"),
        ((1.0, 3.5, 1.0), "guidance 1 in training and 3.5 in pictures, without a negative prompt, 300 layers"),
    ],
)
def test_the_panel_shows_before_the_run_how_pictures_are_guided(page, guidance, says):
    plan = {**PLAN, "guidance": dict(zip(PLAN["guidance"], guidance))}
    page.route("**/tlora/plan", lambda route: route.fulfill(json=plan))
    load_workflow(page, QUICKSTART)
    page.evaluate(CHANGE, [TRAIN, {"steps": 0}])
    page.wait_for_function("says => document.querySelector('.tlora-plan').textContent.includes(says)", arg=says)


@pytest.mark.parametrize(
    "memory, streamable, says, is_wrong",
    [
        ("auto", 12, "part of the 12 GiB of weights stays in RAM, as they do not fit in 8 GiB", False),
        ("lowest", 12, "part of the 12 GiB of weights stays in RAM, as they do not fit in 8 GiB", False),
        ("low", 12, "at least 13 GiB, more than the 8 GiB available", True),
        ("auto", 0, "at least 13 GiB, more than the 8 GiB available", True),
    ],
)
def test_a_model_larger_than_the_card_is_an_error_only_where_it_must_be_there_as_a_whole(
    page, memory, streamable, says, is_wrong
):
    plan = {**PLAN, "streamable_bytes": streamable * 2**30}
    page.route("**/tlora/plan", lambda route: route.fulfill(json=plan))
    load_workflow(page, QUICKSTART)
    page.evaluate(CHANGE, [TRAIN, {"memory": memory}])
    page.wait_for_function(
        """([says, isWrong]) => { const plan = document.querySelector('.tlora-plan');
        return plan.textContent.endsWith(says) && plan.classList.contains('tlora-wrong') === isWrong; }""",
        arg=[says, is_wrong],
    )
