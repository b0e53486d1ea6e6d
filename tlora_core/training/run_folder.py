"""Training runs on disk: one folder for each, with its settings, run state, losses and validation pictures.

    <name>-<key>/run.json           settings, progress, and the names of the saved file
                 checkpoint.pt      the run state, to resume from; removed when the run has finished
                 loss.csv           the loss of each step, written when the run ends
                 validation/*.png   the validation pictures: a column for each prompt, a row for each seed
                 scores.csv         the scores of each validation, if they are measured
                 scores.json        the same for each picture, with what they are scores of
                 events.out.*       loss, scores and pictures for TensorBoard

The key is a hash of everything that determines the result. It identifies a finished run, which is not trained again,
and an unfinished run, which is resumed.
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
from PIL.PngImagePlugin import PngInfo

from ..errors import TLoRAError
from ..files.atomic import write_whole
from ..packages import required
from ..version import __version__

RECORD, STATE, LOSS = "run.json", "checkpoint.pt", "loss.csv"
SCORES, SCORES_TABLE = "scores.json", "scores.csv"
PROMPTS = "tlora_prompts"  # the text in a validation picture
FLUSH_EVERY = 20.0  # seconds
KEY_SHOWN, NAME_SHOWN = 16, 64  # digits of the key and characters of the name in a folder's name
_UNSAFE = re.compile(r"[^\w.-]+")


def as_file_name(text: str, otherwise: str) -> str:
    """`text` with "_" for characters that some file systems refuse; `otherwise` if nothing is left."""
    return _UNSAFE.sub("_", text).strip("._") or otherwise


class RunFolder:
    """One run's folder. `record` is the content of run.json: key, state, step, steps, settings, versions, message. With
    a result, also: its SHA-256; `sha256_also`, the hashes of its files with another thumbnail or none; and `files`,
    requested file name -> saved name."""

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path, self.record = path, record

    @classmethod
    def find(cls, root: Path, key: str) -> "RunFolder | None":
        """The latest run with that key, or None. Folders without a valid record are skipped."""
        found = []
        for path in root.glob(f"*-{key[:KEY_SHOWN]}*"):
            record = _read_json(path / RECORD)
            if record.get("key") == key and isinstance(record.get("started"), int | float):
                found.append(cls(path, record))
        return max(found, key=lambda run: run.record["started"], default=None)

    @classmethod
    def create(cls, root: Path, name: str, key: str, steps: int, settings: Mapping[str, Any]) -> "RunFolder":
        """Makes a folder below `root`. `settings`: JSON values for human readers."""
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
        """Changes the record in memory and on disk."""
        self.record.update(changes)
        text = json.dumps(self.record, indent=2, ensure_ascii=False)
        write_whole(self.path / RECORD, lambda path: path.write_text(text, encoding="utf-8"))

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replaces the run state by `state`, of tensors and plain values, atomically."""
        write_whole(self.path / STATE, lambda path: torch.save(dict(state), path))
        self.update(step=state["step"])

    def load_state(self) -> dict[str, Any] | None:
        """The latest run state on the CPU, or None without one. Raises TLoRAError for a damaged file."""
        path = self.path / STATE
        if not path.is_file():
            return None
        try:
            with torch.inference_mode(False):  # nodes run in inference mode, whose tensors autograd refuses
                return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise TLoRAError(
                f'The run state in "{self.path.name}" is damaged; set rerun to "restart" to train anew.'
            ) from error

    def remove_state(self) -> None:
        """Removes the run state of a run that cannot be resumed."""
        (self.path / STATE).unlink(missing_ok=True)

    def save_losses(self, losses: Sequence[float]) -> None:
        """Writes the loss of each step, from the first. Raises TLoRAError when the file cannot be written, like all
        methods that save."""
        text = "step,loss\n" + "".join(f"{step},{loss!r}\n" for step, loss in enumerate(losses, 1))
        write_whole(self.path / LOSS, lambda path: path.write_text(text, encoding="utf-8"))

    def load_losses(self) -> list[float]:
        """The losses that save_losses wrote; [] if there are none."""
        try:
            lines = (self.path / LOSS).read_text(encoding="utf-8").splitlines()[1:]
            return [float(line.split(",")[1]) for line in lines]
        except (OSError, ValueError, IndexError):
            return []

    def save_scores(self, table: Sequence[Mapping[str, Any]], details: Mapping[str, Any]) -> None:
        """Writes the scores of all validations. table: a row for each, with the same names; None where a value was not
        measured. details: JSON values, for `load_scores`."""
        lines = [",".join(table[0])] + [",".join("" if v is None else repr(v) for v in row.values()) for row in table]
        write_whole(self.path / SCORES_TABLE, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
        text = json.dumps(details, indent=1, ensure_ascii=False)
        write_whole(self.path / SCORES, lambda path: path.write_text(text, encoding="utf-8"))

    def load_scores(self) -> dict[str, Any]:
        """The details that save_scores wrote; {} if there are none."""
        return _read_json(self.path / SCORES) if (self.path / SCORES).exists() else {}

    def save_picture(self, step: int, picture: Image.Image, prompts: Sequence[str]) -> None:
        """Writes a validation picture with a column for each of the prompts, which stand in the file's text PROMPTS as
        a JSON list; a later picture of the same step replaces it."""
        folder, told = self.path / "validation", PngInfo()
        folder.mkdir(exist_ok=True)
        told.add_text(PROMPTS, json.dumps(list(prompts)))
        write_whole(folder / f"step_{step:06}.png", lambda path: picture.save(path, "PNG", pnginfo=told))


class Recorder:
    """Writes loss and pictures for TensorBoard, and with `wandb` to Weights & Biases. A full disk or a failed service
    ends only this record, with a warning; training continues.

    Raises TLoRAError when a package is missing.
    """

    def __init__(self, run: RunFolder, first_step: int, wandb: bool = False):
        self.board = required("tensorboardX", "The record of a run")
        service = required("wandb", "The input wandb") if wandb else None
        self.flushed = time.monotonic()
        self.events = self.wandb = None
        with self._or_without("events"):
            # The package's own writer uses a thread; if a full disk kills the thread, training would wait for it
            # forever.
            self.events = self.board.event_file_writer.EventsWriter(str(run.path / "events"))
            if first_step:  # discards what an earlier part of the run wrote beyond this step
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

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Of a validation, by name."""
        with self._or_without("events"):
            for name, value in scores.items():
                self._write(step, summary=self.board.summary.scalar(f"scores/{name}", value))
            self._flush()
        with self._or_without("wandb"):
            if self.wandb is not None:
                self.wandb.log(dict(scores), step=step)

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


def _read_json(path: Path) -> dict[str, Any]:
    """The table in a file; {}, with a warning, if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        logging.warning("[T-LoRA] %s is not the record of a run.", path)
    return found if isinstance(found, dict) else {}
