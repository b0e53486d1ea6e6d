"""The quickstart in the real interface: opened from the template browser, run with the Run button, seen in pictures."""
import json
from pathlib import Path

import pytest
from hostlib.server import PACK_NAME
from playwright.sync_api import sync_playwright

REPO = Path(__file__).resolve().parents[1]
QUICKSTART = REPO / "workflows" / "quickstart.json"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
# A busy machine may need long; a failure still ends.
STEP_MS, RUN_MS = 120_000, 300_000
GRAPH_IS_LOADED = "count => window.app?.graph?.nodes?.length === count"
UNKNOWN_NODES = """() => window.app.graph.nodes
    .filter(node => node.has_errors || !(node.type in window.LiteGraph.registered_node_types)).map(node => node.type)"""
PICTURE_WIDTHS = """() => Object.fromEntries(window.app.graph.nodes.filter(node => node.type === "SaveImage")
    .map(node => [node.widgets[0].value, (node.imgs ?? []).map(picture => picture.naturalWidth)]))"""


@pytest.fixture
def page(chromium, tmp_path):
    """A page of a browser without history; `page.complaints` collects what goes wrong in the page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1800, "height": 1050})
        page.set_default_timeout(STEP_MS)
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(f"{error}\n{error.stack}"))
        page.on("console", lambda message: page.complaints.append(f"{message.text} ({message.location['url']})")
                if message.type == "error" else None)
        page.on("response", lambda answer: page.complaints.append(f"{answer.status} {answer.url}")
                if answer.status >= 400 and PACK_NAME in answer.url else None)
        yield page
        browser.close()


def ours(complaints: list[str]) -> list[str]:
    """Those that name the pack's files or nodes; an offline machine gives the interface others of its own."""
    return [text for text in complaints if PACK_NAME in text or "TLoRA" in text]


def open_quickstart(page) -> None:
    """Through the template browser."""
    page.locator(".templates-tab-button").click()
    templates = page.get_by_test_id("template-workflows-content")
    templates.wait_for()
    page.get_by_text(PACK_NAME, exact=True).first.click()
    page.get_by_test_id("template-workflow-quickstart").click()
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
    all_are_there = f"() => Object.values(({PICTURE_WIDTHS})()).every(widths => widths.filter(Boolean).length === 4)"
    page.wait_for_function(all_are_there, timeout=RUN_MS)
    assert sorted(page.evaluate(PICTURE_WIDTHS)) == ["tlora/with", "tlora/without"]
    page.screenshot(path=tmp_path / "pictures.png")

    page.reload()
    page.wait_for_function(GRAPH_IS_LOADED, arg=len(saved["nodes"]))
    assert page.evaluate(UNKNOWN_NODES) == []
    assert ours(page.complaints) == []
