"""A process that keeps a ComfyUI server and runs a workflow on it for one row after the other. Standard library only.

Settings: `comfyui`, `python`, `ours`, `workspace`, `workflow` and `private`, a folder for what is made. See child.py
for what it is told and tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hostlib.build import Host  # noqa: E402
from hostlib.errors import HostError  # noqa: E402
from hostlib.progress import Silent  # noqa: E402
from hostlib.results import RunResult, copy_into  # noqa: E402
from hostlib.server import Server  # noqa: E402

from batchlib import memory  # noqa: E402
from batchlib.cells import read_cell  # noqa: E402
from batchlib.child import Talk  # noqa: E402

UPLOADS = "tlora_batch"  # the folder in ComfyUI's input folder
SAMPLE_SECONDS = 1.0


def main(talk: Talk) -> None:
    settings, private = talk.settings, Path(talk.settings["private"])
    host = Host(Path(settings["comfyui"]), Path(settings["python"]), "", settings["ours"])
    workspace = Path(settings["workspace"]) if settings["workspace"] else None
    server = Server(host, workspace, private=private)
    talk.on_end = server.stop
    with server:
        runner = Runner(server, settings["workflow"], talk, private / "results")
        for command in talk.commands():
            if command["do"] == "check":
                talk.tell("checked", **runner.check(command["jobs"]))
            else:
                talk.tell("end", **runner.run(command["job"]))


class Runner:
    """Runs the workflow for rows; what ComfyUI has loaded for one stays for the next."""

    def __init__(self, server: Server, workflow: dict, talk: Talk, results: Path):
        self.server, self.workflow, self.talk, self.results = server, workflow, talk, results

    def check(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        """The first cell that cannot be, and why; or the columns whose files ComfyUI is to be given."""
        prompt, uploads = self.server.to_prompt(self.workflow), set()
        for job in jobs:
            for column, value in job["sets"].items():
                try:
                    _, is_upload = read_cell(prompt, column, value, self.server.object_info(), column in job["files"])
                except HostError as error:
                    return {"row": job["row"], "column": column, "error": str(error)}
                uploads |= {column} if is_upload else set()
        return {"uploads": sorted(uploads)}

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The row's end. Its files are in `results` then."""
        began, pid = time.monotonic(), self.server.pid
        self.talk.on_cancel = self.server.client.interrupt
        memory.forget_peak(pid)
        state, error = "done", ""
        with _sampled(self.server) as vram:
            try:
                if self.talk.cancelled.is_set():
                    raise HostError("Cancelled before it began.")
                self._keep(self.server.run(self.workflow, self._sets(job), listener=_Told(self.talk)))
            except HostError as failed:
                state, error = "cancelled" if self.talk.cancelled.is_set() else "failed", str(failed)
        peaks = {"peak_ram_gib": memory.peak_gib(pid), "peak_vram_gib": max(vram, default=None)}
        error = " ".join(error.split())
        return {"state": state, "error": error, **peaks, "seconds": round(time.monotonic() - began, 2)}

    def _sets(self, job: dict[str, Any]) -> dict[str, Any]:
        """The cells as values, with the files put into ComfyUI's input folder."""
        prompt, info, sets = self.server.to_prompt(self.workflow), self.server.object_info(), {}
        for column, value in job["sets"].items():
            sets[column], _ = read_cell(prompt, column, value, info, column in job["files"])
        for column, [path] in job["files"].items():
            sets[column] = given(Path(path), self.server.client.folders["input"])
        return sets

    def _keep(self, result: RunResult) -> None:
        for path in result.tlora_files:
            copy_into(str(self.results), path.name, path.read_bytes())
        for file in result.images + result.other:
            copy_into(str(self.results), file.filename, file.path.read_bytes())
        if result.texts:
            copy_into(str(self.results), "text.txt", "\n".join(result.texts).encode())


def given(file: Path, folder: Path) -> str:
    """Copies a file into ComfyUI's input folder, and gives its name there: one by its content, which two rows or two
    workers may share."""
    name = f"{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}{file.suffix}"
    target = folder / UPLOADS / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return f"{UPLOADS}/{name}"


class _Told(Silent):
    """Tells the worker how far a node is."""

    def __init__(self, talk: Talk):
        self.talk = talk

    def step(self, node: str, title: str, value: float, maximum: float) -> None:
        self.talk.tell("progress", step=value, steps=maximum, title=title)


@contextlib.contextmanager
def _sampled(server: Server) -> Iterator[list[float]]:
    """Within the block, the memory that is in use on the card, in GiB, about every second; nothing without a card."""
    samples: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            with contextlib.suppress(OSError, ValueError):
                devices = server.client.get_json("/system_stats")["devices"]
                cards = [each for each in devices if each["type"] != "cpu"]
                samples.extend(round((each["vram_total"] - each["vram_free"]) / 2**30, 3) for each in cards)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main(Talk())
