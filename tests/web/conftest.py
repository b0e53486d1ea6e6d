"""Pages that several modules open in the same way."""

import pytest
from browser import new_page, open_interface, opened_browser, set_setting


@pytest.fixture(scope="module")
def browser(chromium):
    with opened_browser(chromium) as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    """The interface in the canvas renderer, on a page of its own. A training that it leaves ends with it."""
    page = new_page(browser)
    open_interface(page, server)
    set_setting(page, "Comfy.VueNodes.Enabled", False)
    yield page
    page.close()
    server.client.interrupt()
