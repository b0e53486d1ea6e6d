"""The training panel in the real interface, on real trainings: what it shows, what outlives a reload, and its
buttons."""

import re

from browser import load_workflow, new_page, open_interface, ours, set_setting
from graphs import TinyGraph, bake, difference, pixels
from panel_page import ONLY_TRAINING, PANEL, QUICKSTART, TRAIN, begin, press, set_widgets, wait_for

ARE_LISTED = """names => {
    const options = window.LiteGraph.createNode("TLoRALoad")
        .widgets.find(widget => widget.name === "file").options.values;
    return names.every(name => (typeof options === "function" ? options() : options).includes(name));
}"""


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


# Whether the interface has stored the open graph with a text, as it does some time after a change.
IS_KEPT = (
    "text => Object.values({...localStorage, ...sessionStorage}).some(kept => kept.replaceAll('\\\\', "
    "'').includes(text))"
)
MARKED = """() => window.app.graph.nodes
    .flatMap(node => node.inputs.filter(input => input.hasErrors).map(input => input.name)).sort()"""


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
