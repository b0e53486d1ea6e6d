"""Training runs on disk: one folder each, with its settings, its checkpoint, its loss and its validation pictures.

    <name>-<key>/run.json           what it was asked for, where it stands, which file it made
                 checkpoint.pt      all that is needed to go on; gone when the run has finished
                 loss.csv           the loss of each step, once the run has ended
                 validation/*.png   the pictures made on the way
                 events.out.*       loss and pictures for TensorBoard

The key is a hash of all that determines the result. By it a finished run is found again instead of being trained once
more, and an unfinished one is taken up.
"""

import json
import logging
import pickle
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import TLoRAError
from ..files.atomic import write_whole
from ..packages import required
from ..version import __version__

RECORD, CHECKPOINT, LOSS = "run.json", "checkpoint.pt", "loss.csv"
FLUSH_EVERY = 20.0  # seconds
KEY_SHOWN, NAME_SHOWN = 16, 64  # digits of the key, and letters of the name, in a folder's name
_UNSAFE = re.compile(r"[^\w.-]+")


def as_file_name(text: str, otherwise: str) -> str:
    """`text` with "_" for what not every file system takes; `otherwise` where nothing is left."""
    return _UNSAFE.sub("_", text).strip("._") or otherwise


class RunFolder:
    """One run's folder. `record` is what run.json holds: key, state, step, steps, settings, versions, message; and once
    there is a result its SHA-256, `sha256_also`, those of its files with another thumbnail or none, and `files`, the
    names under which it was saved, by the name that was asked for."""

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path, self.record = path, record

    @classmethod
    def find(cls, root: Path, key: str) -> "RunFolder | None":
        """The latest run with that key, or None. Folders that hold no valid record are passed over."""
        found = []
        for path in root.glob(f"*-{key[:KEY_SHOWN]}*"):
            record = _read_record(path / RECORD)
            if record.get("key") == key and isinstance(record.get("started"), int | float):
                found.append(cls(path, record))
        return max(found, key=lambda run: run.record["started"], default=None)

    @classmethod
    def create(cls, root: Path, name: str, key: str, steps: int, settings: Mapping[str, Any]) -> "RunFolder":
        """A new folder below `root`. `settings`: JSON values for people to read."""
        stem = f"{as_file_name(name[:NAME_SHOWN], 'run')}-{key[:KEY_SHOWN]}"
        taken = {path.name for path in root.glob(f"{stem}*")}
        path = root / next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        path.mkdir(parents=True)
        versions = {"pack": __version__, "torch": torch.__version__, "python": platform.python_version()}
        run = cls(
            path,
            {
                "key": key,
                "state": "running",
                "step": 0,
                "steps": steps,
                "message": "",
                "files": {},
                "sha256": "",
                "started": time.time(),
                "settings": dict(settings),
                "versions": versions,
            },
        )
        run.update()
        return run

    def update(self, **changes) -> None:
        """Changes the record, on disk too."""
        self.record.update(changes)
        text = json.dumps(self.record, indent=2, ensure_ascii=False)
        write_whole(self.path / RECORD, lambda path: path.write_text(text, encoding="utf-8"))

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint by `state`, of tensors and plain values, at once or not at all."""
        write_whole(self.path / CHECKPOINT, lambda path: torch.save(dict(state), path))
        self.update(step=state["step"])

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The latest checkpoint on the CPU, or None where there is none. Raises TLoRAError for a damaged one."""
        path = self.path / CHECKPOINT
        if not path.is_file():
            return None
        try:
            with torch.inference_mode(False):  # nodes run in inference mode, and autograd refuses what is made in it
                return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise TLoRAError(
                f'The checkpoint in "{self.path.name}" is damaged; set rerun to "restart" to train anew.'
            ) from error

    def forget_checkpoint(self) -> None:
        """Of a run that has nothing more to go on with."""
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def save_losses(self, losses: Sequence[float]) -> None:
        """That of each step, from the first. Raises TLoRAError when the disk does not take it, as all that saves here
        does."""
        text = "step,loss\n" + "".join(f"{step},{loss!r}\n" for step, loss in enumerate(losses, 1))
        write_whole(self.path / LOSS, lambda path: path.write_text(text, encoding="utf-8"))

    def load_losses(self) -> list[float]:
        """What save_losses wrote; [] where that is gone."""
        try:
            lines = (self.path / LOSS).read_text(encoding="utf-8").splitlines()[1:]
            return [float(line.split(",")[1]) for line in lines]
        except (OSError, ValueError, IndexError):
            return []

    def save_picture(self, step: int, picture: Image.Image) -> None:
        """A validation picture; a later one of the same step takes its place."""
        folder = self.path / "validation"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"step_{step:06}.png", lambda path: picture.save(path, "PNG"))


class Recorder:
    """Writes loss and pictures for TensorBoard, and to Weights & Biases where that is asked for. A disk that is full,
    or a service that fails, ends that record with a warning, and not the training.

    Raises TLoRAError when a package is missing.
    """

    def __init__(self, run: RunFolder, first_step: int, wandb: bool = False):
        self.board = required("tensorboardX", "The record of a run")
        service = required("wandb", "The input wandb") if wandb else None
        self.flushed = time.monotonic()
        self.events = self.wandb = None
        with self._or_without("events"):
            # The package's own writer has a thread, whose end on a full disk would leave the training waiting for it
            # for ever.
            self.events = self.board.event_file_writer.EventsWriter(str(run.path / "events"))
            if first_step:  # what an earlier part of the run wrote beyond this step is void
                log = self.board.proto.event_pb2.SessionLog(status=self.board.proto.event_pb2.SessionLog.START)
                self._write(first_step + 1, session_log=log)
        with self._or_without("wandb"):
            if service is not None:
                self.wandb = service.init(
                    project="t-lora", name=run.path.name, dir=str(run.path), config=run.record["settings"], reinit=True
                )

    def loss(self, step: int, loss: float) -> None:
        with self._or_without("events"):
            self._write(step, summary=self.board.summary.scalar("loss", loss))
            if time.monotonic() - self.flushed > FLUSH_EVERY:
                self._flush()
        with self._or_without("wandb"):
            if self.wandb is not None:
                self.wandb.log({"loss": loss}, step=step)

    def picture(self, step: int, picture: Image.Image) -> None:
        with self._or_without("events"):
            pixels = np.asarray(picture.convert("RGB"))
            self._write(step, summary=self.board.summary.image("validation", pixels, dataformats="HWC"))
            self._flush()
        with self._or_without("wandb"):
            if self.wandb is not None:
                self.wandb.log({"validation": required("wandb", "The input wandb").Image(picture)}, step=step)

    def close(self) -> None:
        with self._or_without("events"):
            if self.events is not None:
                self.events.close()
        with self._or_without("wandb"):
            if self.wandb is not None:
                self.wandb.finish()

    def _write(self, step: int, **content) -> None:
        if self.events is not None:
            self.events.write_event(self.board.proto.event_pb2.Event(wall_time=time.time(), step=step, **content))

    def _flush(self) -> None:
        self.flushed = time.monotonic()
        if self.events is not None:
            self.events.flush()

    @contextmanager
    def _or_without(self, name: str):
        try:
            yield
        except Exception as error:
            setattr(self, name, None)
            logging.warning("[T-LoRA] The record of this run (%s) ends here: %s", name, error)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        logging.warning("[T-LoRA] %s is not the record of a run.", path)
        return {}
    return record if isinstance(record, dict) else {}
