"""The help pages in the interface: short enough to be read, and as wide as the panel they stand in."""

import re

import pytest
from browser import new_page, open_interface, opened_browser
from hostlib.server import PACK_NAME
from places import REPO

DOCS = REPO / "web" / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
LINKED = sorted(path.name for path in (DOCS / "train").glob("*.html"))
# Opens a node's help in the panel on the right.
OPEN = """type => {
    const {app, LiteGraph} = window, node = LiteGraph.createNode(type);
    app.graph.clear();
    app.graph.add(node);
    app.canvas.selectNode(node);
    document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s.get("rightSidePanel").openPanel("info");
}"""
TOO_WIDE = """() => {
    const page = document.querySelector(".node-help-content"), right = page.getBoundingClientRect().right;
    return [...page.querySelectorAll("*"), page].filter(part => part.scrollWidth > part.clientWidth + 1
        && part.clientWidth
        || part.getBoundingClientRect().right > right + 1)
            .map(part => `${part.tagName} ${part.textContent.slice(0, 60)}`);
}"""


@pytest.fixture(scope="module")
def page(chromium, server):
    with opened_browser(chromium) as browser:
        page = new_page(browser)
        page.set_viewport_size({"width": 1366, "height": 768})
        open_interface(page, server)
        yield page


def test_the_train_page_can_be_read_in_two_minutes():
    assert len((DOCS / "TLoRATrainFromImage.md").read_text(encoding="utf-8").split()) <= 450


@pytest.mark.parametrize("node", PAGES)
def test_no_page_scrolls_sideways(page, node):
    page.evaluate(OPEN, node)
    title = (DOCS / f"{node}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    page.locator(".node-help-content h1", has_text=re.compile(f"^{re.escape(title)}$")).wait_for(timeout=20_000)
    page.wait_for_timeout(200)
    assert page.evaluate(TOO_WIDE) == []


def test_links_lead_to_pages_that_fit_a_narrow_window(page, server):
    page.evaluate(OPEN, "TLoRATrainFromImage")
    for name in LINKED:
        with page.expect_popup() as opened:
            page.locator(f'.node-help-content a[href$="/train/{name}"]').click()
        linked = opened.value
        linked.set_viewport_size({"width": 360, "height": 700})
        assert linked.url == f"{server.url}/extensions/{PACK_NAME}/docs/train/{name}"
        linked.locator("h1").wait_for()
        assert linked.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        linked.close()
