"""A training that is scored, in the real interface on the real server: curves, best step, sentence and pictures."""

import re

import pytest
from browser import RUN_MS, load_workflow, ours
from panel_page import ONLY_TRAINING, QUICKSTART, TRAIN, set_widgets, wait_for

SCORED = {
    "scorer": "tiny world",
    "keep": "best",
    "validate_every": 20,
    "validation_prompts": "a photo of {token} {class_word} in the snow",
    "score_seeds": 2,
    "rank": 8,
    "min_rank": 4,
    "learning_rate": 0.004,
    "file_name": "panel/scored",
}
# Whether each picture of the grid is there, by row.
LOADED = """() => [...document.querySelectorAll(".tlora-gallery tbody tr")]
    .map(row => [...row.querySelectorAll("img")].map(picture => picture.naturalWidth === 256))"""


def test_a_training_shows_its_scores_marks_the_best_step_and_its_grid_holds_all_pictures(page):
    load_workflow(page, QUICKSTART)
    page.evaluate(ONLY_TRAINING, [40, 11])
    set_widgets(page, SCORED)
    page.get_by_test_id("queue-button").click()
    # While it trains, the sentence stands below the curves.
    told = "() => /^step \\d+: /.test(document.querySelector('.tlora-sentence').textContent)"
    page.wait_for_function(told, timeout=RUN_MS)
    ended = wait_for(page, "panel.state === 'done'")
    steps = page.evaluate(
        """id => import("/extensions/ComfyUI-T-LoRA/runs.js")
        .then(({runOf}) => runOf(window.app.graph.getNodeById(id)).scores.steps.map(({step}) => step))""",
        TRAIN,
    )
    assert steps == [0, 20, 40]
    lanes = page.locator(".tlora-lane")
    assert lanes.count() == 3
    for lane in lanes.all():
        assert re.fullmatch(r"-?\d\.\d{3} ± \d\.\d{3}", lane.locator(".tlora-strong").inner_text())
        assert lane.locator("path.tlora-dots").first.get_attribute("d").count("M") == len(steps)
    best = int(page.locator(".tlora-mark").inner_text().removeprefix("best: step "))
    left = page.locator(".tlora-rule").first.evaluate("rule => rule.style.left")
    assert float(left.removesuffix("%")) == pytest.approx(100 * best / 40, abs=0.01)
    assert re.search(rf"The file holds step {best}: .* Saved as panel/scored", ended["message"])

    page.locator(".tlora-strip .tlora-link").click()
    rows = page.locator(".tlora-gallery tbody tr")
    assert [row.locator("th").inner_text().split("\n")[0] for row in rows.all()] == [
        f"step {step}, best" if step == best else f"step {step}" for step in steps
    ]
    page.wait_for_function(f"() => ({LOADED})().flat().every(Boolean)")
    assert page.evaluate(LOADED) == [[True, True]] * 3
    for neutral, snow in (row.locator("td").all_inner_texts() for row in rows.all()):
        assert "likeness" in neutral and "copying" not in neutral
        assert "copying" in snow and "likeness" not in snow
    assert ours(page.complaints) == []
