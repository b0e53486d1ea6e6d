"""The quickstart in the interface, the panel of its Train node, and runs as the server tells of them."""

import json

from browser import RUN_MS, load_workflow
from places import REPO

QUICKSTART = json.loads((REPO / "workflows" / "01 Quickstart.json").read_text())


TRAIN = next(node for node in QUICKSTART["nodes"] if node["type"] == "TLoRATrainFromImage")["id"]


# What the panel of a node says: {state, step, steps, points of the curve, numbers, message, buttons}.
PANEL = """id => {
    let graph = window.app?.rootGraph;
    const ids = String(id).split(":");
    for (const one of ids.slice(0, -1)) graph = graph?.getNodeById(one)?.subgraph;
    const panel = graph?.getNodeById(ids.at(-1))?.widgets?.find(widget => widget.name === "tlora_training")?.element;
    if (!panel) return null;
    const text = selector => panel.querySelector(selector).textContent;
    const [step, steps] = text(".tlora-row .tlora-strong").split(" / ").map(Number);
    return {
        state: panel.dataset.state, step, steps, numbers: text(".tlora-numbers"), message: text(".tlora-message"),
        points: (panel.querySelector(".tlora-raw").getAttribute("d") ?? "").split("L").length,
        connected: panel.isConnected,
            enabled: [...panel.querySelectorAll(".tlora-buttons button:not(.tlora-fold)")]
                .map(button => !button.disabled)};
}"""


# Only the training and the loss picture; as long as a test needs.
ONLY_TRAINING = """([steps, seed]) => {
    for (const node of window.app.graph.nodes) {
        if (node.type === "SaveImage") node.mode = 2;
        if (node.type !== "TLoRATrainFromImage") continue;
        const values = {steps, seed, rank: 4, min_rank: 2, batch_size: 1, file_name: "panel/trained"};
        for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
    }
}"""


def wait_for(page, condition: str, node=TRAIN) -> dict:
    """The panel once `condition` on `panel` holds."""
    page.wait_for_function(
        f"id => {{ const panel = ({PANEL})(id); return panel && ({condition}); }}", arg=node, timeout=RUN_MS
    )
    return page.evaluate(PANEL, node)


def begin(page, steps: int, seed: int) -> None:
    load_workflow(page, QUICKSTART)
    page.evaluate(ONLY_TRAINING, [steps, seed])
    page.get_by_test_id("queue-button").click()


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


# Sets widgets of a node as a user does.
CHANGE = """([id, values]) => { for (const widget of window.app.graph.getNodeById(id).widgets)
    if (widget.name in values) {
    widget.value = values[widget.name];
    widget.callback?.(widget.value);
} }"""


def set_widgets(page, values: dict) -> None:
    """Of the Train node, without its callbacks."""
    page.evaluate(
        """([id, values]) => { for (const widget of window.app.graph.getNodeById(id).widgets)
        if (widget.name in values) widget.value = values[widget.name]; }""",
        [TRAIN, values],
    )
