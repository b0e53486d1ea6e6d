"""Talks to a running ComfyUI: queues a prompt, follows it, and collects what it produced."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from .errors import HostError
from .progress import Silent
from .results import OutputFile, RunResult, failure_in_words, refusal_in_words
from .websocket import WebSocket

LOOPBACK = "127.0.0.1"
# The history entry is written a moment after the last event.
HISTORY_SECONDS = 30


class Client:
    """`check_alive` raises when the server has died; `folders` maps output, temp and input to local paths."""

    def __init__(self, port: int, folders: dict[str, Path], check_alive: Callable[[], None]):
        self.port = port
        self.folders = folders
        self.check_alive = check_alive
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def request(self, path: str, data: dict | None = None, timeout: float = 60) -> bytes:
        body = None if data is None else json.dumps(data).encode()
        asked = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with self._opener.open(asked, timeout=timeout) as answer:
            return answer.read()

    def get_json(self, path: str, timeout: float = 60) -> dict:
        return json.loads(self.request(path, timeout=timeout))

    def answers(self) -> bool:
        try:
            self.get_json("/system_stats", timeout=5)
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return True

    def object_info(self) -> dict:
        return self.get_json("/object_info")

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    def fetch(self, file: OutputFile) -> bytes:
        query = urllib.parse.urlencode({"filename": file.filename, "subfolder": file.subfolder, "type": file.kind})
        return self.request(f"/view?{query}")

    def run(self, prompt: dict, workflow: dict | None = None, listener=None, timeout: float | None = None) -> RunResult:
        """Queue an API-format prompt and wait for its end; `workflow` is kept in the pictures' metadata."""
        listener = listener or Silent()
        result, started, client_id = RunResult(), time.monotonic(), uuid.uuid4().hex
        try:
            with WebSocket(LOOPBACK, self.port, f"/ws?clientId={client_id}") as events:
                result.prompt_id = self._queue(prompt, workflow, client_id, result)
                if not result.errors:
                    self._follow(events, prompt, result, listener, timeout)
        except (ConnectionError, urllib.error.URLError) as error:
            self.check_alive()
            raise HostError(f"The connection to ComfyUI was lost: {error}.") from error
        finally:
            listener.finish()
        if result.prompt_id:
            result.take_outputs(self._history(result.prompt_id).get("outputs", {}), self.folders)
        result.seconds = time.monotonic() - started
        return result

    def _queue(self, prompt: dict, workflow: dict | None, client_id: str, result: RunResult) -> str:
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        try:
            answer = json.loads(
                self.request("/prompt", {"prompt": prompt, "client_id": client_id, "extra_data": extra})
            )
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                answer = json.loads(text)
            except ValueError:
                raise HostError(f"ComfyUI answered with status {error.code}: {text[:300]}") from error
            result.errors += refusal_in_words(answer, prompt)
            return ""
        if answer.get("node_errors"):
            # The server runs the branches that are valid; a run that can only be half a success is not worth its time.
            self._withdraw(answer["prompt_id"])
            result.errors += refusal_in_words(answer, prompt)
            return ""
        return answer["prompt_id"]

    def _withdraw(self, prompt_id: str) -> None:
        self.request("/queue", {"delete": [prompt_id]})
        self.request("/interrupt", {"prompt_id": prompt_id})

    def _follow(self, events: WebSocket, prompt: dict, result: RunResult, listener, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = events.receive(timeout=1.0)
            if message is not None:
                event = json.loads(message)
                if self._ends(event.get("type"), event.get("data") or {}, prompt, result, listener):
                    return
            else:
                self.check_alive()
            if deadline is not None and time.monotonic() > deadline:
                self._withdraw(result.prompt_id)
                result.errors.append(f"The workflow did not finish within {timeout:g} s.")
                return

    def _ends(self, kind: str, data: dict, prompt: dict, result: RunResult, listener) -> bool:
        """Handle one event of our prompt; True when it was the last one."""
        if data.get("prompt_id") != result.prompt_id:
            return False
        if kind == "execution_error":
            result.errors.append(failure_in_words(data, prompt))
        elif kind == "execution_interrupted":
            result.errors.append("The run was cancelled.")
        elif kind == "progress" and data.get("node"):
            listener.step(data["node"], self._title(data["node"], prompt), data["value"], data["max"])
        elif kind == "executing" and data.get("node"):
            shown = data.get("display_node") or data["node"]
            listener.node_started(shown, self._title(shown, prompt))
        return kind in ("execution_error", "execution_interrupted", "execution_success")

    @staticmethod
    def _title(node_id: str, prompt: dict) -> str:
        node = prompt.get(str(node_id), {})
        return node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}"

    def _history(self, prompt_id: str) -> dict:
        deadline = time.monotonic() + HISTORY_SECONDS
        while time.monotonic() < deadline:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            self.check_alive()
            time.sleep(0.05)
        raise HostError("ComfyUI finished the workflow but reported no result.")
