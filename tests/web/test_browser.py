"""The quickstart in the real interface: opened from the template browser, run with the Run button, seen in pictures."""

import json

import pytest
from browser import GRAPH_IS_LOADED, RUN_MS, UNKNOWN_NODES, new_page, opened_browser, ours
from hostlib.server import PACK_NAME
from places import REPO

QUICKSTART = REPO / "workflows" / "01 Quickstart.json"
PICTURE_WIDTHS = """() => Object.fromEntries(window.app.graph.nodes.filter(node => node.type === "SaveImage")
    .map(node => [node.widgets[0].value, (node.imgs ?? []).map(picture => picture.naturalWidth)]))"""
# Where a template's card says so, in the order of the page.
LISTED = """() => [...document.querySelectorAll('[data-testid^="template-workflow-"]')]
    .map(card => card.dataset.testid.replace("template-workflow-", ""))"""


@pytest.fixture
def page(chromium):
    with opened_browser(chromium) as browser:
        yield new_page(browser)


def open_quickstart(page) -> None:
    """Through the template browser."""
    page.locator(".templates-tab-button").click()
    templates = page.get_by_test_id("template-workflows-content")
    templates.wait_for()
    page.get_by_text(PACK_NAME, exact=True).first.click()
    page.get_by_test_id("template-workflow-01 Quickstart").wait_for()
    assert page.evaluate(LISTED) == sorted(path.stem for path in QUICKSTART.parent.glob("*.json"))
    page.get_by_test_id("template-workflow-01 Quickstart").click()
    templates.wait_for(state="hidden")


def test_quickstart_opens_from_the_template_browser_and_run_makes_pictures_appear(server, page, tmp_path):
    saved = json.loads(QUICKSTART.read_text())
    # Otherwise the interface opens the template browser by itself, at a moment of its own choice.
    server.client.request("/settings/Comfy.TutorialCompleted", True)
    page.goto(server.url)
    open_quickstart(page)
    page.wait_for_function(GRAPH_IS_LOADED, arg=len(saved["nodes"]))
    assert page.evaluate(UNKNOWN_NODES) == []
    # The interface's own reading of the file: every widget has the value that the file means, and every link is there.
    shown = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    meant = server.to_prompt(QUICKSTART)
    assert {node: shown[node]["inputs"] for node in shown} == {node: meant[node]["inputs"] for node in meant}
    page.screenshot(path=tmp_path / "opened.png")

    page.evaluate("""() => {
        const training = window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage");
        training.widgets.find(widget => widget.name === "steps").value = 3;
    }""")
    page.get_by_test_id("queue-button").click()
    all_are_there = f"() => Object.values(({PICTURE_WIDTHS})()).every(widths => widths.filter(Boolean).length === 1)"
    page.wait_for_function(all_are_there, timeout=RUN_MS)
    assert sorted(page.evaluate(PICTURE_WIDTHS)) == ["tlora/quickstart"]
    page.screenshot(path=tmp_path / "pictures.png")

    page.reload()
    page.wait_for_function(GRAPH_IS_LOADED, arg=len(saved["nodes"]))
    assert page.evaluate(UNKNOWN_NODES) == []
    assert ours(page.complaints) == []
