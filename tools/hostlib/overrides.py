"""The command line's --set NODE.INPUT=VALUE: parsing it, and applying it to an API-format prompt."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable

from .errors import HostError
from .widgets import declared_inputs


def parse_sets(texts: Iterable[str]) -> dict[str, object]:
    """NODE.INPUT=VALUE strings as a dict; a value is JSON where it can be, and a plain string otherwise."""
    sets = {}
    for text in texts:
        target, equals, value = text.partition("=")
        if not equals or "." not in target:
            raise HostError(f"--set needs NODE.INPUT=VALUE, not '{text}'.")
        try:
            sets[target] = json.loads(value)
        except ValueError:
            sets[target] = value
    return sets


def apply_overrides(prompt: dict, sets: dict[str, object], object_info: dict) -> dict:
    """A copy of `prompt` with the given inputs replaced; links may be replaced too."""
    changed = copy.deepcopy(prompt)
    for target, value in sets.items():
        node_id, name = resolve(changed, target, object_info, f"--set {target}")
        changed[node_id]["inputs"][name] = {"__value__": value} if isinstance(value, list) else value
    return changed


def resolve(prompt: dict, target: str, object_info: dict, asked: str) -> tuple[str, str]:
    """The node's id and the input that NODE.INPUT names; titles, and the inputs of dynamic combos, hold dots of their
    own. asked: what an error begins with. Raises HostError."""
    dots = [i for i, letter in enumerate(target) if letter == "."]
    for dot in dots:
        found = _find_nodes(prompt, target[:dot])
        if len(found) > 1:
            raise HostError(f"{asked}: '{target[:dot]}' fits several nodes ({', '.join(found)}); use one of these ids.")
        if found:
            _check_input(prompt[found[0]], found[0], target[dot + 1 :], object_info, asked)
            return found[0], target[dot + 1 :]
    raise HostError(f"{asked}: the workflow has no such node; name one by its id, title or class.")


def _check_input(node: dict, node_id: str, name: str, object_info: dict, asked: str) -> None:
    known = set(node["inputs"]) | declared_inputs(object_info.get(node["class_type"], {}))
    if name not in known:
        has = f"has no input '{name}', only {', '.join(sorted(known))}"
        raise HostError(f"{asked}: node {node_id} ({node['class_type']}) {has}.")


def _find_nodes(prompt: dict, name: str) -> list[str]:
    """The ids of the nodes meant by `name`: an id wins over titles, and a title over classes."""
    if name in prompt:
        return [name]
    titled = [node_id for node_id, node in prompt.items() if node.get("_meta", {}).get("title") == name]
    return titled or [node_id for node_id, node in prompt.items() if node["class_type"] == name]
