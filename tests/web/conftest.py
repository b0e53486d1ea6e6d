"""Pages that several modules open in the same way."""

import pytest
from browser import open_canvas, opened_browser


@pytest.fixture(scope="module")
def browser(chromium):
    with opened_browser(chromium) as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    """The interface in the canvas renderer, on a page of its own. A training that it leaves ends with it."""
    page = open_canvas(browser, server)
    yield page
    page.close()
    server.client.interrupt()
