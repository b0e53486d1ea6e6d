"""The validation pictures over the page: the table of all steps and prompts, single pictures, keys, and the picture of
the table that is saved."""

import io
import re

import numpy as np
import pytest
from browser import load_workflow, open_canvas, ours
from panel_page import QUICKSTART, tell, wait_for
from PIL import Image
from validation_states import colour, scored_run, scored_step, serve_pictures

PROMPTS = ["a photo of sks circle", "sks circle in the snow", "sks circle on the beach"]
STEPS = [scored_step(100 * i, likeness=0.1 * i, obedience=0.5, copying=0.2) for i in (1, 2, 3, 4)]
MARK = (11, 87, 208)  # the frame of the best step in the saved picture
# The name of the focused element, and the step and prompt of the picture that is shown alone.
FOCUSED = "() => document.activeElement.ariaLabel"
ALONE = "() => [...document.querySelectorAll('.tlora-one figcaption > :not(.tlora-figures)')].map(e => e.textContent)"
ROWS = """() => [...document.querySelectorAll(".tlora-gallery tr")]
    .map(row => [...row.children].map(cell => cell.innerText.replaceAll(/\\s+/g, " ").trim()))"""


@pytest.fixture(scope="module")
def canvas(browser, server):
    page = open_canvas(browser, server)
    serve_pictures(page)
    load_workflow(page, QUICKSTART)
    yield page
    page.close()


@pytest.fixture
def page(canvas):
    yield canvas
    canvas.set_viewport_size({"width": 1800, "height": 1050})
    canvas.evaluate("() => document.querySelectorAll('dialog.tlora-large').forEach(dialog => dialog.close())")
    assert ours(canvas.complaints) == []


def show(page, steps: list, prompts: list, **more) -> None:
    """Puts the state of a run into the panel."""
    tell(page, scored_run(steps, prompts, **more))
    page.wait_for_function("() => document.querySelector('.tlora-strip img').naturalWidth > 1")


def open_grid(page):
    page.locator(".tlora-strip .tlora-link").dispatch_event("click")  # wherever the window has the panel
    return page.locator("dialog.tlora-gallery")


def colour_of(page, element) -> tuple[int, int, int]:
    """The colour in the middle of an element that shows a picture, as the screen has it."""
    element.scroll_into_view_if_needed()
    page.wait_for_function(
        """() => [...document.querySelectorAll(".tlora-gallery img")]
        .filter(each => each.checkVisibility() && each.getBoundingClientRect().top < innerHeight)
        .every(each => each.complete)"""
    )
    shot = Image.open(io.BytesIO(element.screenshot())).convert("RGB")
    return shot.getpixel((shot.width // 2, shot.height // 2))


def test_the_grid_is_a_table_of_steps_and_prompts_with_the_scores_under_each_picture(page):
    show(page, STEPS, PROMPTS, best=300)
    gallery = open_grid(page)
    table = gallery.get_by_role("table", name="Validation pictures by step and prompt")
    assert table.get_by_role("columnheader").all_inner_texts() == ["Step", *PROMPTS]
    assert table.get_by_role("row").count() == 5
    assert page.evaluate(ROWS)[3] == [
        "step 300, best likeness 0.300 ± 0.010 obedience 0.500 ± 0.010 copying 0.200 ± 0.010",
        "likeness 0.300 obedience 0.500",
        *["obedience 0.500 copying 0.200"] * 2,
    ]
    assert table.get_by_role("rowheader").count() == 4 and gallery.locator("tr.tlora-best").count() == 1
    for validation, scores in enumerate(STEPS):
        for place, prompt in enumerate(PROMPTS):
            shown = table.get_by_label(f"Validation picture at step {scores['step']}: {prompt}", exact=True)
            assert colour_of(page, shown) == pytest.approx(colour(validation, place), abs=2)
    # All that can be reached by hand has a name.
    for control in gallery.get_by_role("button").all() + gallery.get_by_role("slider").all():
        assert control.get_attribute("aria-label") or control.inner_text()


def test_keys_move_in_the_grid_and_between_single_pictures_and_escape_closes(page):
    show(page, STEPS, PROMPTS, best=300)
    open_grid(page)
    names = [f"Validation picture at step {scores['step']}: {prompt}" for scores in STEPS for prompt in PROMPTS]
    assert page.evaluate(FOCUSED) == names[9]  # the newest, as in the panel
    keys = {"ArrowRight": 10, "ArrowUp": 7, "ArrowLeft": 6, "Home": 0, "ArrowDown": 3, "End": 11}
    for key, reached in [*keys.items(), ("ArrowDown", 11), ("ArrowRight", 11)]:
        page.keyboard.press(key)
        assert page.evaluate(FOCUSED) == names[reached], key
    assert page.locator(".tlora-gallery td [tabindex='0']").count() == 1

    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.evaluate(ALONE) == ["step 300, best", PROMPTS[2]]
    alone = page.locator(".tlora-one .tlora-crop")
    assert colour_of(page, alone) == pytest.approx(colour(2, 2), abs=2)
    assert alone.get_by_role("img").get_attribute("alt") == names[8]
    for key, at in (("ArrowRight", 9), ("ArrowUp", 6), ("Home", 0), ("ArrowLeft", 0), ("ArrowDown", 3)):
        page.keyboard.press(key)
        assert page.evaluate(ALONE)[1] == PROMPTS[at % 3], key
        assert colour_of(page, alone) == pytest.approx(colour(at // 3, at % 3), abs=2), key
    # A button that has reached its end does not take the keys with it.
    for _ in range(3):
        page.get_by_role("button", name="Step after").click(force=True)
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(ALONE) == ["step 300, best", PROMPTS[2]]
    page.get_by_role("button", name="Grid").last.click()
    assert page.evaluate(FOCUSED) == names[8]
    # The slider of the size has arrow keys of its own.
    size = page.get_by_role("slider", name="Size of the pictures")
    before, width = size.input_value(), page.locator(".tlora-gallery td .tlora-picture").first.bounding_box()["width"]
    size.focus()
    page.keyboard.press("ArrowRight")
    assert int(size.input_value()) == int(before) + 1
    assert page.locator(".tlora-gallery td .tlora-picture").first.bounding_box()["width"] == pytest.approx(width + 1)
    page.keyboard.press("Escape")
    page.locator("dialog.tlora-gallery").wait_for(state="detached")


def test_text_from_the_server_is_text_and_the_panels_picture_opens_where_it_is_clicked(page):
    """On a record as the server sends it, since a training makes no such texts."""
    hostile = "<img src=x onerror=window.hacked=1>"
    show(page, STEPS[:3], [hostile, "prompt 1"], state="failed", title=hostile, message=hostile, scores=None)
    shown = wait_for(page, "panel.state === 'failed'")
    assert shown["message"] == hostile and shown["numbers"] == "2.0 s/step2.0 GB GPU peak"

    slider = page.locator(".tlora-strip input")
    assert slider.get_attribute("aria-valuetext") == "step 300"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "step 200"
    strip = page.locator(".tlora-strip img")
    box = strip.bounding_box()
    strip.click(position={"x": 0.7 * box["width"], "y": 0.5 * box["height"]})
    large = page.locator("dialog.tlora-large")
    large.wait_for()
    assert page.evaluate(ALONE) == ["step 200", "prompt 1"]
    page.keyboard.press("ArrowDown")
    assert page.evaluate(ALONE) == ["step 300", "prompt 1"]
    page.keyboard.press("Escape")
    large.wait_for(state="detached")
    page.locator(".tlora-strip .tlora-picture").press("Enter")
    assert page.evaluate(ALONE) == ["step 200", hostile]
    large.get_by_role("button", name="Grid").click()
    assert page.evaluate("() => [window.hacked, document.querySelectorAll('.tlora img[src=x]').length]") == [None, 0]


@pytest.mark.parametrize("count, prompts", [(1, 1), (50, 10)])
@pytest.mark.parametrize("width", [420, 1800])
def test_few_and_many_pictures_fit_narrow_and_wide_windows(page, count, prompts, width):
    page.set_viewport_size({"width": width, "height": 700})
    steps = [scored_step((i + 1) * 400 // count) for i in range(count)]
    names = [f"prompt {i} with some words" for i in range(prompts)]
    show(page, steps, names, best=steps[-1]["step"])
    gallery = open_grid(page)
    box = gallery.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0 and box["y"] + box["height"] <= 700
    assert gallery.locator("td").count() == count * prompts
    for name in ("Save as picture", "Close"):
        inside = gallery.get_by_role("button", name=name).bounding_box()
        assert inside["x"] + inside["width"] <= width and inside["y"] + inside["height"] <= 700
    for key, row, place in (("Home", 0, 0), ("End", count - 1, prompts - 1)):
        page.keyboard.press(key)
        # The picture is not behind the headers, and loaded although most are not.
        page.wait_for_function(
            """() => {
            const button = document.activeElement, box = button.getBoundingClientRect();
            const corners = [[box.left + 4, box.top + 4], [box.right - 4, box.bottom - 4]];
            return corners.every(([x, y]) => button.contains(document.elementFromPoint(x, y)))
                && button.querySelector("img").complete;
        }"""
        )
        assert page.evaluate(FOCUSED) == f"Validation picture at step {steps[row]['step']}: {names[place]}"


def saved(page) -> tuple[Image.Image, str]:
    """The picture that Save as picture saves, and what the page says."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as picture").click()
    assert download.value.suggested_filename == "tlora_validation.png"
    said = page.locator(".tlora-said")
    said.get_by_text("Saved").wait_for()
    return Image.open(download.value.path()).convert("RGB"), said.inner_text()


def box_of(pixels: np.ndarray, wanted: tuple[int, int, int]) -> list[int]:
    """Left, top, right and bottom of the pixels [h, w, 3] of a colour."""
    rows, columns = np.nonzero((pixels == wanted).all(axis=2))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_grid_is_saved_as_a_picture_with_the_best_step_marked(page):
    show(page, STEPS, PROMPTS, side=200, best=300)
    open_grid(page)
    picture, said = saved(page)
    assert said == f"Saved as tlora_validation.png, {picture.width} × {picture.height} pixels."
    pixels = np.asarray(picture)
    places = {(v, p): box_of(pixels, colour(v, p)) for v in range(4) for p in range(3)}
    for (validation, place), (left, top, right, bottom) in places.items():
        assert right - left == pytest.approx(200, abs=2) and bottom - top == pytest.approx(200, abs=2)
        if place:
            assert left > places[validation, place - 1][2]
        if validation:
            assert top > places[validation - 1, place][3] + 30  # two lines of scores
    left, top, right, bottom = box_of(pixels, MARK)
    assert top < places[2, 0][1] < places[2, 0][3] < bottom < places[3, 0][1] and left < places[2, 0][0]
    assert right > places[2, 2][2]
    # Texts stand where texts belong: above the pictures, beside and below each, and the sentence at the foot.
    for left, top, right, bottom in (
        (places[0, 1][0], 0, places[0, 1][2], places[0, 1][1]),
        (0, places[3, 0][1], places[3, 0][0], places[3, 0][3]),
        (places[3, 1][0], places[3, 1][3] + 2, places[3, 1][2], places[3, 1][3] + 40),
        (0, places[3, 0][3] + 60, picture.width, picture.height),
    ):
        assert pixels[top:bottom, left:right].min() < 80


def test_a_grid_without_scores_is_saved_too_and_a_huge_one_smaller(page):
    show(page, STEPS[:2], PROMPTS[:1], scores=None)
    open_grid(page)
    picture, _ = saved(page)
    assert not (np.asarray(picture) == MARK).all(axis=2).any()
    page.keyboard.press("Escape")
    page.locator("dialog.tlora-gallery").wait_for(state="detached")
    show(page, [scored_step(8 * i) for i in range(1, 51)], PROMPTS[:1], side=400)
    open_grid(page)
    picture, said = saved(page)
    shrunk = re.fullmatch(rf"Saved as .*, {picture.width} × {picture.height} pixels. .* shrunk to (\d+)%, .*", said)
    assert shrunk and 15000 < picture.height <= 16384 and 50 < int(shrunk[1]) < 90


def test_a_picture_that_the_server_has_dropped_is_told_of(page):
    show(page, STEPS, PROMPTS)
    page.route("**/validation/2", lambda route: route.fulfill(status=404))
    open_grid(page)
    page.get_by_role("button", name="Save as picture").click()
    page.get_by_text("Not saved: a picture is no longer on the server.").wait_for()
    page.unroute("**/validation/2")
    page.complaints.clear()  # of the 404 itself
    page.keyboard.press("Escape")  # the keys are still there
    page.locator("dialog.tlora-gallery").wait_for(state="detached")
