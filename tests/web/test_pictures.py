"""The training pictures with their masks in the real interface: on the Train node before a run, and on T-LoRA Images
before and after it."""

import pytest
from browser import RUN_MS, load_workflow, ours
from input_pictures import IS_SUBJECT, write_picture
from panel_page import ONLY_TRAINING, QUICKSTART, TRAIN

# Adds a node and connects it: add(type, {widget: value}, {input: [node, output]}).
ADD = """() => { window.add = (type, values = {}, links = {}) => {
    const node = window.LiteGraph.createNode(type);
    window.app.graph.add(node);
    for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
    for (const [input, [from, output]] of Object.entries(links)) from.connect(output, node, input);
    return node;
}; }"""
# The words below a node's pictures, whether they are a warning, and how many pictures are there with how many loaded.
SHOWN = """id => {
    const names = ["tlora_training", "tlora_pictures"];
    const {element} = window.app.graph.getNodeById(id).widgets.find(({name}) => names.includes(name));
    const pictures = [...element.querySelectorAll(".tlora-pictures img")];
    const words = element.querySelector(".tlora-words");
    return {words: words.textContent, isWrong: words.classList.contains("tlora-wrong"), pictures: pictures.length,
            loaded: pictures.filter(picture => picture.naturalWidth > 0).length,
            isHidden: element.querySelector(".tlora-masked").hidden};
}"""


@pytest.fixture
def page(page, server):
    write_picture(server.workspace / "input" / "cut_out.png", IS_SUBJECT)
    load_workflow(page, QUICKSTART)
    page.evaluate(ADD)
    page.evaluate(
        """id => {
        window.train = window.app.graph.getNodeById(id);
        window.loaded = window.add("LoadImage", {image: "cut_out.png"});
    }""",
        TRAIN,
    )
    return page


def wait_shown(page, node, condition: str) -> dict:
    page.wait_for_function(f"id => {{ const shown = ({SHOWN})(id); return {condition}; }}", arg=node, timeout=RUN_MS)
    return page.evaluate(SHOWN, node)


def test_the_train_node_shows_before_a_run_which_part_of_a_cut_out_counts(page):
    assert page.evaluate(SHOWN, TRAIN)["isHidden"]  # nothing to say of a picture without a mask
    page.evaluate("() => loaded.connect(0, train, 'image')")
    bare = wait_shown(page, TRAIN, "shown.loaded === 1")
    assert bare["isWrong"] and "hidden there are learnt. Connect the MASK" in bare["words"]
    page.evaluate("() => loaded.connect(1, train, 'mask')")
    background = wait_shown(page, TRAIN, "/border/.test(shown.words)")
    assert background["isWrong"] and background["pictures"] == 1
    page.evaluate("() => add('InvertMask', {}, {mask: [loaded, 1]}).connect(0, train, 'mask')")
    subject = wait_shown(page, TRAIN, "!shown.isWrong && shown.loaded === 1")
    assert subject["words"] == "Only the part without tint is learnt."
    page.evaluate("() => add('TLoRATrainingOptions', {outside_mask: 0.25}).connect(0, train, 'options')")
    wait_shown(page, TRAIN, "shown.words === 'The tinted part counts 0.25 times as much as the rest.'")
    page.evaluate("() => add('SolidMask').connect(0, train, 'mask')")
    later = wait_shown(page, TRAIN, "/known when it runs/.test(shown.words)")
    assert later["pictures"] == 0 and not later["isWrong"]
    assert ours(page.complaints) == []


def test_t_lora_images_shows_masks_before_a_run_and_what_it_had_after_it(page):
    node = page.evaluate(
        """() => {
        window.images = add("TLoRAImages", {}, {image: [loaded, 0], mask: [loaded, 1]});
        images.connect(0, train, "more_images");
        return images.id;
    }"""
    )
    before = wait_shown(page, node, "shown.loaded === 1")
    assert before["isWrong"] and "The tinted part is outside the mask." in before["words"]
    wait_shown(page, TRAIN, "/border/.test(shown.words)")  # which trains on them too
    page.evaluate("""() => add("ImageToMask", {channel: "blue"}, {image: [loaded, 0]}).connect(0, images, "mask")""")
    later = wait_shown(page, node, "/when it has run/.test(shown.words)")
    assert later["pictures"] == 0
    page.evaluate(ONLY_TRAINING, [1, 1])
    page.get_by_test_id("queue-button").click()
    ran = wait_shown(page, node, "shown.loaded === 1")
    assert ran["words"] == "The tinted part is outside the mask." and not ran["isWrong"]
    assert ours(page.complaints) == []
