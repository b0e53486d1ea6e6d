"""The training panel in the real interface, on real trainings: what it shows, what outlives a reload, and its
buttons."""

import re

import pytest
from browser import load_workflow, new_page, open_interface, opened_browser, ours, set_setting
from graphs import TinyGraph, bake, difference, pixels
from panel_page import ONLY_TRAINING, PANEL, QUICKSTART, TRAIN, begin, wait_for

ARE_LISTED = """names => {
    const options = window.LiteGraph.createNode("TLoRALoad")
        .widgets.find(widget => widget.name === "file").options.values;
    return names.every(name => (typeof options === "function" ? options() : options).includes(name));
}"""


# A run as the server tells of it.
RUN = {
    "id": "x",
    "sequence": 1,
    "node": str(TRAIN),
    "workflow": None,
    "owner": "this graph's",
    "title": "Train",
    "state": "running",
    "step": 3,
    "steps": 9,
    "points": [[1, 0.5, 0.5], [2, 0.25, 0.4], [3, 0.75, 0.5]],
    "rate": 0.5,
    "left": 12,
    "memory": 2048,
    "memory_kind": "device peak",
    "pictures": [],
    "wishes": [],
    "message": "",
    "file": "",
}


@pytest.fixture(scope="module")
def browser(chromium):
    with opened_browser(chromium) as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    page = new_page(browser)
    open_interface(page, server)
    set_setting(page, "Comfy.VueNodes.Enabled", False)
    yield page
    page.close()
    server.client.interrupt()


def tell(page, run: dict) -> None:
    """As an event of the server does, of a run that the open graph has begun."""
    page.evaluate(
        """run => import("/scripts/api.js").then(({api}) => {
        window.app.graph.getNodeById(run.node).properties.tlora_run = run.owner;
        api.dispatchEvent(new CustomEvent("tlora.training", {detail: run}));
    })""",
        run,
    )


def press(page, text: str) -> None:
    page.evaluate(
        "text => [...document.querySelectorAll('.tlora-buttons button')].find(b => b.textContent === text).click()",
        text,
    )


def test_panel_outlives_reload_tabs_and_renderers_and_stop_and_keep_gives_a_usable_file(page, browser, server):
    load_workflow(page, QUICKSTART)
    idle = page.evaluate(PANEL, TRAIN)
    assert idle["state"] == "idle" and idle["enabled"] == [False, False]
    begin(page, 5000, seed=1)
    first = wait_for(page, "panel.state === 'running' && panel.step > 2")
    assert (
        first["steps"] == 5000
        and first["enabled"] == [True, True]
        and "RAM" in first["numbers"]
        and "left" in first["numbers"]
    )
    later = wait_for(page, f"panel.step > {first['step'] + 3}")
    assert later["points"] == later["step"] > first["points"]

    # A copy has had no training, and collapsing loses nothing.
    copy = page.evaluate(
        """id => {
        const node = window.app.graph.getNodeById(id), copy = node.clone();
        window.app.graph.add(copy);
        node.collapse();
        return copy.id;
    }""",
        TRAIN,
    )
    assert page.evaluate(PANEL, copy)["state"] == "idle"
    page.evaluate("id => window.app.graph.getNodeById(id).collapse()", TRAIN)
    wait_for(page, "panel.connected && panel.step > 0")

    # The same template opened again has had no training, though its ids are the same; coming back to the graph, all is
    # there.
    saved = page.evaluate("() => window.app.graph.serialize()")
    load_workflow(page, QUICKSTART)
    assert page.evaluate(PANEL, TRAIN)["state"] == "idle"
    load_workflow(page, saved)
    wait_for(page, f"panel.state === 'running' && panel.points > {later['step']}")

    # The other renderer shows the same element, and the reload finds the curve from its first step.
    set_setting(page, "Comfy.VueNodes.Enabled", True)
    wait_for(page, "panel.connected && panel.step > 0")
    page.reload()
    back = wait_for(page, "panel.state === 'running' && panel.connected")
    assert back["points"] >= back["step"] - 3 > later["step"] - 3
    set_setting(page, "Comfy.VueNodes.Enabled", False)
    second = new_page(browser)
    open_interface(second, server)
    load_workflow(second, saved)
    seen = wait_for(second, "panel.state === 'running'")
    assert seen["points"] >= back["step"] - 3

    press(page, "Checkpoint now")
    press(page, "Stop and keep")
    for each in (page, second):
        ended = wait_for(each, "panel.state === 'stopped'")
        assert (
            0 < ended["step"] < 5000
            and ended["enabled"] == [False, False]
            and "Saved as panel/trained" in ended["message"]
        )
        name = ended["message"].removeprefix("Saved as ").removesuffix(".")
        # Without a restart or Refresh, the lists have the new file.
        each.wait_for_function(ARE_LISTED, arg=[name])
    # The graph went on.
    page.wait_for_function(
        "() => window.app.graph.nodes.some(node => node.type === 'PreviewImage' && node.title === 'Loss' && node.imgs)"
    )
    assert ours(page.complaints) == ours(second.complaints) == []
    second.close()

    graph = TinyGraph()
    bare = graph.picture(graph.model)
    adapted = graph.picture(graph.add("TLoRALoad", file=name, strength=1.0, model=graph.model)[0])
    result = server.run(graph)
    assert difference(pixels(result, bare), pixels(result, adapted)) > 0


def test_training_inside_a_subgraph_is_shown_there_and_a_cancelled_one_says_so(page, server):
    load_workflow(page, QUICKSTART)
    page.evaluate(ONLY_TRAINING, [5000, 2])
    inside = page.evaluate(
        """id => {
        const {node} = window.app.graph.convertToSubgraph(new Set([window.app.graph.getNodeById(id)]));
        return `${node.id}:${id}`;
    }""",
        TRAIN,
    )
    page.get_by_test_id("queue-button").click()
    running = wait_for(page, "panel.state === 'running' && panel.step > 1", inside)
    assert running["steps"] == 5000
    page.reload()
    wait_for(page, "panel.state === 'running' && panel.step > 1", inside)
    server.client.interrupt()
    cancelled = wait_for(page, "panel.state === 'cancelled'", inside)
    assert cancelled["enabled"] == [False, False]
    assert re.fullmatch(
        r"Cancelled at step \d+\. Run (resumes at step \d+|trains from the start, .*)\.", cancelled["message"]
    )
    assert ours(page.complaints) == []


# Sets widgets of a node as a user does.
CHANGE = """([id, values]) => { for (const widget of window.app.graph.getNodeById(id).widgets)
    if (widget.name in values) {
    widget.value = values[widget.name];
    widget.callback?.(widget.value);
} }"""


def test_the_panel_shows_the_values_behind_zero_before_the_run(page):
    load_workflow(page, QUICKSTART)
    says = (
        r"text => document.querySelector('.tlora-plan').textContent.replace(/, at least 0\.0\d+ of [\d.]+ GiB$/, "
        r"', memory') === text"
    )
    page.wait_for_function(
        says, arg="350 steps, learning rate 1.5e-3, 64 px, tlora 32/16, pictures at CFG 5, 88 layers, memory"
    )
    page.evaluate(
        CHANGE, [TRAIN, {"steps": 0, "learning_rate": 0, "resolution": 0, "method": "auto", "rank": 8, "min_rank": 8}]
    )
    page.wait_for_function(
        says, arg="350 steps, learning rate 1.5e-3, 64 px, tlora 8, pictures at CFG 5, 88 layers, memory"
    )
    page.evaluate(CHANGE, [TRAIN, {"min_rank": 9}])
    page.wait_for_function(says, arg="min_rank is 9; set it to a whole number from 0 to the rank, which is 8.")
    page.evaluate(CHANGE, [TRAIN, {"min_rank": 4}])
    page.evaluate("id => window.app.graph.getNodeById(id).disconnectInput(0)", TRAIN)
    page.wait_for_function("() => /loaded/.test(document.querySelector('.tlora-plan').textContent)")
    assert ours(page.complaints) == []


PLAN = {
    "steps": 500,
    "learning_rate": 1.0,
    "optimizer": "prodigy",
    "resolution": 1024,
    "method": "vanilla_tlora",
    "rank": 64,
    "min_rank": 32,
    "layers": 300,
    "guidance": {"scale": 4.0, "told": None, "told_in_training": None},
    "least_bytes": 13 * 2**30,
    "streamable_bytes": 12 * 2**30,
    "device_bytes": 8 * 2**30,
}


@pytest.mark.parametrize(
    "guidance, says",
    [
        ((4.0, None, None), "64/32, pictures at CFG 4, 300 layers"),
        ((1.0, None, None), "64/32, pictures without CFG, 300 layers"),
        ((1.0, 3.5, 1.0), "guidance 1 in training and 3.5 in pictures, without a negative prompt, 300 layers"),
    ],
)
def test_the_panel_shows_before_the_run_how_pictures_are_guided(page, guidance, says):
    plan = {**PLAN, "guidance": dict(zip(PLAN["guidance"], guidance))}
    page.route("**/tlora/plan", lambda route: route.fulfill(json=plan))
    load_workflow(page, QUICKSTART)
    page.evaluate(CHANGE, [TRAIN, {"steps": 0}])
    page.wait_for_function("says => document.querySelector('.tlora-plan').textContent.includes(says)", arg=says)


@pytest.mark.parametrize(
    "memory, streamable, says, is_wrong",
    [
        ("auto", 12, "part of the 12 GiB of weights stays in RAM, as they do not fit in 8 GiB", False),
        ("lowest", 12, "part of the 12 GiB of weights stays in RAM, as they do not fit in 8 GiB", False),
        ("low", 12, "at least 13 GiB, more than the 8 GiB available", True),
        ("auto", 0, "at least 13 GiB, more than the 8 GiB available", True),
    ],
)
def test_a_model_larger_than_the_card_is_an_error_only_where_it_must_be_there_as_a_whole(
    page, memory, streamable, says, is_wrong
):
    plan = {**PLAN, "streamable_bytes": streamable * 2**30}
    page.route("**/tlora/plan", lambda route: route.fulfill(json=plan))
    load_workflow(page, QUICKSTART)
    page.evaluate(CHANGE, [TRAIN, {"memory": memory}])
    page.wait_for_function(
        """([says, isWrong]) => { const plan = document.querySelector('.tlora-plan');
        return plan.textContent.endsWith(says) && plan.classList.contains('tlora-wrong') === isWrong; }""",
        arg=[says, is_wrong],
    )


# Whether the interface has stored the open graph with a text, as it does some time after a change.
IS_KEPT = (
    "text => Object.values({...localStorage, ...sessionStorage}).some(kept => kept.replaceAll('\\\\', "
    "'').includes(text))"
)
MARKED = """() => window.app.graph.nodes
    .flatMap(node => node.inputs.filter(input => input.hasErrors).map(input => input.name)).sort()"""


def set_widgets(page, values: dict) -> None:
    page.evaluate(
        """([id, values]) => { for (const widget of window.app.graph.getNodeById(id).widgets)
        if (widget.name in values) widget.value = values[widget.name]; }""",
        [TRAIN, values],
    )


def test_an_error_is_shown_in_the_panel_and_marks_its_inputs(page, server):
    load_workflow(page, QUICKSTART)
    page.evaluate(ONLY_TRAINING, [5, 3])
    # Known before the run.
    set_widgets(page, {"min_rank": 5})
    page.get_by_test_id("queue-button").click()
    refused = wait_for(page, "panel.state === 'failed'")
    assert refused["message"] == "min_rank is 5; set it to a whole number from 0 to the rank, which is 4."
    page.wait_for_function(f"() => ({MARKED})().length")
    assert page.evaluate(MARKED) == ["min_rank", "rank"]
    # Known when the model is there, and no run has begun.
    set_widgets(page, {"rank": 97, "min_rank": 2})
    page.get_by_test_id("queue-button").click()
    failed = wait_for(page, "panel.state === 'failed' && panel.message.includes('97')")
    assert failed["message"].startswith("rank is 97, but the layer") and failed["enabled"] == [False, False]
    page.wait_for_function(IS_KEPT, arg='"tlora_run"')
    page.reload()
    assert wait_for(page, "panel.state === 'failed'")["message"] == failed["message"]
    set_widgets(page, {"rank": 4})
    page.get_by_test_id("queue-button").click()
    wait_for(page, "panel.state === 'done'")
    # A copy of the template that the host answers from its memory says so, and shows no run of the other graph's.
    load_workflow(page, QUICKSTART)
    assert page.evaluate(PANEL, TRAIN)["state"] == "idle"
    page.evaluate(ONLY_TRAINING, [5, 3])
    page.get_by_test_id("queue-button").click()
    assert "panel/trained" in wait_for(page, "panel.state === 'found'")["message"]
    # The interface itself logs what the server has refused.
    assert [text for text in ours(page.complaints) if "/prompt" not in text] == []


def test_files_that_a_node_has_saved_are_looked_for_once(page, server):
    graph = TinyGraph()
    training = graph.train(file_name="panel/baked")
    file = server.run(graph).outputs[training.id]["text"][0]
    # The page is told of the training too, and its look for that file would find those that are saved meanwhile.
    page.wait_for_function(ARE_LISTED, arg=[file])
    baking = bake(graph, file, "steps")
    output, looks = server.run(graph).outputs[baking.id], []
    page.on("request", lambda request: looks.append(request.url) if request.url.endswith("/object_info") else None)
    for times in (2, 1):  # two nodes tell at once; an unchanged graph that is run again tells of the same files
        page.evaluate(
            """([times, output]) => import("/scripts/api.js").then(({api}) => {
            for (let i = 0; i < times; i++) api.dispatchEvent(new CustomEvent("executed", {detail: {node: "none",
                output}}));
        })""",
            [times, output],
        )
        page.wait_for_function(ARE_LISTED, arg=output["tlora_names"])
        page.wait_for_timeout(1000)
    assert len(output["tlora_names"]) == 3 and len(looks) == 1


def test_a_screen_reader_hears_the_progress_and_a_button_says_when_the_server_is_away(page):
    load_workflow(page, QUICKSTART)
    tell(page, RUN)
    wait_for(page, "panel.state === 'running'")
    bar = page.get_by_role("progressbar", name="Training")
    assert [bar.get_attribute(name) for name in ("aria-valuemin", "aria-valuenow", "aria-valuemax")] == ["0", "3", "9"]
    state = page.locator(".tlora-state")
    assert state.get_attribute("role") == "status"

    said = state.text_content()
    page.route("**/runs/x/stop", lambda route: route.fulfill(status=409, json={"error": "The run has ended."}))
    page.route("**/runs/x/checkpoint", lambda route: route.abort())
    with page.expect_response("**/runs/x/stop"):
        press(page, "Stop and keep")
    assert state.text_content() == said  # that it has ended comes by itself
    press(page, "Checkpoint now")
    page.get_by_text("The server did not respond").wait_for()
    tell(page, RUN | {"sequence": 2, "step": 4})
    wait_for(page, "panel.step === 4")
    assert state.text_content() == said


def test_after_the_server_was_away_the_page_shows_what_it_has_now(page):
    load_workflow(page, QUICKSTART)
    tell(page, RUN)
    wait_for(page, "panel.step === 3")
    asked = []
    page.route("**/tlora/runs?*", lambda route: asked.append(route))

    def come_back():
        """The page's request for the runs, which is not answered yet."""
        page.evaluate(
            """() => import("/scripts/api.js").then(({api}) => api.dispatchEvent(new CustomEvent("reconnected")))"""
        )
        for _ in range(200):
            if asked:
                return asked.pop()
            page.wait_for_timeout(100)

    request = come_back()
    tell(page, RUN | {"sequence": 3, "step": 5})  # while the answer is under way, and newer than that
    request.fulfill(json=[RUN | {"sequence": 2, "step": 4}])
    page.wait_for_timeout(500)
    assert page.evaluate(PANEL, TRAIN)["step"] == 5
    come_back().fulfill(json=[])  # a server that was started again knows of no run
    wait_for(page, "panel.state === 'idle'")


def test_the_panel_tells_how_a_training_uses_memory(page):
    load_workflow(page, QUICKSTART)
    tell(page, RUN | {"state": "running", "way": {"memory": "lowest", "in_ram": 8.5 * 2**30, "weights": 12 * 2**30}})
    shown = wait_for(page, "panel.state === 'running'")
    assert shown["numbers"].endswith("2.0 GB GPU peakmemory lowest")
    assert "streams 8.5 of 12.0 GiB" in page.evaluate("() => document.querySelector('.tlora-numbers').title")
    tell(page, RUN | {"sequence": 2, "way": {"memory": "lowest", "in_ram": None, "weights": 12 * 2**30}})
    page.wait_for_function("() => document.querySelector('.tlora-numbers').title.includes('ComfyUI itself streams')")


def test_text_from_the_server_is_shown_as_text_and_pictures_can_be_scrubbed_and_enlarged(page, server):
    """On a record as the server sends it, since a training makes no such texts."""
    load_workflow(page, QUICKSTART)
    hostile = "<img src=x onerror=window.hacked=1>"
    page.route(
        "**/validation/*",
        lambda route: route.fulfill(content_type="image/svg+xml", body="<svg xmlns='http://www.w3.org/2000/svg'/>"),
    )
    tell(
        page,
        RUN
        | {
            "state": "failed",
            "title": hostile,
            "message": hostile,
            "pictures": [{"index": i, "step": 10 * i, "captions": [hostile, f"prompt {i}"]} for i in range(3)],
        },
    )
    shown = wait_for(page, "panel.state === 'failed'")
    assert shown["message"] == hostile and shown["numbers"] == "2.0 s/step2.0 GB GPU peak"
    assert page.evaluate("() => [window.hacked, document.querySelectorAll('.tlora img[src=x]').length]") == [None, 0]

    slider = page.locator(".tlora-strip input")
    assert slider.get_attribute("aria-valuetext") == "step 20"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "step 10"
    page.locator(".tlora-picture").click()
    large = page.locator("dialog.tlora-large")
    large.wait_for()
    assert "step 10" in large.text_content() and "prompt 1" in large.text_content()
    page.keyboard.press("ArrowRight")
    assert "step 20" in large.text_content()
    page.keyboard.press("Escape")
    large.wait_for(state="detached")
    assert ours(page.complaints) == []
