"""The running workflow, as the page sent it with the prompt."""

from collections.abc import Mapping
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

OWNER = "tlora_run"  # the node property by which web/runs.js knows a node's runs


def queued_workflow() -> dict[str, Any]:
    """The running workflow in the page's format; empty if the prompt came without one, as from a script."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is None or server is None:
        return {}
    for item in server.prompt_queue.get_current_queue_volatile()[0]:
        if item[1] == context.prompt_id:
            workflow = (item[3].get("extra_pnginfo") or {}).get("workflow")
            return workflow if isinstance(workflow, dict) else {}
    return {}


def workflow_id() -> str | None:
    """Id of the running workflow, within which node ids are unique; None if the prompt came without a workflow."""
    return queued_workflow().get("id")


def owner_of(workflow: Mapping[str, Any], node_id: str | None) -> str | None:
    """The mark by which the page knows a node's runs, because ids are the same in each copy of a template. `node_id` is
    the host's, "3:7" in a subgraph. None if the node in `workflow` has no valid mark."""
    try:
        inner, node = workflow, {}
        subgraphs = {each["id"]: each for each in workflow.get("definitions", {}).get("subgraphs", [])}
        for part in (node_id or "").split(":"):
            node = next(each for each in inner["nodes"] if str(each["id"]) == part)
            inner = subgraphs.get(node["type"], {})
        owner = node["properties"][OWNER]
    except (KeyError, TypeError, AttributeError, StopIteration):  # the workflow is untrusted data
        return None
    return owner if isinstance(owner, str) else None
