"""Make docs/screenshots, and the pictures of the help pages: the pack in the real interface, on real trainings of the
tiny base.

    python3 tools/host.py python tools/screenshots.py [panel schedule comparison]

Needs Chromium; some minutes, most of them the trainings of the comparison.
"""

import json
import sys
from pathlib import Path

from hostlib.build import ensure_test_packages
from hostlib.chromium import find_chromium
from hostlib.server import own_server

REPO = Path(__file__).resolve().parents[1]
SCREENSHOTS, HELP = REPO / "docs" / "screenshots", REPO / "web" / "docs" / "pictures"
sys.path += [str(REPO / "tests" / "helpers"), str(ensure_test_packages(Path(sys.executable)))]

from browser import RUN_MS, load_workflow, new_page, open_interface, opened_browser, set_setting  # noqa: E402

PAD, TITLE = 14, 30  # pixels around a node, and its title's height
SCREEN = {"width": 1366, "height": 768}
LEFT, TOP = 400, 110  # of a node that is shot, beside and below the interface's own bars
# Puts a node there, at most as large as `scale` and with its foot on the page, and gives the scale, its width and its
# height.
LOOK_AT = """async ([title, scale]) => {
    const {graph, canvas} = window.app, node = graph.nodes.find(node => node.getTitle().endsWith(title));
    canvas.deselectAll();
    scale = Math.min(scale, (innerHeight - 140) / node.size[1]);
    canvas.ds.scale = scale;
    canvas.ds.offset = [LEFT / scale - node.pos[0], TOP / scale - node.pos[1]];
    canvas.setDirty(true, true);
    await new Promise(resolve => setTimeout(resolve, 700));
    return [scale, node.size[0] * scale, node.size[1] * scale];
}""".replace("LEFT", str(LEFT)).replace("TOP", str(TOP))
# Moves the canvas until a panel is where nothing of the interface covers it.
BRING = """async selector => {
    const {canvas} = window.app, frame = () => new Promise(requestAnimationFrame);
    for (let i = 0; i < 10; i++) {
        const {left, top} = document.querySelector(selector).getBoundingClientRect();
        canvas.ds.offset = [canvas.ds.offset[0] + (500 - left) / canvas.ds.scale,
            canvas.ds.offset[1] + (300 - top) / canvas.ds.scale];
        canvas.setDirty(true, true);
        await frame();
        await frame();
    }
}"""
SET = """([type, values]) => window.app.graph.nodes.filter(node => node.type === type).forEach(node => {
    for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
})"""


def workflow(name: str) -> dict:
    return json.loads((REPO / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def shoot(page, name: str, title: str) -> None:
    """One node, by its title, as large as the screen has room for."""
    scale, width, height = page.evaluate(LOOK_AT, [title, 1.0])
    page.mouse.move(20, 700)
    path, above = SCREENSHOTS / f"{name}.png", TITLE * scale
    page.screenshot(
        path=path,
        clip={"x": LEFT - PAD, "y": TOP - above - PAD, "width": width + 2 * PAD, "height": height + above + 2 * PAD},
    )
    print(path.relative_to(REPO))


def element(page, path: Path, selector: str) -> None:
    """One of the pack's panels, by a CSS selector."""
    page.locator(selector).first.screenshot(path=path)
    print(path.relative_to(REPO))


def run(page) -> None:
    page.get_by_test_id("queue-button").click()


def panel(page) -> None:
    """The Train node in the middle of the quickstart's training, with scores."""
    load_workflow(page, workflow("01 Quickstart"))
    values = {"batch_size": 2, "validate_every": 25, "scorer": "tiny world", "file_name": "screenshots/panel"}
    page.evaluate(SET, ["TLoRATrainFromImage", values])
    set_setting(page, "Comfy.VueNodes.Enabled", True)
    run(page)
    page.wait_for_function(
        "() => document.querySelector('.tlora-strip:not([hidden])') && /^2[1-9]\\d /.test("
        "document.querySelector('.tlora-panel[data-state=running] .tlora-row .tlora-strong')?.textContent)",
        timeout=3 * RUN_MS,
    )
    shoot(page, "train_node", "Train T-LoRA from Image")
    element(page, HELP / "panel_dark.png", ".tlora-panel[data-state]")
    set_setting(page, "Comfy.VueNodes.Enabled", False)


def schedule(page) -> None:
    """The Apply node while a sampler runs, and a curve bent by hand."""
    load_workflow(page, workflow("01 Quickstart"))
    page.evaluate(
        SET,
        [
            "TLoRATrainFromImage",
            {"steps": 20, "batch_size": 1, "validate_every": 0, "file_name": "screenshots/schedule"},
        ],
    )
    run(page)
    page.evaluate(LOOK_AT, ["Apply T-LoRA", 1.0])
    page.wait_for_function(
        "() => Number(document.querySelector('.tlora-live')?.style.left.replace('%', '')) > 40", timeout=RUN_MS
    )
    element(page, HELP / "schedule_sampling.png", ".tlora-panel:has(.tlora-live)")
    page.evaluate(SET, ["TLoRATrainFromImage", {"curve": "0:32, 0.35:28, 0.6:12, 1:6"}])
    page.evaluate("""() => {
        const node = window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage");
        node.showAdvanced = true; // where the curve is bent
        node.widgets[0].callback?.();
    }""")
    page.evaluate(BRING, ".tlora-panel:has(.tlora-handle)")
    page.wait_for_timeout(300)
    element(page, HELP / "schedule_curve.png", ".tlora-panel:has(.tlora-handle)")


def comparison(page) -> None:
    """The sheet that the template comparing LoRA with T-LoRA makes."""
    load_workflow(page, workflow("07 LoRA against T-LoRA"))
    run(page)
    page.wait_for_function(
        "() => window.app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.length", timeout=6 * RUN_MS
    )
    source = page.evaluate("() => window.app.graph.nodes.find(node => node.type === 'SaveImage').imgs[0].src")
    path = SCREENSHOTS / "comparison.png"
    path.write_bytes(page.request.get(source).body())
    print(path.relative_to(REPO))


SHOTS = {"panel": panel, "schedule": schedule, "comparison": comparison}


def main(names: list[str]) -> None:
    for folder in (SCREENSHOTS, HELP):
        folder.mkdir(parents=True, exist_ok=True)
    with own_server() as server, opened_browser(find_chromium()) as browser:
        for name in names or SHOTS:
            page = new_page(browser, pixels=2)
            page.set_viewport_size(SCREEN)
            open_interface(page, server)
            SHOTS[name](page)
            page.close()
            server.client.interrupt()


if __name__ == "__main__":
    main(sys.argv[1:])
