"""The rank schedule on the nodes: the same numbers as in Python, redrawn as values change, with the file's on Load."""
import io
import itertools
import json
from pathlib import Path

import pytest
from browser import load_workflow, new_page, open_interface, opened_browser, ours, set_setting
from hostlib.server import PACK_NAME
from PIL import Image
from test_file import make

from tlora_core import RankSchedule

WORKFLOW = json.loads((Path(__file__).resolve().parents[1] / "workflows" / "quickstart.json").read_text())
# As a user's change of a widget does.
SET = """([type, values]) => {
    const node = window.app.graph.nodes.find(node => node.type === type);
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find(widget => widget.name === name);
        widget.value = value;
        widget.callback?.(value);
    }
}"""
ADD = """type => {
    const node = window.LiteGraph.createNode(type);
    node.pos = [40, 1400];
    window.app.graph.add(node);
}"""
# By node type: the picture's text for those who cannot see it, and whether a line is drawn.
SHOWN = """() => Object.fromEntries(window.app.graph.nodes.map(node => [node, node.widgets?.find(w => w.name === "tlora_schedule")])
    .filter(([, widget]) => widget).map(([node, {element}]) => [node.type, [
        element.querySelector("svg").getAttribute("aria-label"), Boolean(element.querySelector(".tlora-mean").getAttribute("d"))]]))"""
CARD = """() => {
    const {element} = window.app.graph.nodes.find(node => node.type === "TLoRALoad").widgets.find(w => w.name === "tlora_schedule");
    const picture = element.querySelector(".tlora-card img");
    return [element.querySelector(".tlora-phrase").textContent, element.querySelector(".tlora-caption").textContent,
            picture.hidden ? 0 : picture.naturalWidth];
}"""

OVERFLOWING = """() => window.app.graph.nodes.flatMap(node => node.widgets ?? []).map(widget => widget.element)
    .filter(element => element?.isConnected && element.classList.contains("tlora")
        && (element.scrollHeight > element.clientHeight + 1 || element.scrollWidth > element.clientWidth + 1))
    .map(element => `${element.textContent}: ${element.scrollHeight} > ${element.clientHeight}`)"""


@pytest.fixture(scope="module")
def page(chromium, server):
    small = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 40)).save(small, "JPEG")
    folder = server.workspace / "models" / "loras" / "card"
    folder.mkdir(parents=True)
    make(token="<b>sks</b>", class_word="dog").save(folder / "marked.safetensors", thumbnail=small.getvalue())
    with opened_browser(chromium) as browser:
        page = new_page(browser)
        open_interface(page, server)
        yield page


@pytest.fixture(params=[False, True], ids=["canvas", "vue"])
def graph(page, request):
    """The quickstart in either renderer."""
    set_setting(page, "Comfy.VueNodes.Enabled", request.param)
    load_workflow(page, WORKFLOW)
    yield page
    assert ours(page.complaints) == []


def label(rank, min_rank, alpha) -> str:
    schedule = RankSchedule(rank, min_rank, alpha)
    some = ", ".join(f"{level:g}: {schedule.active_rank(level, 1)}" for level in (1, 0.75, 0.5, 0.25, 0))
    return f"Active ranks: {min_rank} at pure noise, {rank} in the finished picture, alpha {alpha:g}. By noise level: {some}."


def wait_for(page, node_type, shown) -> None:
    page.wait_for_function(f"([type, shown]) => JSON.stringify(({SHOWN})()[type]) === JSON.stringify(shown)", arg=[node_type, shown])


def test_formula_is_that_of_the_python_code(page):
    schedules = [(64, 32, 1.0), (64, 0, 1.0), (16, 16, 1.0), (7, 3, 0.5), (128, 1, 2.0), (33, 10, 0.35)]
    levels = [i / 400 for i in range(401)]
    shown = page.evaluate(f"""async ([schedules, levels]) => {{
        const {{activeRank}} = await import("/extensions/{PACK_NAME}/schedule.js");
        return schedules.map(([rank, min_rank, alpha]) => levels.map(level => activeRank({{rank, min_rank, alpha}}, level)));
    }}""", [schedules, levels])
    for schedule, ranks in zip(schedules, shown):
        assert ranks == [RankSchedule(*schedule).active_rank(level, 1) for level in levels], schedule


def test_curve_follows_the_values_of_train_and_apply_follows_train(graph):
    for values in ({"rank": 40, "min_rank": 8, "alpha": 2.0}, {"rank": 16, "min_rank": 16, "alpha": 1.0}):
        graph.evaluate(SET, ["TLoRATrainFromImage", values])
        for node_type in ("TLoRATrainFromImage", "TLoRAApply"):
            wait_for(graph, node_type, [label(**values), True])
    graph.evaluate(SET, ["TLoRATrainFromImage", {"min_rank": 17}])
    wait_for(graph, "TLoRATrainFromImage", ["min_rank is 17, above the rank, which is 16.", False])
    graph.evaluate(SET, ["TLoRATrainFromImage", {"min_rank": 4, "method": "lora"}])
    wait_for(graph, "TLoRATrainFromImage", [label(16, 16, 1.0), True])


def test_load_shows_the_files_phrase_picture_and_schedule_as_text_and_its_own_values_count(graph):
    graph.evaluate(ADD, "TLoRALoad")
    graph.evaluate(SET, ["TLoRALoad", {"file": "card/marked.safetensors"}])
    wait_for(graph, "TLoRALoad", [label(4, 2, 1.0), True])
    graph.wait_for_function(f"() => ({CARD})()[2] > 0")
    assert graph.evaluate(CARD) == ["<b>sks</b> dog", "tlora · rank 4 · sdxl", 64]
    graph.evaluate(SET, ["TLoRALoad", {"min_rank": 1, "alpha": 0.5}])
    wait_for(graph, "TLoRALoad", [label(4, 1, 0.5), True])


def test_panels_stay_inside_their_nodes(graph):
    graph.evaluate(ADD, "TLoRALoad")
    graph.wait_for_timeout(300)
    assert graph.evaluate(OVERFLOWING) == []


def test_every_pixel_of_the_curve_can_be_read_by_pointing(graph):
    graph.evaluate(SET, ["TLoRATrainFromImage", {"rank": 10, "min_rank": 0, "alpha": 1.0, "method": "tlora"}])
    graph.evaluate("""() => {
        const node = window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage");
        window.app.canvas.ds.scale = 1;
        window.app.canvas.ds.offset = [-node.pos[0] + 300, -node.pos[1] + 100];
        window.app.canvas.setDirty(true, true);
    }""")
    graph.wait_for_timeout(500)
    chart = graph.locator(".tlora-schedule svg").first
    box = chart.bounding_box()
    graph.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    graph.get_by_text("7 ranks at noise 0.25").wait_for()


def test_texts_exist_in_each_language():
    locales = Path(__file__).resolve().parents[1] / "locales"
    texts = {folder.name: json.loads((folder / "main.json").read_text(encoding="utf-8"))["tlora"] for folder in locales.iterdir()}
    for one, other in itertools.permutations(texts, 2):
        assert texts[one].keys() == texts[other].keys(), (one, other)
