"""Writes the pack's templates, workflows/*.json.

    python3 tools/host.py python tools/make_workflows.py

Run it when a node's inputs change: the interface saves widgets' values as a bare list in the order of the node's
inputs, which this script asks the host for. tools/make_thumbnails.py makes the thumbnails.
"""

import json
import uuid
from pathlib import Path

from hostlib.server import own_server
from hostlib.widgets import DYNAMIC_COMBO, GROUPS, SEED_NAMES, WIDGET_TYPES
from templates import TEMPLATES

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
CONTROL = "fixed"  # of a seed, after each run
# Colours of title and background: browner than the host's, so that text is readable in dark and light palettes.
NOTE = ("#432", "#392e1d")


class Template:
    """A workflow in the interface's format that grows node by node."""

    def __init__(self, name: str, info: dict):
        self.name, self.info = name, info
        self.nodes, self.links, self.groups = [], [], []

    def add(self, class_type: str, pos, size, heading: str = "", models=(), folded: bool = False, **inputs) -> "Added":
        """A node, with a heading of its own if any; inputs are values of widgets, or outputs of other nodes as
        `node["NAME"]`. Of a `folded` one only the title is seen."""
        declared = {
            name: spec for group in GROUPS for name, spec in (self.info[class_type]["input"].get(group) or {}).items()
        }
        unknown = inputs.keys() - declared.keys()
        if unknown:
            raise SystemExit(f"{self.name}: {class_type} has no input {', '.join(unknown)}")
        node = {
            "id": len(self.nodes) + 1,
            "type": class_type,
            "pos": list(pos),
            "size": list(size),
            "flags": {"collapsed": True} if folded else {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "widgets_values": [],
            "properties": {"Node name for S&R": class_type, **({"models": list(models)} if models else {})},
        }
        if heading:
            node["title"] = heading
        self.nodes.append(node)
        for name, spec in declared.items():
            self._declare(node, name, spec, inputs.get(name))
        outputs = self.info[class_type]
        node["outputs"] = [
            {"name": name, "type": kind, "links": []} for name, kind in zip(outputs["output_name"], outputs["output"])
        ]
        return Added(self, node)

    def _declare(self, node: dict, name: str, spec: list, given) -> None:
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        is_widget = (isinstance(kind, list) or kind in WIDGET_TYPES or kind == DYNAMIC_COMBO) and not options.get(
            "forceInput"
        )
        linked = isinstance(given, Output)
        if not is_widget or linked:
            slot = {
                "name": name,
                "type": "COMBO" if isinstance(kind, list) else kind,
                "link": self._link(given, node, len(node["inputs"])) if linked else None,
            }
            if is_widget:
                slot["widget"] = {"name": name}
            node["inputs"].append(slot)
        if is_widget:
            node["widgets_values"].append(_default(kind, options) if given is None or linked else given)
            if name in SEED_NAMES and options.get("control_after_generate"):
                node["widgets_values"].append(CONTROL)
            if options.get("image_upload"):
                node["widgets_values"].append(name)

    def _link(self, output: "Output", node: dict, slot: int) -> int:
        number = len(self.links) + 1
        source = output.node["outputs"][output.slot]
        source["links"].append(number)
        self.links.append([number, output.node["id"], output.slot, node["id"], slot, source["type"]])
        return number

    def note(self, pos, size, text: str) -> None:
        """`text` is Markdown; names in backticks become bold, as Nodes 2.0 writes code in blue, hard to read on any
        ground of its palettes."""
        self.nodes.append(
            {
                "id": len(self.nodes) + 1,
                "type": "MarkdownNote",
                "pos": list(pos),
                "size": list(size),
                "flags": {},
                "order": len(self.nodes),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {"Node name for S&R": "MarkdownNote"},
                "widgets_values": [text.replace("`", "**")],
                "color": NOTE[0],
                "bgcolor": NOTE[1],
            }
        )

    def group(self, title: str, bounding, color: str) -> None:
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": list(bounding),
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )

    def as_json(self) -> dict:
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"ComfyUI-T-LoRA/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [420, 110]}},
            "version": 0.4,
        }


class Output:
    def __init__(self, node: dict, slot: int):
        self.node, self.slot = node, slot


class Added:
    """A node of a template; `node["MODEL"]` is an output by its name."""

    def __init__(self, template: Template, node: dict):
        self.template, self.node = template, node

    def __getitem__(self, name: str) -> Output:
        return Output(self.node, [output["name"] for output in self.node["outputs"]].index(name))


def _default(kind, options):
    choices = kind if isinstance(kind, list) else options.get("options")
    return options.get("default", choices[0] if choices else "")


def main() -> None:
    with own_server() as server:
        info = server.object_info()
    for title, fill in TEMPLATES.items():
        template = Template(fill.__name__, info)
        fill(template)
        (WORKFLOWS / f"{title}.json").write_text(
            json.dumps(template.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        print(f"workflows/{title}.json: {len(template.nodes)} nodes")


if __name__ == "__main__":
    main()
