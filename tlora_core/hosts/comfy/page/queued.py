"""The workflow that is being run, as the page sent it along with the prompt."""

from collections.abc import Mapping
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

OWNER = "tlora_run"  # the property in which web/runs.js keeps whose runs a node shows


def queued_workflow() -> dict[str, Any]:
    """In the page's own format; empty where the prompt came without, as from a script."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is None or server is None:
        return {}
    for item in server.prompt_queue.get_current_queue_volatile()[0]:
        if item[1] == context.prompt_id:
            workflow = (item[3].get("extra_pnginfo") or {}).get("workflow")
            return workflow if isinstance(workflow, dict) else {}
    return {}


def workflow_id() -> str | None:
    """Of the workflow that is being run: node ids are unique only within one. None where the prompt came without."""
    return queued_workflow().get("id")


def owner_of(workflow: Mapping[str, Any], node_id: str | None) -> str | None:
    """What the page has written into a node of `workflow` to know its runs by, as ids alone are the same in each copy
    of a template. `node_id` is the host's, "3:7" in a sub-graph. None where it wrote nothing, or nothing that it would
    write."""
    try:
        inner, node = workflow, {}
        subgraphs = {each["id"]: each for each in workflow.get("definitions", {}).get("subgraphs", [])}
        for part in (node_id or "").split(":"):
            node = next(each for each in inner["nodes"] if str(each["id"]) == part)
            inner = subgraphs.get(node["type"], {})
        owner = node["properties"][OWNER]
    except (KeyError, TypeError, AttributeError, StopIteration):  # a workflow is data, and may be a stranger's
        return None
    return owner if isinstance(owner, str) else None
