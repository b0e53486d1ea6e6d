"""What a finished workflow produced, and the words for what went wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .errors import WorkflowError

LONGEST_DETAIL = 400


@dataclass(frozen=True)
class OutputFile:
    """A file in the server's output, temp or input folder; `path` is where it lies on this machine."""

    node: str
    filename: str
    subfolder: str
    kind: str
    path: Path


@dataclass
class RunResult:
    """The outcome of one prompt; `outputs` maps a node's id to what it reported to the interface."""

    prompt_id: str = ""
    seconds: float = 0.0
    outputs: dict[str, dict] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    images: list[OutputFile] = field(default_factory=list)
    other: list[OutputFile] = field(default_factory=list)
    tlora_files: list[Path] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def check(self) -> RunResult:
        if self.errors:
            raise WorkflowError("\n".join(self.errors))
        return self

    def take_outputs(self, outputs: dict[str, dict], folders: dict[str, Path]) -> None:
        """Sort what the nodes reported into pictures, other files, T-LoRA files and texts."""
        self.outputs = outputs
        for node, ui in outputs.items():
            for name, items in ui.items():
                for item in items if isinstance(items, list) else []:
                    self._take(node, name, item, folders)

    def _take(self, node: str, name: str, item: object, folders: dict[str, Path]) -> None:
        if name == "tlora_files":
            self.tlora_files.append(Path(item))
        elif name == "text":
            self.texts.append(str(item))
        elif isinstance(item, dict) and "filename" in item:
            kind, subfolder = item.get("type", "output"), item.get("subfolder", "")
            path = folders.get(kind, Path()) / subfolder / item["filename"]
            found = OutputFile(node, item["filename"], subfolder, kind, path)
            (self.images if name == "images" else self.other).append(found)


def node_name(node_id: str, prompt: dict) -> str:
    """A node the way its user sees it: the title and, where it differs, the class."""
    node = prompt.get(node_id, {})
    class_type = node.get("class_type", "unknown")
    title = node.get("_meta", {}).get("title") or class_type
    described = title if title == class_type else f"{title} ({class_type})"
    return f"{described}, node {node_id}"


def refusal_in_words(answer: dict, prompt: dict) -> list[str]:
    """The sentences for a prompt that failed validation."""
    sentences = []
    for node_id, found in (answer.get("node_errors") or {}).items():
        # Once, however many inputs an error marks.
        told = dict.fromkeys(_sentence(error) for error in found.get("errors", []))
        sentences += [f"{node_name(node_id, prompt)}: {sentence}" for sentence in told]
    if not sentences:
        error = answer.get("error") or {"message": "The server refused the workflow"}
        sentences.append(_sentence(error) if isinstance(error, dict) else str(error))
    return sentences


def _sentence(error: dict) -> str:
    message, details = error.get("message", ""), str(error.get("details") or "")
    if error.get("type") == "custom_validation_failed" and " - " in details:
        return details.partition(" - ")[2]  # the node's own words, after the input's name
    if len(details) > LONGEST_DETAIL:
        details = details[:LONGEST_DETAIL] + " ..."
    return f"{message} ({details})" if details and details not in message else message


def failure_in_words(data: dict, prompt: dict) -> str:
    """The sentence for a node that raised while it ran: its own message first."""
    message = str(data.get("exception_message", "")).strip() or data.get("exception_type", "unknown error")
    return f"{node_name(str(data.get('node_id')), prompt)}: {message}"


def copy_into(out: str, name: str, data: bytes) -> Path:
    """Write `data` to a file in the folder `out`; nothing that is there already is overwritten, nor copied twice."""
    folder = Path(out).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / name, 2
    while path.exists() and path.read_bytes() != data:
        path = folder / f"{Path(name).stem}_{number}{Path(name).suffix}"
        number += 1
    if not path.exists():
        path.write_bytes(data)
    return path
