"""The curves of the scores in the training panel: their places, the best step, what the pointer and the slider tell,
and that nothing takes room where there are no scores."""

import pytest
from browser import load_workflow, open_canvas, ours, set_setting
from panel_page import QUICKSTART, TRAIN, tell
from validation_states import MEASURES, scored_run, scored_step, serve_pictures

PROMPTS = ["a photo of sks circle", "sks circle in the snow"]
RISING = [
    scored_step(100, likeness=0.2, obedience=0.9, copying=0.1),
    scored_step(200, likeness=0.6, obedience=0.8, copying=0.2),
    scored_step(300, likeness=0.7, obedience=0.7, copying=0.6),
    scored_step(400, likeness=0.6, obedience=0.5, copying=0.9),
]
# What the panel shows of the scores: the lanes by name with their value, title, mark, sentence, and the rule's place.
SHOWN = """() => {
    const scores = document.querySelector(".tlora-scores"), [rule, pointed] = scores.querySelectorAll(".tlora-rule");
    const text = selector => scores.querySelector(selector).textContent;
    const lanes = [...scores.querySelectorAll(".tlora-lane")].filter(lane => lane.checkVisibility());
    return {
        steps: document.querySelector(".tlora-state + span").textContent,
        isShown: scores.checkVisibility(), lanes: lanes.map(lane => lane.querySelector(".tlora-name").textContent),
        values: lanes.map(lane => lane.querySelector(".tlora-strong").textContent),
        ranges: lanes.map(lane => lane.querySelector(".tlora-range").textContent),
        cursor: pointed.checkVisibility() ? pointed.style.left : null,
        title: text(".tlora-lanes > .tlora-row .tlora-strong"), mark: text(".tlora-mark"),
        sentence: text(".tlora-sentence"),
        rule: rule.checkVisibility() ? rule.style.left : null,
        label: scores.querySelector(".tlora-lanes").getAttribute("aria-label"),
        height: window.app.graph.getNodeById(TRAIN).size[1],
    };
}""".replace("TRAIN", str(TRAIN))
# Points of a path of the lane of a measure, [x in steps, y from 0 at the bottom to 1], of a run of 400 steps.
POINTS = """([name, part]) => [...document.querySelector(`.tlora-lane.tlora-${name} .tlora-${part}`).getAttribute("d")
    .matchAll(/[ML]([\\d.]+) ([\\d.]+)/g)].map(([, x, y]) => [x * 0.4, 1 - y / 100])"""
OVERFLOWS = """() => [...document.querySelectorAll(".tlora-panel")].filter(panel => panel.checkVisibility())
    .filter(panel => panel.scrollHeight > panel.clientHeight + 1 || panel.scrollWidth > panel.clientWidth + 1).length"""


@pytest.fixture(scope="module")
def page(browser, server):
    page = open_canvas(browser, server)
    serve_pictures(page)
    load_workflow(page, QUICKSTART)
    return page


def shown(page, condition: str) -> dict:
    """What the panel shows once `condition` on `shown` holds."""
    page.wait_for_function(f"() => {{ const shown = ({SHOWN})(); return {condition}; }}")
    return page.evaluate(SHOWN)


def test_curves_have_the_places_of_their_scores_and_the_best_step_is_marked_with_the_sentence(page):
    tell(page, scored_run(RISING, PROMPTS, best=300))
    panel = shown(page, "shown.lanes.length === 3")
    assert panel["lanes"] == list(MEASURES)
    assert panel["values"] == ["0.600 ± 0.010", "0.500 ± 0.010", "0.900 ± 0.010"]
    assert panel["title"] == "Scores at step 400" and panel["mark"] == "best: step 300" and panel["rule"] == "75%"
    assert panel["sentence"] == "step 300: as like as it gets." and panel["cursor"] is None
    assert panel["ranges"] == ["0.20 to 0.70", "0.50 to 0.90", "0.10 to 0.90"]
    assert panel["label"] == (
        "Scores at step 400: likeness 0.600 ± 0.010, obedience 0.500 ± 0.010, copying 0.900 ± 0.010. best: step 300"
    )
    # From 0.2 - 0.01 at the bottom to 0.7 + 0.01 at the top.
    heights = [(scores["likeness"] - 0.19) / 0.52 for scores in RISING]
    line = page.evaluate(POINTS, ["likeness", "line"])
    assert line == [pytest.approx([scores["step"], y], abs=1e-3) for scores, y in zip(RISING, heights)]
    band = page.evaluate(POINTS, ["likeness", "band"])
    assert [y for _, y in band[:4]] == pytest.approx([y + 0.01 / 0.52 for y in heights], abs=1e-3)
    assert [y for _, y in band[:3:-1]] == pytest.approx([y - 0.01 / 0.52 for y in heights], abs=1e-3)
    assert page.evaluate(POINTS, ["copying", "dots.tlora-best"]) == [pytest.approx([300, 0.51 / 0.82], abs=1e-3)]
    assert page.locator(".tlora-sentence").get_attribute("role") == "status"
    assert ours(page.complaints) == []


def test_the_pointer_and_the_slider_tell_the_scores_of_a_step(page):
    tell(page, scored_run(RISING, PROMPTS, best=300))
    shown(page, "shown.lanes.length === 3")
    plot = page.locator(".tlora-lanes")
    width = plot.bounding_box()["width"]
    plot.hover(position={"x": 0.55 * width, "y": 60})
    panel = shown(page, "shown.title === 'Scores at step 200'")
    assert panel["values"] == ["0.600 ± 0.010", "0.800 ± 0.010", "0.200 ± 0.010"] and panel["cursor"] == "50%"
    plot.hover(position={"x": 0.7 * width, "y": 60})
    shown(page, "shown.title === 'Scores at step 300' && shown.cursor === '75%'")
    page.locator(".tlora-buttons").hover()
    shown(page, "shown.title === 'Scores at step 400'")

    slider = page.locator(".tlora-strip input")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    panel = shown(page, "shown.title === 'Scores at step 300'")
    assert panel["values"][0] == "0.700 ± 0.010" and page.locator(".tlora-beside .tlora-strong").inner_text() == (
        "step 300, best"
    )
    assert slider.get_attribute("aria-valuetext") == (
        "step 300, best, likeness 0.700 ± 0.010, obedience 0.700 ± 0.010, copying 0.600 ± 0.010"
    )
    plot.hover(position={"x": 0.55 * width, "y": 60})
    shown(page, "shown.title === 'Scores at step 200'")
    slider.hover()
    shown(page, "shown.title === 'Scores at step 300'")
    page.keyboard.press("End")
    shown(page, "shown.title === 'Scores at step 400'")


def test_only_what_is_measured_is_shown_and_takes_room(page):
    run = scored_run(RISING, PROMPTS, best=300)
    tell(page, run | {"step": 398, "scores": None})
    without = shown(page, "shown.steps === '398 / 400' && !shown.isShown")
    # Before the first validation there is nothing yet.
    nothing = {"steps": [], "best": None, "sentence": "", "past": 0}
    tell(page, run | {"sequence": 2, "step": 399, "scores": nothing})
    assert shown(page, "shown.steps === '399 / 400'") == without | {"steps": "399 / 400"}
    heights = [without["height"]]
    for measured in range(1, 4):
        steps = [step | dict.fromkeys(MEASURES[measured:]) for step in RISING]
        tell(page, run | {"sequence": measured + 2, "scores": run["scores"] | {"steps": steps}})
        panel = shown(page, f"shown.lanes.length === {measured}")
        assert panel["lanes"] == list(MEASURES[:measured])
        assert page.evaluate(OVERFLOWS) == 0
        heights.append(panel["height"])
    grown = [after - before for before, after in zip(heights, heights[1:])]
    assert grown[0] > grown[1] == grown[2] > 0
    tell(page, run | {"sequence": 9, "scores": None})
    assert shown(page, "!shown.isShown")["height"] == heights[0]


def test_a_sentence_has_the_room_of_its_lines_and_is_not_said_twice(page):
    run = scored_run(RISING, PROMPTS, best=300)
    tell(page, run)
    short = shown(page, "shown.sentence === 'step 300: as like as it gets.'")
    long = "step 300: as like as it gets; after it " + "and".join([" prompts are followed less "] * 3)
    tell(page, run | {"sequence": 2, "scores": run["scores"] | {"sentence": long}})
    assert shown(page, "shown.sentence.length > 100")["height"] == short["height"] + 2 * 16
    tell(page, run | {"sequence": 3, "message": f"The file holds {short['sentence']}"})
    shown(page, "shown.sentence === ''")


def test_an_even_curve_lies_in_the_middle_and_has_no_range(page):
    even = [scored_step(step, likeness=0.5, copying=None) | {"likeness_error": None} for step in (200, 400)]
    tell(page, scored_run(even, PROMPTS))
    assert shown(page, "shown.lanes.length === 2 && !shown.mark")["ranges"] == ["", ""]
    assert page.evaluate(POINTS, ["likeness", "line"]) == [[200, 0.5], [400, 0.5]]
    tell(page, scored_run([even[0] | {"likeness_error": 0}], PROMPTS))
    assert shown(page, "shown.title === 'Scores at step 200'")["values"][0] == "0.500 ± 0.000"


def test_what_the_last_step_lacks_is_a_dash(page):
    tell(page, scored_run(RISING, PROMPTS, best=300))
    shown(page, "shown.values[1] === '0.500 ± 0.010'")
    last = scored_step(400, likeness=0.6, obedience=None, copying=0.9)
    tell(page, scored_run([*RISING[:3], last], PROMPTS, best=300))
    assert shown(page, "shown.values[1] === '–'")["values"] == ["0.600 ± 0.010", "–", "0.900 ± 0.010"]


@pytest.mark.parametrize("count", [1, 50])
def test_one_validation_and_fifty_are_drawn(page, count):
    steps = [scored_step((i + 1) * 400 // count, likeness=0.5, copying=None) for i in range(count)]
    run = scored_run(steps, PROMPTS)
    tell(page, run)
    panel = shown(page, "shown.lanes.length === 2 && !shown.mark")
    assert panel["mark"] == panel["sentence"] == "" and panel["rule"] is None
    dots = page.evaluate(POINTS, ["likeness", "dots"])
    assert [step for step, _ in dots] == [scores["step"] for scores in steps]
    assert [y for _, y in dots] == pytest.approx([0.5] * count)  # an even curve lies in the middle
    assert page.evaluate(POINTS, ["likeness", "whiskers"])[:2] == [[steps[0]["step"], 1], [steps[0]["step"], 0]]
    # A validation that comes later is added.
    scores = scored_run([*steps, scored_step(401)], PROMPTS, best=401)["scores"]
    tell(page, run | {"sequence": 2, "steps": 401, "scores": scores})
    assert shown(page, "shown.lanes.length === 3")["mark"] == "best: step 401"


# Colours of the three lines and of what is behind them, as red, green and blue from 0 to 1.
COLOURS = """() => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgb = colour => {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(value => value / 255);
    };
    const lines = [...document.querySelectorAll(".tlora-lane .tlora-line")].map(line => getComputedStyle(line).stroke);
    const behind = getComputedStyle(document.querySelector(".tlora-panel:has(.tlora-lane)")).backgroundColor;
    return [...lines, behind].map(rgb);
}"""
# What is seen without one kind of cones: Machado, Oliveira, Fernandes, A Physiologically-based Model for Simulation of
# Color Vision Deficiency, 2009, at severity 1, on linear light.
SEEN = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}
PALETTES = ("light", "solarized", "nord", "arc", "github", "dark")
LEAST_CONTRAST, LEAST_APART = 3, 0.08  # of lines, by WCAG 2.2; in Oklab, where 0.02 is just noticed


def dot(matrix, values):
    return [sum(a * b for a, b in zip(row, values)) for row in matrix]


def linear(colour):
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]


def oklab(light):
    """Ottosson, A perceptual color space for image processing, 2020."""
    lms = dot(((0.4122, 0.5363, 0.0514), (0.2119, 0.6807, 0.1074), (0.0883, 0.2817, 0.6300)), light)
    roots = [max(value, 0) ** (1 / 3) for value in lms]
    return dot(((0.2105, 0.7936, -0.0041), (1.9780, -2.4286, 0.4506), (0.0259, 0.7828, -0.8087)), roots)


def contrast(one, other):
    dark, light = sorted(dot([(0.2126, 0.7152, 0.0722)], each)[0] for each in (one, other))
    return (light + 0.05) / (dark + 0.05)


def test_the_three_curves_differ_for_all_eyes_and_stand_out_in_every_palette(page):
    tell(page, scored_run(RISING, PROMPTS, best=300))
    shown(page, "shown.lanes.length === 3")
    try:
        for palette in PALETTES:
            set_setting(page, "Comfy.ColorPalette", palette)
            page.wait_for_timeout(500)
            *lines, behind = map(linear, page.evaluate(COLOURS))
            assert min(contrast(line, behind) for line in lines) >= LEAST_CONTRAST, palette
            for eyes, seen in SEEN.items():
                seen_as = [oklab(dot(seen, line)) for line in lines]
                apart = [sum((a - b) ** 2 for a, b in zip(seen_as[i], seen_as[i - 1])) ** 0.5 for i in range(3)]
                assert min(apart) >= LEAST_APART, (palette, eyes, apart)
    finally:
        set_setting(page, "Comfy.ColorPalette", "dark")
