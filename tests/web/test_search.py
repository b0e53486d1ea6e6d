"""The interface's node search: the words of people who look for the pack's nodes."""

import pytest
from browser import new_page, open_interface, opened_browser, ours

TYPED = ["lora", "t-lora", "tlora", "T-LoRA", "subject", "single image", "character", "concept"]
FIRST = {"TLoRATrainFromImage", "TLoRALoad", "TLoRAApply"}
# As the interface's search box asks.
FOUND = """async typed => {
    const stores = document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s;
    const found = () => stores.get("nodeDef").nodeSearchService.searchNode(typed, [], {limit: 64}).map(({name}) =>
        name);
    found(); // the first search makes the store of how much each node is used
    await stores.get("nodeFrequency").loadNodeFrequencies();
    return found();
}"""


@pytest.fixture(scope="module")
def page(chromium, server):
    with opened_browser(chromium) as browser:
        page = new_page(browser)
        open_interface(page, server)
        yield page
        assert ours(page.complaints) == []


@pytest.mark.parametrize("typed", TYPED)
def test_train_load_and_apply_are_among_the_first_five(page, typed):
    assert FIRST <= set(page.evaluate(FOUND, typed)[:5])


def test_the_hosts_own_nodes_stay_first_in_other_searches(page):
    """The host's own nodes keep their places if the pack's are not meant."""
    assert {"LoraLoader", "LoraLoaderModelOnly"} <= set(page.evaluate(FOUND, "lora")[:8])
    assert page.evaluate(FOUND, "load")[:2] == ["LoadImage", "CheckpointLoaderSimple"]
    assert not FIRST & set(page.evaluate(FOUND, "image")[:10])


def test_the_search_box_shows_them(page):
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.locator("input:focus").fill("concept")
    page.get_by_text("Train T-LoRA from Image").first.wait_for()
