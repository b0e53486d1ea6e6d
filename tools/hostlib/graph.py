"""Turns a workflow as the interface saves it into the prompt that the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import HostError
from .widgets import widget_values

ALWAYS, MUTED, BYPASSED = 0, 2, 4
NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
# The ids that the interface gives to a subgraph's own input and output node.
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20


@dataclass(frozen=True)
class Link:
    origin: object
    origin_slot: int
    target: object
    target_slot: int
    type: str


@dataclass(frozen=True)
class Literal:
    """A value that reaches an input through a link, from a primitive or a subgraph's own widget."""

    value: object


Source = list | Literal | None


@dataclass
class Scope:
    """One graph: the workflow itself, or one use of a subgraph inside it."""

    nodes: dict[object, dict]
    links: dict[object, Link]
    prefix: str = ""
    parent: Scope | None = None
    instance: dict | None = None
    children: dict[object, Scope] = field(default_factory=dict)

    def key(self, node: dict) -> str:
        return f"{self.prefix}{node['id']}"


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """The API-format prompt of a workflow in either format."""
    if "nodes" in workflow:
        return _Converter(workflow, object_info).convert()
    prompt = workflow.get("prompt", workflow)
    if not prompt or not all(isinstance(node, dict) and "class_type" in node for node in prompt.values()):
        raise HostError("The file is not a ComfyUI workflow: it has neither 'nodes' nor entries with a 'class_type'.")
    return {node_id: {**node, "inputs": node.get("inputs", {})} for node_id, node in prompt.items()}


class _Converter:
    def __init__(self, workflow: dict, object_info: dict):
        self._info = object_info
        definitions = workflow.get("definitions") or {}
        self._subgraphs = {graph["id"]: graph for graph in definitions.get("subgraphs", [])}
        self._root = self._scope(workflow)

    def _scope(self, graph: dict, prefix: str = "", parent: Scope | None = None, instance: dict | None = None) -> Scope:
        links = dict(_read_link(link) for link in graph.get("links") or [])
        scope = Scope({node["id"]: node for node in graph["nodes"]}, links, prefix, parent, instance)
        for node in graph["nodes"]:
            if node["type"] in self._subgraphs:
                inner = self._subgraphs[node["type"]]
                scope.children[node["id"]] = self._scope(inner, f"{scope.key(node)}:", scope, node)
        return scope

    def convert(self) -> dict:
        active = list(self._active(self._root))
        missing = sorted({node["type"] for _, node in active if node["type"] not in self._info})
        if missing:
            raise HostError(f"The workflow uses nodes that this ComfyUI does not have: {', '.join(missing)}.")
        prompt = {scope.key(node): self._entry(scope, node) for scope, node in active}
        if not prompt:
            raise HostError("The workflow holds no node that could run.")
        return prompt

    def _active(self, scope: Scope) -> Iterator[tuple[Scope, dict]]:
        for node in scope.nodes.values():
            if node.get("mode", ALWAYS) in (MUTED, BYPASSED):
                continue
            if node["id"] in scope.children:
                yield from self._active(scope.children[node["id"]])
            elif node["type"] not in (*NOTES, REROUTE, PRIMITIVE):
                yield scope, node

    def _entry(self, scope: Scope, node: dict) -> dict:
        info = self._info[node["type"]]
        inputs = {**widget_values(node, info), **_promoted(scope, node)}
        inputs = {name: {"__value__": value} if isinstance(value, list) else value for name, value in inputs.items()}
        for slot in node.get("inputs") or []:
            source = self._follow(scope, slot.get("link"))
            if isinstance(source, Literal):
                inputs[slot["name"]] = source.value
            elif source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or info.get("display_name") or node["type"]
        return {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}

    def _follow(self, scope: Scope, link_id: object) -> Source:
        """What really feeds a link, past reroutes, bypassed nodes and the borders of subgraphs."""
        link = scope.links.get(link_id) if link_id is not None else None
        if link is None:
            return None
        if link.origin == SUBGRAPH_INPUT:
            return self._follow_out(scope, link.origin_slot)
        node = scope.nodes.get(link.origin)
        if node is None or node.get("mode", ALWAYS) == MUTED:
            return None
        if node.get("mode", ALWAYS) == BYPASSED:
            slot = _bypass_slot(node, link)
            return None if slot is None else self._follow(scope, node["inputs"][slot].get("link"))
        if node["type"] == REROUTE:
            return self._follow(scope, node["inputs"][0].get("link"))
        if node["type"] == PRIMITIVE:
            values = node.get("widgets_values") or []
            return Literal(values[0]) if values else None
        if node["id"] in scope.children:
            return self._follow_in(scope.children[node["id"]], link.origin_slot)
        return [scope.key(node), link.origin_slot]

    def _follow_out(self, scope: Scope, slot: int) -> Source:
        """Leave a subgraph through one of its inputs."""
        # By name: the node lists its inputs in an order of its own.
        name = self._subgraphs[scope.instance["type"]]["inputs"][slot]["name"]
        outer = next((each for each in scope.instance.get("inputs") or [] if each["name"] == name), {})
        source = self._follow(scope.parent, outer.get("link"))
        if source is None:
            value = _instance_widgets(scope.instance).get(("-1", name))
            return None if value is None else Literal(value)
        return source

    def _follow_in(self, scope: Scope, slot: int) -> Source:
        """Enter a subgraph through one of its outputs."""
        for link_id, link in scope.links.items():
            if link.target == SUBGRAPH_OUTPUT and link.target_slot == slot:
                return self._follow(scope, link_id)
        return None


def _read_link(link: list | dict) -> tuple[object, Link]:
    if isinstance(link, dict):
        return link["id"], Link(
            link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"], link["type"]
        )
    link_id, origin, origin_slot, target, target_slot, kind = link[:6]
    return link_id, Link(origin, origin_slot, target, target_slot, kind)


def _bypass_slot(node: dict, link: Link) -> int | None:
    """The input that a bypassed node hands on to the output that `link` leaves from, chosen as the interface does."""
    inputs, wanted = node.get("inputs") or [], node["outputs"][link.origin_slot]["type"]
    if wanted == "*":
        wanted = link.type
    fits = [slot for slot, candidate in enumerate(inputs) if candidate["type"] in (wanted, "*")]
    if link.origin_slot in fits:
        return link.origin_slot
    exact = [slot for slot in fits if inputs[slot]["type"] == wanted]
    return (exact or fits or [None])[0]


def _instance_widgets(instance: dict) -> dict[tuple[str, str], object]:
    """The values a subgraph node holds for its inner widgets, by inner node id ("-1": its own input) and name."""
    proxies = (instance.get("properties") or {}).get("proxyWidgets") or []
    values = instance.get("widgets_values") or []
    return {tuple(map(str, proxy[:2])): value for proxy, value in zip(proxies, values) if value is not None}


def _promoted(scope: Scope, node: dict) -> dict[str, object]:
    """Values that the subgraph node around `node` sets on its widgets."""
    if scope.instance is None:
        return {}
    marked = {slot["name"] for slot in node.get("inputs") or [] if slot.get("widget")}
    held = _instance_widgets(scope.instance).items()
    return {name: value for (inner, name), value in held if inner == str(node["id"]) and name in marked}
