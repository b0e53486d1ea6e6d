"""Starts the real ComfyUI with this pack linked in, and always stops it again."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .build import Host, has_accelerator
from .client import LOOPBACK, Client
from .errors import HostError
from .graph import to_prompt
from .overrides import apply_overrides
from .pins import REPO
from .process import start_group, stop_group
from .results import RunResult

PACK_NAME = "ComfyUI-T-LoRA"
# Generous, because starting takes a minute and more on a busy machine.
START_SECONDS = 600
LOG_TAIL_LINES = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def link_pack(folder: Path, repo: Path = REPO) -> Path:
    """Make `folder` a custom_nodes folder that holds only this pack."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / PACK_NAME
    try:
        link.symlink_to(repo, target_is_directory=True)
    except OSError:
        _link_without_rights(link, repo)
    return link


def _link_without_rights(link: Path, repo: Path) -> None:
    """Windows lets everybody make a junction, but not a symbolic link."""
    try:
        import _winapi

        _winapi.CreateJunction(str(repo), str(link))
    except (ImportError, OSError):
        shutil.copytree(repo, link, ignore=shutil.ignore_patterns(".git", "__pycache__"))


def _unlink_pack(link: Path) -> None:
    # Before the folder around it is deleted, so that nothing can follow the link into the repository.
    with contextlib.suppress(OSError):
        link.unlink() if link.is_symlink() else os.rmdir(link)


def make_workspace(folder: Path) -> None:
    """Make `folder` fit for ComfyUI's --base-directory."""
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (folder / name).mkdir(parents=True, exist_ok=True)


class Server:
    """A ComfyUI process on a free loopback port.

    With `workspace`, models, input, output and user data live there; without it ComfyUI's own folders are used, and
    nothing is written into ComfyUI's program folder either way. With `log_to_terminal` its log is shown as it comes.
    `frontend` is a folder with another interface than the host's own. `private` is a folder for what the server makes:
    its output, its temporary files and T-LoRAs, so that servers beside each other do not write the same files.
    """

    def __init__(
        self,
        host: Host,
        workspace: Path | None = None,
        port: int = 0,
        log_to_terminal: bool = False,
        frontend: Path | None = None,
        private: Path | None = None,
    ):
        self.host = host
        self.workspace = workspace
        self.private = private
        self.port = port or free_port()
        base = workspace or host.comfyui
        made = private or base
        folders = {"output": made / "output", "temp": made / "temp", "input": base / "input"}
        self.client = Client(self.port, folders, self.check_alive)
        self._log_to_terminal = log_to_terminal
        self._frontend = frontend
        self._process = None
        self._scratch: Path | None = None
        self._node_info: dict | None = None

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> Server:
        self._scratch = Path(tempfile.mkdtemp(prefix="tlora-host-"))
        try:
            command = self._command()
            bound = self.private is not None  # a worker may be killed at any time
            if self._log_to_terminal:
                self._process = start_group(command, bound, cwd=self.host.comfyui)
            else:
                with open(self._scratch / "server.log", "wb") as log:
                    self._process = start_group(command, bound, cwd=self.host.comfyui, stdout=log, stderr=log)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _command(self) -> list[str]:
        command = [
            str(self.host.python),
            "main.py",
            "--listen",
            LOOPBACK,
            "--port",
            str(self.port),
            "--disable-auto-launch",
        ]
        # A database of its own: the default one lies in ComfyUI's folder and admits a single process.
        command += ["--database-url", f"sqlite:///{(self._scratch / 'comfyui.db').as_posix()}"]
        if not has_accelerator(self.host.python):
            command.append("--cpu")
        if self._frontend:
            command += ["--front-end-root", str(self._frontend)]
        if self.workspace:
            make_workspace(self.workspace)
            command += ["--base-directory", str(self.workspace), "--disable-api-nodes"]
        if self.private:
            command += ["--output-directory", str(self.private / "output"), "--temp-directory", str(self.private)]
        if paths := self._extra_paths():
            config = self._scratch / "extra_model_paths.yaml"
            # JSON is YAML, and quotes every path correctly.
            config.write_text(json.dumps(paths), encoding="utf-8")
            command += ["--extra-model-paths-config", str(config)]
        return command

    def _extra_paths(self) -> dict:
        paths = {}
        if not self._already_installed():
            link_pack(self._scratch / "custom_nodes")
            paths["tlora"] = {"custom_nodes": str(self._scratch / "custom_nodes")}
        if self.private:
            (self.private / "loras").mkdir(parents=True, exist_ok=True)
            paths["private"] = {"is_default": True, "loras": str(self.private / "loras")}
        return paths

    def _already_installed(self) -> bool:
        """Whether the user's ComfyUI loads this very folder by itself; loading it twice would do no good."""
        installed = self.host.comfyui / "custom_nodes"
        return self.workspace is None and any(entry.resolve() == REPO for entry in installed.glob("*"))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.client.answers():
            self.check_alive()
            if time.monotonic() > deadline:
                raise HostError(
                    f"ComfyUI did not answer within {START_SECONDS} s; the end of its log:\n{self.log_tail()}"
                )
            time.sleep(0.2)
        # Another program may have taken the port in the meantime and answered in ComfyUI's place.
        self.check_alive()

    def check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            status = "" if self._process is None else f" with status {self._process.returncode}"
            raise HostError(f"ComfyUI ended{status}; the end of its log:\n{self.log_tail()}")

    def log(self) -> str:
        """All that the server has logged so far (empty when the log goes to the terminal)."""
        path = self._scratch / "server.log" if self._scratch else None
        return path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""

    def log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-LOG_TAIL_LINES:])

    def wait(self) -> int:
        """Wait for the server to end by itself."""
        return self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            stop_group(self._process)
        if self._scratch is not None:
            _unlink_pack(self._scratch / "custom_nodes" / PACK_NAME)
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def object_info(self) -> dict:
        """The server's description of every node class; asked for once."""
        if self._node_info is None:
            self._node_info = self.client.object_info()
        return self._node_info

    def to_prompt(self, workflow: dict | str | Path, sets: dict[str, object] | None = None) -> dict:
        """The API-format prompt of a workflow in either format, with inputs replaced as `sets` says."""
        return apply_overrides(to_prompt(load_workflow(workflow), self.object_info()), sets or {}, self.object_info())

    def run(
        self,
        workflow: dict | str | Path,
        sets: dict[str, object] | None = None,
        check: bool = True,
        listener=None,
        timeout: float | None = None,
    ) -> RunResult:
        """Run a workflow (a dict or a file, either format); with `check`, raise WorkflowError when it fails."""
        loaded = load_workflow(workflow)
        prompt = self.to_prompt(loaded, sets)
        result = self.client.run(prompt, loaded if "nodes" in loaded else None, listener, timeout)
        return result.check() if check else result


def load_workflow(workflow: dict | str | Path) -> dict:
    if isinstance(workflow, dict):
        return workflow
    try:
        loaded = json.loads(Path(workflow).read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(f"The workflow {workflow} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise HostError(f"The workflow {workflow} is not valid JSON: {error}.") from error
    if not isinstance(loaded, dict):
        raise HostError(f"{workflow} is not a ComfyUI workflow.")
    return loaded


@contextlib.contextmanager
def own_server() -> Iterator[Server]:
    """For scripts run by `tools/host.py python`: a server of their ComfyUI, in a workspace that goes away with it."""
    comfyui = Path(importlib.util.find_spec("folder_paths").origin).parent
    host = Host(comfyui, Path(sys.executable), "", ours=True)
    with tempfile.TemporaryDirectory() as folder, Server(host, Path(folder)) as server:
        yield server
