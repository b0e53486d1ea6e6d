"""The rank schedule on the nodes: the same numbers as in Python, redrawn as values change, with the file's on Load."""

import io
import json

import pytest
from browser import load_workflow, new_page, open_interface, opened_browser, ours, set_setting
from hostlib.server import PACK_NAME
from own_files import make
from PIL import Image
from places import REPO

from tlora_core import METHODS, RankSchedule, TLoRAError

WORKFLOW = json.loads((REPO / "workflows" / "01 Quickstart.json").read_text())
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
SHOWN = """() => Object.fromEntries(window.app.graph.nodes
    .map(node => [node, node.widgets?.find(w => w.name === "tlora_schedule")])
    .filter(([, widget]) => widget).map(([node, {element}]) => [node.type, [
        element.querySelector("svg").getAttribute("aria-label"),
            Boolean(element.querySelector(".tlora-mean").getAttribute("d"))]]))"""
CARD = """() => {
    const {element} = window.app.graph.nodes.find(node => node.type === "TLoRALoad")
        .widgets.find(w => w.name === "tlora_schedule");
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
    """The quickstart in either renderer, with Train's advanced inputs, and with them its schedule, folded out."""
    set_setting(page, "Comfy.VueNodes.Enabled", request.param)
    nodes = [
        {**node, "showAdvanced": True, "size": [340, 1310]} if node["type"] == "TLoRATrainFromImage" else node
        for node in WORKFLOW["nodes"]
    ]
    load_workflow(page, {**WORKFLOW, "nodes": nodes})
    yield page
    assert ours(page.complaints) == []


def label(rank, min_rank, alpha) -> str:
    schedule = RankSchedule(rank, min_rank, alpha)
    some = ", ".join(f"{level:g}: {schedule.active_rank(level, 1)}" for level in (1, 0.75, 0.5, 0.25, 0))
    return (
        f"Active ranks: {min_rank} at pure noise, {rank} in the finished picture, alpha {alpha:g}. By noise level: "
        f"{some}."
    )


def wait_for(page, node_type, shown) -> None:
    page.wait_for_function(
        f"([type, shown]) => JSON.stringify(({SHOWN})()[type]) === JSON.stringify(shown)", arg=[node_type, shown]
    )


# A node of the first type with these values, then Clear Workflow, then one of the second type, which gets the same id.
AFTER_CLEAR = """([before, set, after]) => {
    const add = type => {
        window.app.graph.clear();
        const node = window.LiteGraph.createNode(type);
        window.app.graph.add(node);
        return node;
    };
    const old = add(before);
    for (const [name, value] of Object.entries(set)) old.widgets.find(widget => widget.name === name).value = value;
    const node = add(after);
    if (node.id !== old.id) throw Error("another id");
    return Object.fromEntries(node.widgets.map(({name, value}) => [name, value]));
}"""


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_a_new_node_after_clear_workflow_has_its_own_defaults(page, vue):
    set_setting(page, "Comfy.VueNodes.Enabled", vue)
    train = page.evaluate(AFTER_CLEAR, ["TLoRALoad", {}, "TLoRATrainFromImage"])
    assert (train["min_rank"], train["alpha"], train["class_word"]) == (32, 1, "dog")
    changed = {"rank": 96, "min_rank": 48, "alpha": 2.0, "class_word": "vase", "captions": "a vase", "flip": True}
    load = page.evaluate(AFTER_CLEAR, ["TLoRATrainFromImage", changed, "TLoRALoad"])
    assert (load["min_rank"], load["alpha"], load["strength"]) == (-1, 0, 1)
    again = page.evaluate(AFTER_CLEAR, ["TLoRATrainFromImage", changed, "TLoRATrainFromImage"])
    assert {name: again[name] for name in changed} == {name: train[name] for name in changed}
    load_workflow(page, WORKFLOW)  # whose values are not its nodes' defaults
    (steps,) = page.evaluate(
        "() => app.graph.nodes.filter(n => n.type === 'TLoRATrainFromImage').map(n => n.widgets.find(w => w.name === "
        "'steps').value)"
    )
    assert steps and ours(page.complaints) == []


def test_formula_is_that_of_the_python_code(page):
    curves = ["0:64, 0.5:48, 1:32", "0.2:7; 0.25:60, 0.9:0", "0:1, 1:64"]
    schedules = [(64, 32, 1.0), (64, 0, 1.0), (16, 16, 1.0), (7, 3, 0.5), (128, 1, 2.0), (33, 10, 0.35)]
    levels = [i / 400 for i in range(401)]
    shown = page.evaluate(
        f"""async ([schedules, levels]) => {{
        const {{activeRank, pointsOf}} = await import("/extensions/{PACK_NAME}/schedule.js");
        return schedules.map(([rank, min_rank, alpha, curve]) => levels.map(level =>
            activeRank({{rank, min_rank, alpha, points: pointsOf(curve)}}, level)));
    }}""",
        [[(*schedule, "") for schedule in schedules] + [(64, 0, 1.0, curve) for curve in curves], levels],
    )
    wanted = [RankSchedule(*schedule) for schedule in schedules] + [
        RankSchedule.from_text(64, 0, 1.0, curve) for curve in curves
    ]
    for schedule, ranks in zip(wanted, shown, strict=True):
        assert ranks == [schedule.active_rank(level, 1) for level in levels], schedule


def test_curve_is_read_as_python_reads_it(page):
    texts = [
        "",
        "  ",
        "0:64, 1:32",
        "0:64",
        "1:3, 0:4",
        "0:4, 0:3",
        "a",
        "0:1:2, 1:1",
        "0:-1, 1:2",
        "-0.1:2, 1:2",
        "0:2, 1.5:2",
        ",0:2,;1:2,",
    ]

    def python(text):
        try:
            return [list(point) for point in RankSchedule.from_text(64, 0, 1.0, text).points]
        except TLoRAError:
            return None

    shown = page.evaluate(
        f"""async texts => {{
        const {{pointsOf}} = await import("/extensions/{PACK_NAME}/schedule.js");
        return texts.map(pointsOf);
    }}""",
        texts,
    )
    assert dict(zip(texts, shown)) == {text: python(text) for text in texts}


def test_curve_follows_the_values_of_train_and_apply_follows_train(graph):
    for values in ({"rank": 40, "min_rank": 8, "alpha": 2.0}, {"rank": 16, "min_rank": 16, "alpha": 1.0}):
        graph.evaluate(SET, ["TLoRATrainFromImage", values])
        for node_type in ("TLoRATrainFromImage", "TLoRAApply"):
            wait_for(graph, node_type, [label(**values), True])
    graph.evaluate(SET, ["TLoRATrainFromImage", {"min_rank": 17}])
    wait_for(graph, "TLoRATrainFromImage", ["min_rank is 17, which is above rank (16).", False])
    for method, traits in METHODS.items():
        graph.evaluate(SET, ["TLoRATrainFromImage", {"min_rank": 4, "method": method}])
        wait_for(graph, "TLoRATrainFromImage", [label(16, 4 if traits.is_masked else 16, 1.0), True])


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


def look_at_schedule(page) -> None:
    """Brings the Train node's chart to where nothing of the interface covers it."""
    page.evaluate("""async () => {
        const frame = () => new Promise(requestAnimationFrame);
        const node = window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage"), {canvas} = window.app;
        canvas.ds.scale = 1;
        canvas.ds.offset = [-node.pos[0] + 300, -node.pos[1] + 100];
        for (let i = 0; i < 10; i++) {
            canvas.setDirty(true, true);
            await frame();
            const {left, top} = node.widgets.find(widget => widget.name === "tlora_schedule")
                .element.getBoundingClientRect();
            canvas.ds.offset = [canvas.ds.offset[0] + 400 - left, canvas.ds.offset[1] + 400 - top];
        }
    }""")
    page.wait_for_timeout(300)


# Another graph was opened: how often the nodes of the old and of the new one are looked at when something changes.
LOOKED_AT = f"""async subgraph => {{
    const {{changed}} = await import("/extensions/{PACK_NAME}/graph.js");
    const train = () => window.app.rootGraph.getNodeById(subgraph).subgraph
        .nodes.find(node => node.type === "TLoRATrainFromImage");
    const old = train(), saved = window.app.rootGraph.serialize();
    await window.app.loadGraphData(saved);
    return [old, train()].map(node => {{
        const {{widgets}} = node;
        let looks = 0;
        Object.defineProperty(node, "widgets", {{configurable: true, get: () => (looks++, widgets)}});
        changed();
        Object.defineProperty(node, "widgets", {{configurable: true, writable: true, value: widgets}});
        return looks;
    }});
}}"""


def test_nodes_in_a_subgraph_of_a_graph_that_was_closed_are_let_go_and_those_of_the_open_one_are_not(graph):
    subgraph = graph.evaluate("""() => {
        const train = window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage");
        return window.app.graph.convertToSubgraph(new Set([train])).node.id;
    }""")
    for _ in range(2):
        old, new = graph.evaluate(LOOKED_AT, subgraph)
        assert old == 0 and new > 0


def test_every_pixel_of_the_curve_can_be_read_by_pointing(graph):
    graph.evaluate(SET, ["TLoRATrainFromImage", {"rank": 10, "min_rank": 0, "alpha": 1.0, "method": "tlora"}])
    look_at_schedule(graph)
    chart = graph.locator(".tlora-schedule svg").first
    box = chart.bounding_box()
    graph.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    graph.get_by_text("7 ranks at noise 0.25").wait_for()


def test_no_curve_is_drawn_of_values_that_come_from_another_node(graph):
    own = {"rank": 40, "min_rank": 8, "alpha": 2.0}
    graph.evaluate(SET, ["TLoRATrainFromImage", {**own, "method": "tlora", "curve": ""}])
    for name in ("rank", "min_rank"):
        graph.evaluate(
            """name => {
            const number = window.LiteGraph.createNode("PrimitiveInt");
            window.app.graph.add(number);
            const train = window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage");
            number.connect(0, train, train.inputs.findIndex(input => input.name === name));
        }""",
            name,
        )
        wait_for(
            graph,
            "TLoRATrainFromImage",
            [f"{name} comes from a connected node, so the ranks are unknown here.", False],
        )
        wait_for(graph, "TLoRAApply", ["Uses the schedule of the connected T-LoRA.", False])
        graph.evaluate(
            "() => window.app.graph.remove(window.app.graph.nodes.find(node => node.type === 'PrimitiveInt'))"
        )
        wait_for(graph, "TLoRATrainFromImage", [label(**own), True])


def test_a_method_without_a_mask_has_no_curve_to_bend(graph):
    graph.evaluate(
        SET, ["TLoRATrainFromImage", {"rank": 20, "min_rank": 10, "alpha": 1.0, "method": "lora", "curve": ""}]
    )
    wait_for(graph, "TLoRATrainFromImage", [label(20, 20, 1.0), True])
    look_at_schedule(graph)
    chart = graph.locator(".tlora-schedule svg").first
    box = chart.bounding_box()
    graph.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert (
        graph.evaluate("""() => window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage")
        .widgets.find(widget => widget.name === "curve").value""")
        == ""
    )
    assert chart.locator("..").get_attribute("title") == ""


def test_curve_is_bent_with_mouse_and_keys(graph):
    graph.evaluate(SET, ["TLoRATrainFromImage", {"rank": 20, "min_rank": 10, "alpha": 1.0, "method": "tlora"}])
    look_at_schedule(graph)
    box = graph.locator(".tlora-schedule svg").first.bounding_box()

    def at(level, rank):
        return box["x"] + box["width"] * (1 - level), box["y"] + box["height"] * (1 - rank / (20 * 1.15))

    def curve():
        return graph.evaluate("""() => window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage")
            .widgets.find(widget => widget.name === "curve").value""")

    graph.mouse.dblclick(*at(0.5, 4))
    handles = graph.locator(".tlora-handle")
    handles.nth(2).wait_for()
    assert curve() == "0:20, 0.5:4, 1:10"
    x, y = at(0.5, 4)
    graph.mouse.move(x + 10, y)  # a point is taken hold of from beside it, too
    graph.mouse.down()
    graph.mouse.move(*at(0.25, 16), steps=4)
    graph.mouse.up()
    assert curve() == "0:20, 0.25:16, 1:10"
    handles.nth(1).focus()
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        graph.keyboard.press(key)
    assert curve() == "0:20, 0.35:17, 1:10"
    assert "noise 0.35, rank 17" in handles.nth(1).get_attribute("aria-label")
    wait_for(
        graph,
        "TLoRATrainFromImage",
        [
            "Active ranks on a free curve: 0:20, 0.35:17, 1:10. By noise level: 1: 10, 0.75: 12, 0.5: 15, 0.25: 17, "
            "0: 20.",
            True,
        ],
    )
    graph.keyboard.press("Delete")
    assert curve() == "0:20, 1:10"
    graph.keyboard.press("Delete")
    assert curve() == "" and handles.count() == 0
