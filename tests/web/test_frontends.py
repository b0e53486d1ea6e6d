"""The host's own interface and the newest one: templates, nodes and panel, without an error or a warning that is
ours."""

import json
import time

import pytest
from browser import load_workflow, new_page, open_interface, ours, set_setting
from panel_page import begin, wait_for
from places import REPO

TEMPLATES = {path.stem: path for path in sorted((REPO / "workflows").glob("*.json"))}
# Each of our nodes, made, put into the graph and copied there.
CREATE_ALL = """() => Object.entries(window.LiteGraph.registered_node_types)
    .filter(([, type]) => type.nodeData?.python_module === "custom_nodes.ComfyUI-T-LoRA").map(([name]) => {
        const node = window.LiteGraph.createNode(name);
        window.app.graph.add(node);
        window.app.graph.add(node.clone());
        return name;
    })"""


@pytest.fixture(scope="module")
def page(browser, frontend):
    page = new_page(browser)
    open_interface(page, frontend)
    # Otherwise a warning is given once, and whoever came first hides the others.
    page.evaluate("() => { window.LiteGraph.alwaysRepeatWarnings = true; }")
    yield page
    set_setting(page, "Comfy.VueNodes.Enabled", False)  # the server keeps it for the next page
    page.close()


@pytest.fixture(params=[False, True], ids=["canvas", "vue"])
def renderer(page, request):
    set_setting(page, "Comfy.VueNodes.Enabled", request.param)
    page.complaints.clear()


def test_templates_open_and_all_nodes_can_be_made(page, renderer):
    for name, path in TEMPLATES.items():
        load_workflow(page, json.loads(path.read_text(encoding="utf-8")))
        page.wait_for_timeout(100)
        assert ours(page.complaints) == [], name
    assert len(page.evaluate(CREATE_ALL)) > 15
    page.wait_for_timeout(500)
    assert ours(page.complaints) == []


def test_schedule_of_apply_follows_train_and_a_link_to_an_input_is_seen(page, renderer):
    load_workflow(page, json.loads(TEMPLATES["01 Quickstart"].read_text(encoding="utf-8")))
    shown = """text => window.app.graph.nodes.find(node => node.type === "TLoRAApply").widgets
        .find(widget => widget.name === "tlora_schedule").element
            .querySelector("svg").getAttribute("aria-label").startsWith(text)"""
    page.wait_for_function(shown, arg="Active ranks: 16 at pure noise, 32 in")
    page.evaluate("""() => {
        const number = window.LiteGraph.createNode("PrimitiveInt");
        window.app.graph.add(number);
        const train = window.app.graph.nodes.find(node => node.type === "TLoRATrainFromImage");
        number.connect(0, train, train.inputs.findIndex(input => input.name === "rank"));
    }""")
    page.wait_for_function(shown, arg="Uses the schedule of the connected T-LoRA.")
    assert ours(page.complaints) == []


def test_panel_of_a_run_comes_back_after_a_reload_of_the_newest(browser, newest_frontend_server):
    page = new_page(browser)
    open_interface(page, newest_frontend_server)
    set_setting(page, "Comfy.VueNodes.Enabled", True)
    begin(page, 5000, seed=7)
    first = wait_for(page, "panel.state === 'running' && panel.step > 0 && panel.connected")
    # Events of the run come while the page has its socket and our code has not begun to listen.
    page.route("**/object_info", lambda route: (time.sleep(3), route.continue_()))
    page.reload()
    wait_for(page, f"panel.state === 'running' && panel.step > {first['step']} && panel.connected")
    newest_frontend_server.client.interrupt()
    wait_for(page, "panel.state === 'cancelled'")
    assert ours(page.complaints) == []
