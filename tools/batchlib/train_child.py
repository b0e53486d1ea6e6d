"""A process with ComfyUI's modules that trains one row after the other.

Settings: `comfyui`, `host_arguments`, `private`, a folder for what it writes, and `verbose`. See child.py for what
it is told and tells.
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainlib import job as training  # noqa: E402
from trainlib.watch import TRAINING, Watch  # noqa: E402

from batchlib import memory  # noqa: E402
from batchlib.child import Talk  # noqa: E402

_NO_PARTS = {"model": None, "unet": None, "clip": None, "vae": None, "clip_type": "", "weight_dtype": "default"}


def main(talk: Talk) -> None:
    settings, private = talk.settings, Path(talk.settings["private"])
    training.start(settings)
    _use_private_folders(private)
    runner = Runner(talk, private / "results", settings["verbose"])
    for command in talk.commands():
        if command["do"] == "check":
            talk.tell("checked", **check(command["jobs"]))
        else:
            talk.tell("end", **runner.run(command["job"]))


def _use_private_folders(private: Path) -> None:
    """Runs and T-LoRAs go there, so that workers beside each other do not write the same files."""
    import folder_paths

    folder_paths.set_output_directory(str(private / "output"))
    (private / "loras").mkdir(exist_ok=True)
    folder_paths.folder_names_and_paths["loras"][0].insert(0, str(private / "loras"))


def check(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first job that cannot be, and why; nothing is loaded."""
    import tlora_core
    from tlora_core.hosts.comfy.loaders import check_files
    from tlora_core.hosts.comfy.training.headless import completed_inputs

    for job in jobs:
        try:
            completed_inputs(job["inputs"])
            check_files(job["parts"])
        except tlora_core.TLoRAError as error:
            return {"row": job["row"], "column": "", "error": str(error)}
    return {}


class Heard(Watch):
    """Shows nothing here, and tells the worker how far a training is."""

    def __init__(self, talk: Talk):
        super().__init__(io.StringIO())
        self.talk = talk
        self.first_step: int | None = None  # done before, by an earlier part of the run

    def hear(self, event: str, data: dict[str, Any]) -> None:
        super().hear(event, data)
        if event == TRAINING and data["state"] == "running":
            self.first_step = data["step"] if self.first_step is None else self.first_step
            self.talk.tell("progress", step=data["step"], steps=data["steps"], loss=self.loss)


class Runner:
    """Trains; the model of the row before stays loaded for the next that asks for the same."""

    def __init__(self, talk: Talk, results: Path, verbose: bool):
        self.talk, self.results, self.verbose = talk, results, verbose
        self._loaded: tuple[dict[str, Any], dict[str, Any]] | None = None

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The row's end."""
        began, watch = time.monotonic(), Heard(self.talk)
        self.talk.on_cancel = lambda: watch.cancel(2, None)
        memory.forget_peak(os.getpid())
        asked = {**job, "out": str(self.results), "verbose": self.verbose}
        asked["inputs"] = {"file_name": job["name"], **job["inputs"]}
        try:
            if self.talk.cancelled.is_set():
                raise training.Ended("cancelled", "Cancelled before the first step.", 130)
            result = training.outcome(asked, watch, self._parts)
        except training.Ended as ended:
            result = {"state": ended.state, "error": str(ended)}
        told = {name: result.get(name) for name in ("state", "error", "message", "loss", "scores", "kept_step")}
        peaks = {"peak_ram_gib": memory.peak_gib(os.getpid()), "peak_vram_gib": _peak_vram()}
        return {**told, **peaks, "first_step": watch.first_step, "seconds": round(time.monotonic() - began, 2)}

    def _parts(self, parts: dict[str, Any]) -> dict[str, Any]:
        """The model's parts, loaded."""
        import torch

        from tlora_core.hosts.comfy.training.headless import loaded

        if self._loaded is None or self._loaded[0] != parts:
            self._loaded = None  # before another is loaded beside it
            with torch.inference_mode():
                found = dict(zip(("model", "clip", "vae"), loaded(**{**_NO_PARTS, **parts})))
            self._loaded = dict(parts), found
        return self._loaded[1]


def _peak_vram() -> float | None:
    import torch
    from comfy.model_management import get_torch_device

    device = get_torch_device()
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None


if __name__ == "__main__":
    main(Talk())
