"""A page of the real interface for the browser tests."""

from contextlib import contextmanager

from hostlib.server import PACK_NAME
from playwright.sync_api import sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A busy machine may need long; a failure still ends.
STEP_MS, RUN_MS = 120_000, 300_000
GRAPH_IS_LOADED = "count => window.app?.graph?.nodes?.length === count"
UNKNOWN_NODES = """() => window.app.graph.nodes
    .filter(node => node.has_errors || !(node.type in window.LiteGraph.registered_node_types)).map(node => node.type)"""
IS_READY = """() => window.app?.extensionManager?.workflow?.activeWorkflow
    && window.LiteGraph.registered_node_types.TLoRALoad"""
# A warning is ours when our code led to it.
WARNINGS_SAY_WHERE = "const warn = console.warn; console.warn = (...words) => warn(...words, new Error().stack);"


@contextmanager
def opened_browser(chromium: str):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def new_page(browser, pixels: int = 1):
    """A page without history; `page.complaints` collects what goes wrong in it. `pixels`: of the screen in one of the
    page."""
    page = browser.new_page(viewport={"width": 1800, "height": 1050}, device_scale_factor=pixels)
    page.set_default_timeout(STEP_MS)
    page.complaints = []
    page.add_init_script(WARNINGS_SAY_WHERE)
    page.on("pageerror", lambda error: page.complaints.append(f"{error}\n{error.stack}"))
    page.on(
        "console",
        lambda message: (
            page.complaints.append(f"{message.text} ({message.location['url']})")
            if message.type in ("error", "warning")
            else None
        ),
    )
    page.on(
        "response",
        lambda answer: (
            page.complaints.append(f"{answer.status} {answer.url}")
            if answer.status >= 400 and (PACK_NAME in answer.url or "/tlora/" in answer.url)
            else None
        ),
    )
    return page


def ours(complaints: list[str]) -> list[str]:
    """Those that name the pack's files, nodes or events; an offline machine gives the interface others of its own."""
    return [
        text for text in complaints if PACK_NAME in text or "TLoRA" in text or "/tlora/" in text or "tlora." in text
    ]


def open_interface(page, server) -> None:
    # Otherwise the interface opens the template browser by itself, at a moment of its own choice.
    server.client.request("/settings/Comfy.TutorialCompleted", True)
    page.goto(server.url)
    page.wait_for_function(IS_READY)


def open_canvas(browser, server):
    """A new page of the interface in the canvas renderer."""
    page = new_page(browser)
    open_interface(page, server)
    set_setting(page, "Comfy.VueNodes.Enabled", False)
    return page


def load_workflow(page, workflow: dict) -> None:
    """As if the file were dropped on the page."""
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    page.wait_for_function(GRAPH_IS_LOADED, arg=len(workflow["nodes"]))


def set_setting(page, name: str, value) -> None:
    page.evaluate("([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value])
