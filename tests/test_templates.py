"""The templates: each is what the host can run, those that need no download are run, and each opens cleanly in the interface."""
import json
import re
from pathlib import Path

import pytest
from browser import UNKNOWN_NODES, load_workflow, new_page, open_interface, opened_browser, ours, set_setting
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
TEMPLATES = {path.stem: path for path in sorted((REPO / "workflows").glob("*.json"))}
NEED_FILES = {"train_sdxl_on_one_image", "train_sdxl_on_several_images", "train_flux_on_one_image", "generate_with_a_file",
              "use_a_file_from_elsewhere", "which_checkpoint_to_keep"}
# What only a person can fill in: files that do not come with the pack.
TO_CHOOSE = ("ckpt_name", "file")
UNREGISTERED = "() => window.app.graph.nodes.map(node => node.type).filter(type => !(type in window.LiteGraph.registered_node_types))"


@pytest.fixture(scope="module")
def page(chromium, server):
    with opened_browser(chromium) as browser:
        page = new_page(browser)
        open_interface(page, server)
        yield page


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_has_a_thumbnail_a_note_groups_and_every_node_apart(name):
    workflow = json.loads(TEMPLATES[name].read_text(encoding="utf-8"))
    with Image.open(TEMPLATES[name].with_suffix(".jpg")) as thumbnail:
        assert thumbnail.format == "JPEG" and 200 <= min(thumbnail.size) and TEMPLATES[name].with_suffix(".jpg").stat().st_size < 100_000
    assert any(node["type"] == "MarkdownNote" for node in workflow["nodes"]) and len(workflow["groups"]) >= 3
    assert len({json.loads(path.read_text(encoding="utf-8"))["id"] for path in TEMPLATES.values()}) == len(TEMPLATES)
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in workflow["nodes"]]
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            # A node's title is above its position.
            assert right <= other[0] or left >= other[2] or bottom + 30 <= other[1] or top - 30 >= other[3], (boxes[i], other)


@pytest.mark.parametrize("name", sorted(NEED_FILES))
def test_template_lacks_nothing_but_the_files_to_choose(server, name):
    workflow = json.loads(TEMPLATES[name].read_text(encoding="utf-8"))
    prompt = server.to_prompt(workflow)
    answer = server.run(prompt, check=False)
    missing = [node for node in prompt.values() for choice in TO_CHOOSE if choice in node["inputs"]]
    assert missing and len(answer.errors) >= 1
    unexpected = [error for error in answer.errors if not re.search(rf"\b({'|'.join(TO_CHOOSE)})\b", error)]
    assert unexpected == []
    hinted = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert hinted and all(model["url"].endswith(model["name"]) and model["directory"] == "checkpoints" for model in hinted)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - NEED_FILES - {"quickstart"}))
def test_template_without_a_download_runs_to_its_sheet(server, name):
    prompt = server.to_prompt(TEMPLATES[name])
    for node in prompt.values():
        if node["class_type"] in ("TLoRATrainFromImage", "KSampler"):
            node["inputs"]["steps"] = 2
    result = server.run(prompt)
    [sheet] = [image.path for image in result.images if image.kind == "output"]
    with Image.open(sheet) as picture:
        assert picture.width > 300 and picture.height > 400


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_opens_in_the_interface_as_it_is_meant(server, page, name):
    workflow = json.loads(TEMPLATES[name].read_text(encoding="utf-8"))
    load_workflow(page, workflow)
    # Files that are not there yet are errors of their own.
    assert page.evaluate(UNKNOWN_NODES if name not in NEED_FILES else UNREGISTERED) == []
    shown = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    meant = server.to_prompt(workflow)
    for node in shown.values():
        if node["class_type"] == "PreviewAny":  # the widgets that older interfaces show its text in
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name not in ("preview", "previewMode")}
    assert {node: shown[node]["inputs"] for node in shown} == {node: meant[node]["inputs"] for node in meant}
    # Nothing had to grow, so that nothing covers its neighbour.
    grown = page.evaluate("""sizes => window.app.graph.nodes.filter(node => node.size[1] > sizes[node.id] + 1)
        .map(node => [node.type, node.size[1], sizes[node.id]])""", {node["id"]: node["size"][1] for node in workflow["nodes"]})
    assert grown == []
    assert ours(page.complaints) == []


def test_captions_that_a_template_fills_in_are_seen_where_advanced_inputs_are_not(page):
    """Whoever puts pictures of their own in would teach captions that are not true of them."""
    set_setting(page, "Comfy.VueNodes.Enabled", True)
    try:
        load_workflow(page, json.loads(TEMPLATES["several_images_with_masks"].read_text(encoding="utf-8")))
        page.evaluate("() => { window.app.canvas.ds.scale = 0.5; window.app.canvas.ds.offset = [300, 100]; window.app.canvas.setDirty(true, true); }")
        page.wait_for_function("""() => [...document.querySelectorAll("textarea")]
            .filter(area => area.checkVisibility() && area.value.startsWith("a photo of {token} {class_word} ")).length === 3""", timeout=20_000)
    finally:
        set_setting(page, "Comfy.VueNodes.Enabled", False)


@pytest.mark.parametrize("path", sorted((REPO / "tests" / "saved").glob("*.json")), ids=lambda path: path.stem)
def test_workflow_saved_with_an_earlier_version_still_runs(server, path):
    """One file for each version, as the interface of that day saved it."""
    few = {"TLoRATrainFromImage.steps": 2, "TLoRATrainFromImage.batch_size": 1, "12.steps": 2, "15.steps": 2}
    result = server.run(path, few)
    assert len([image for image in result.images if image.kind == "output"]) == 8 and len(result.tlora_files) == 1
