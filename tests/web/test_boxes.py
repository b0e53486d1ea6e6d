"""Text boxes on the nodes in the canvas renderer: each shows its name, even when filled, and has room for three
lines."""

import pytest
from browser import new_page, open_interface, opened_browser, ours, set_setting

WITH_BOXES = {
    "TLoRATrainFromImage": ["captions", "validation_prompts"],
    "TLoRAImages": ["captions"],
    "TLoRAPrompts": ["prompts"],
    "TLoRASweep": ["x_values", "y_values"],
    "TLoRACompare": ["labels", "prompts"],
}
THREE_LINES = 39
# A new node whose boxes are filled: the words that it draws over them, and the boxes' heights on the screen.
FRESH = """async type => {
    const {app, LiteGraph} = window, node = LiteGraph.createNode(type);
    app.graph.clear();
    app.graph.add(node);
    node.showAdvanced = true; // captions are folded away on a new node
    node.setSize(node.computeSize());
    const boxes = node.widgets.filter(({element}) => element instanceof HTMLTextAreaElement);
    for (const box of boxes) box.value = "a photo of {}\\n".repeat(3);
    Object.assign(app.canvas.ds, {scale: 1, offset: [300, 150]});
    app.canvas.setDirty(true, true);
    await new Promise(resolve => setTimeout(resolve, 500));
    const drawn = [], own = app.canvas.ctx.fillText;
    app.canvas.ctx.fillText = function (text, ...place) { drawn.push([text, place[1]]); return own.call(this, text,
        ...place); };
    app.canvas.draw(true, true);
    delete app.canvas.ctx.fillText;
    return boxes.map(box => ({name: box.name, height: box.element.clientHeight,
        inside: box.y + box.computedHeight <= node.size[1],
                              named: drawn.some(([text, y]) => text === (box.label ?? box.name) && y > box.y
                                  && y < box.y + box.margin)}));
}"""


@pytest.fixture(scope="module")
def page(chromium, server):
    with opened_browser(chromium) as browser:
        page = new_page(browser)
        open_interface(page, server)
        set_setting(page, "Comfy.VueNodes.Enabled", False)
        yield page
        assert ours(page.complaints) == []


@pytest.mark.parametrize("node", WITH_BOXES)
def test_filled_boxes_have_their_names_above_them_and_room_for_three_lines(page, node):
    boxes = page.evaluate(FRESH, node)
    assert [box["name"] for box in boxes] == WITH_BOXES[node]
    assert all(box["named"] and box["inside"] and box["height"] >= THREE_LINES for box in boxes), boxes
