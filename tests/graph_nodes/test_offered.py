"""What the server offers of the pack: nodes, inputs, help pages and templates."""

import json
import re
from urllib.parse import quote

import pytest
from hostlib.server import PACK_NAME
from places import REPO

WORKFLOWS = sorted((REPO / "workflows").glob("*.json"))


NODES = {
    "TLoRAImages": "T-LoRA Images",
    "TLoRATrainingOptions": "T-LoRA Training Options",
    "TLoRATrainFromImage": "Train T-LoRA from Image",
    "TLoRALoad": "Load T-LoRA",
    "TLoRAApply": "Apply T-LoRA",
    "TLoRASave": "Save T-LoRA",
    "TLoRAExport": "Export T-LoRA",
    "TLoRABake": "Bake T-LoRA",
    "TLoRAInfo": "T-LoRA Info",
    "TLoRASchedulePreview": "T-LoRA Schedule Preview",
    "TLoRAPrompts": "Prompts (T-LoRA)",
    "TLoRASweep": "Sweep (T-LoRA)",
    "TLoRACompare": "Compare (T-LoRA)",
    "TLoRAEvaluate": "T-LoRA Evaluate",
    "TLoRATinyBaseModel": "Tiny Base Model (T-LoRA)",
    "TLoRATinySampleConcept": "Sample Concept (T-LoRA)",
}


def declared(info: dict) -> dict[str, tuple]:
    """A class's inputs by name: (type, options)."""
    groups = (info["input"].get(group, {}) for group in ("required", "optional"))
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for group in groups for name, spec in group.items()}


def test_every_node_of_the_pack_is_registered_in_its_category(server):
    module = f"custom_nodes.{PACK_NAME}"
    ours = {name: info for name, info in server.object_info().items() if info["python_module"] == module}
    assert {name: info["display_name"] for name, info in ours.items()} == NODES
    assert {info["category"] for info in ours.values()} == {"T-LoRA"}
    assert all(info["description"] for info in ours.values())


@pytest.mark.parametrize("node", NODES)
def test_every_input_has_a_tooltip_and_no_seed_changes_by_itself(server, node):
    inputs = declared(server.object_info()[node])
    assert [name for name, (_, options) in inputs.items() if not options.get("tooltip")] == []
    # Without an explicit no, the interface adds a "control after generate" to every input with one of these names.
    seeds = [inputs[name] for name in ("seed", "noise_seed") if name in inputs]
    assert all(options.get("control_after_generate") is False for _, options in seeds)


@pytest.mark.parametrize("node", NODES)
def test_help_page_is_served_and_explains_every_input_and_output(server, node):
    page = server.client.request(f"/extensions/{PACK_NAME}/docs/{node}.md").decode()
    linked = [server.client.request(path).decode() for path in re.findall(r"\]\((/[^)]+)\)", page)]
    info = server.object_info()[node]
    assert page.startswith(f"# {NODES[node]}\n")
    explained = set(re.findall(r"^- \*\*`(.+?)`\*\*", page, flags=re.MULTILINE)) | set(
        re.findall("<dt>(.+?)</dt>", "".join(linked))
    )
    shown = {options.get("display_name") or name for name, (_, options) in declared(info).items()}
    assert explained == shown | set(info["output_name"])


def test_workflows_of_the_pack_are_listed_and_served_as_templates(server):
    listed = server.client.get_json("/workflow_templates")[PACK_NAME]
    assert sorted(listed) == [path.stem for path in WORKFLOWS] and "01 Quickstart" in listed
    for path in WORKFLOWS:
        assert server.client.get_json(f"/api/workflow_templates/{PACK_NAME}/{quote(path.name)}") == json.loads(
            path.read_text()
        )
