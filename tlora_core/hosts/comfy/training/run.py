"""A training run as the user sees it, from its current step to its end: watched, paused, stopped, saved."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comfy.model_management import InterruptProcessingException
from comfy.utils import ProgressBar

from ....errors import TLoRAError
from ....files.atomic import write_whole
from ....files.tlora_file import TLoRAFile
from ....reports.live_scores import LiveScorer, StepScores
from ....training.run_folder import Recorder, RunFolder
from ....training.trainer import TrainingDiverged
from ..files import lora_path, name_of, new_lora_path, save_elsewhere
from ..page.training import Ended, LiveRun
from .keeping import LAST, Keeping
from .personalize import Personalization
from .scored import Kept, Validations

DTYPE = torch.float16  # of the files; see docs/FILE_FORMAT.md for its error


@dataclass(frozen=True)
class Outcome:
    """The T-LoRA as read from its file, the file's name in the loras list, the run's folder, the loss of each step, the
    scores of each validation, and why the file holds the step it holds; "" if that is the last in any case."""

    tlora: TLoRAFile
    file: str
    folder: Path
    losses: list[float] = field(default_factory=list)
    scores: list[StepScores] = field(default_factory=list)
    why: str = ""

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return lora_path(self.file)

    @property
    def step(self) -> int:
        """The step that the file holds."""
        return self.tlora.training["steps_done"]


class TrainingRun:
    """One run from its current step to its end."""

    stopped = 0  # runs that the user has stopped, in this process

    def __init__(
        self,
        personalization: Personalization,
        folder: RunFolder,
        keeping: Keeping,
        file_name: str,
        node_id: str | None,
        remark: str = "",
        scorer: LiveScorer | None = None,
        scored: Mapping[str, Any] | None = None,
    ):
        """scorer: of the validations, or None. scored: the validations of the run state that it goes on from."""
        self.personalization, self.trainer = personalization, personalization.trainer
        self.request, self.folder, self.keeping, self.file_name = personalization.request, folder, keeping, file_name
        self.steps, first = self.request.config.steps, self.trainer.step
        self.recorder = Recorder(folder, first, keeping.wandb)
        subject = f"{self.request.token} {self.request.class_word}".strip()
        title = f"{subject}: {self.request}, {personalization.guidance}, {personalization.layers_in_words}"
        self.live = LiveRun.begin(node_id, self.steps, first, title)
        for step, loss in enumerate(self.trainer.losses, 1):
            self.live.report(step, loss)
        self.bar = ProgressBar(self.steps, node_id=node_id)
        self.validations = Validations(personalization, keeping, scorer, folder, self.recorder, self.live)
        if scored is not None:
            self.validations.load_state_dict(scored)
        self.save_requested = self.is_ending = self.is_saved = False  # is_saved: the result is saved
        # The run is trained, or the user has stopped it, and only its file is missing.
        self.is_over = first == self.steps or (keeping.rerun == "auto" and 0 < first == folder.record.get("unsaved"))
        self.state_step = first  # step of the run state on disk; 0 if there is none
        if first:
            remark = (
                f"resuming an earlier run at step {first}" if not self.is_over else "writing the file of an earlier run"
            )
        if remark:
            self.live.note(remark)

    def go(self) -> Outcome:
        """Trains to the last step, or until the user stops it, and saves. Records every error and raises it; lets the
        host's interrupt through."""
        try:
            if not (self.is_over or self._is_done):
                self.validations.begin()
            while not (self.is_over or self._is_done or self.live.stop_requested):
                self.personalization.train(self._next_pause(), self._on_step)
                self._pause()
            return self._end("done" if self._is_done else "stopped")
        except InterruptProcessingException:
            if not self.is_saved:
                self._cancelled()
            raise
        except TrainingDiverged as error:
            if not error.kept_step:
                self._ended_badly("failed", str(error), step=0)
                raise
            raise TLoRAError(f"{error} {self._save_last_good_state(str(error))}") from error
        except Exception as error:
            self._ended_badly("failed", str(error), step=self.trainer.step)
            raise
        finally:
            self.recorder.close()

    @property
    def _is_done(self) -> bool:
        return self.trainer.step == self.steps or self.validations.is_past

    def _on_step(self, step: int, loss: float) -> bool:
        self.recorder.loss(step, loss)
        self.live.way(*self.personalization.way)
        self.live.report(step, loss)
        self.bar.update_absolute(step, self.steps)  # raises the host's interrupt after a cancel
        self.save_requested = self.save_requested or self.live.take_save_request()
        return self.live.stop_requested or self.save_requested

    def _next_pause(self) -> int:
        every = [n for n in (self.keeping.validate_every, self.keeping.checkpoint_every) if n]
        return min([self.steps, *((self.trainer.step // n + 1) * n for n in every)])

    def _pause(self) -> None:
        step, keeping = self.trainer.step, self.keeping
        due = self.save_requested or (
            keeping.checkpoint_every and step % keeping.checkpoint_every == 0 and step < self.steps
        )
        if due:
            self._try_to_save(self._save_state_midway)
        if keeping.validate_every and step % keeping.validate_every == 0 and step < self.steps:
            self.validations.validate()
        # After the pictures, because the file holds one of them.
        if self.save_requested or (due and keeping.checkpoint_files):
            self._try_to_save(self._save_file_midway)
        self.save_requested = False

    def _try_to_save(self, save: Callable[[], str]) -> None:
        """Calls `save` and shows the message that it returns. A full disk does not end the training: the user is told,
        and the final save may find room."""
        try:
            message = save()
        except TLoRAError as error:
            logging.warning("[T-LoRA] %s", error)
            message = str(error)
        self.live.note(message)

    def _save_state(self) -> None:
        self.folder.save_state({**self.trainer.state_dict(), "validations": self.validations.state_dict()})
        self.state_step = self.trainer.step

    def _save_state_midway(self) -> str:
        self._save_state()
        return f"run state saved at step {self.trainer.step}"

    def _save_file_midway(self) -> str:
        path = new_lora_path(f"{self.file_name}_step{self.trainer.step:06}")
        self.personalization.tlora().save(path, DTYPE, self.validations.thumbnail)
        return f"step {self.trainer.step} saved as {name_of(path)}"

    def _write(self, path: Path) -> Kept:
        """Saves the run's T-LoRA to `path`, and returns it."""
        kept = self.validations.result()
        kept.tlora.save(path, DTYPE, kept.thumbnail)
        return kept

    def _save(self) -> tuple[str, str]:
        """Saves the T-LoRA. Returns (name of the file, what the user should know of it)."""
        path = new_lora_path(self.file_name)
        kept, name, why = self._write(path), name_of(path), self.validations.why
        self._note_down(lambda: self.folder.save_losses(self.trainer.losses))
        self._note_down(
            lambda: self.folder.update(
                files={self.file_name: name}, sha256=result_hash(name), step=self.trainer.step, unsaved=0, why=why
            )
        )
        return name, " ".join(filter(None, (why, kept.tlora.note)))

    def _note_down(self, write: Callable[[], None]) -> None:
        """Writes a record that the saved file does not need. On a full disk only the record is lost, and the run is not
        found again."""
        try:
            write()
        except TLoRAError as error:
            logging.warning("[T-LoRA] %s", error)

    def _end(self, state: Ended, message: str = "") -> Outcome:
        self.is_ending = True
        if state != "failed":
            self.validations.complete()
        if state == "stopped":
            TrainingRun.stopped += 1
            message = f"{message} {self._save_final_state()}".strip()  # so that the user can resume it
        try:
            name, note = self._save()
        except TLoRAError as error:
            raise TLoRAError(f"{error} {self._save_otherwise(state)}") from error
        message = f"{message} {note}".strip()
        self._note_down(lambda: self.folder.update(state=state, message=message))
        self.is_saved = True
        try:
            if state == "done":
                self.folder.remove_state()
                # After the save, so that cancelling the last pictures does not lose the training.
                if self.keeping.validate_every and self.keeping.keep == LAST:
                    self.validations.validate()
                    self._note_down(lambda: self._renew_picture(name))
        finally:
            self.live.finish(state, message, name)
        # Read from the file, because the next run of the graph also reads the file.
        losses, scores = list(self.trainer.losses), list(self.validations.scores)
        return Outcome(TLoRAFile.load(lora_path(name)), name, self.folder.path, losses, scores, self.validations.why)

    def _renew_picture(self, name: str) -> None:
        """Puts the last validation picture into the finished file. The file is complete and matches the record at every
        moment."""
        path, picture = lora_path(name), self.validations.thumbnail

        def write(temporary: Path) -> None:
            TLoRAFile.load(path).save(temporary, DTYPE, picture)
            self.folder.update(sha256_also=sorted(result_hashes(self.folder) | {_file_hash(temporary)}))

        if picture is not None:
            write_whole(path, write)

    def _save_otherwise(self, ended: Ended) -> str:
        """Saves a T-LoRA that could not be written to the loras folder: as the run state, for the same graph to resume,
        or else as a file in another folder. Returns a sentence that says where. ended: the run's final state."""
        missing = ""
        # After a divergence the optimizer is not at the step that the adapters went back to: the last run state stays.
        if ended != "failed":
            missing = self._save_final_state()
            self._note_down(lambda: self.folder.save_losses(self.trainer.losses))
            if not missing:
                return self._advice_to_resume(ended)
        elsewhere = save_elsewhere(self.file_name, self._write)
        return f"{missing} {elsewhere}".strip()

    def _advice_to_resume(self, ended: str) -> str:
        step, rerun = self.trainer.step, self.keeping.rerun
        only_writes = self._is_done or (ended == "stopped" and rerun != "continue")
        if only_writes:
            self._note_down(lambda: self.folder.update(unsaved=step))
        press = 'set rerun to "auto" and press Run again' if rerun == "restart" else "press Run again"
        return (
            f'The training is kept in "{self.folder.path.name}". Free some space or change file_name, then {press}: it '
            f"{'only writes the file' if only_writes else f'resumes at step {step}'}."
        )

    def _save_last_good_state(self, message: str) -> str:
        """Saves the last good state of a failed training, or the best step. Returns a sentence with the file or the
        error."""
        try:
            done = self._end("failed", message)
            return f"{done.file} is saved. {done.why}" if done.why else f"It is saved as {done.file}."
        except Exception as error:
            self._ended_badly("failed", f"{message} {error}")
            return str(error)

    def _save_final_state(self) -> str:
        """Saves the run state. Returns "" or, if that fails, a sentence about it; the much smaller T-LoRA file may
        still fit on the disk."""
        try:
            self._save_state()
            return ""
        except TLoRAError as error:
            logging.warning("[T-LoRA] %s", error)
            return f"The run state of step {self.trainer.step} was not saved: {error}"

    def _cancelled(self) -> None:
        step, file, missing = self.trainer.step, "", ""
        message = f"Cancelled at step {step}"
        if self.keeping.save_on_cancel and step:
            missing = self._save_final_state()
            try:
                file, note = self._save()
                message = ". ".join(filter(None, (f"{message} and saved as {file}", note.rstrip("."))))
            except TLoRAError as error:
                self._ended_badly("cancelled", f"{message} and not saved: {error} {self._save_otherwise('cancelled')}")
                return
        elif self.is_ending:  # only the last pictures were cancelled
            missing = self._save_final_state()
        self._ended_badly("cancelled", " ".join(filter(None, (f"{message}.", self._next_run(), missing))), file)

    def _next_run(self) -> str:
        if self.keeping.rerun == "restart":
            return "Run trains from the start, because rerun is restart."
        if not self.state_step:
            return "Run trains from the start, because no run state was saved yet."
        return f"Run resumes at step {self.state_step}."

    def _ended_badly(self, state: Ended, message: str, file: str = "", **more) -> None:
        """Tells the page first, because the disk may be the cause."""
        self.live.finish(state, message, file)
        self._note_down(lambda: self.folder.update(state=state, message=message, **more))


def stopped_runs() -> int:
    """How many runs the user has stopped since the host started. The number changes with each stop."""
    return TrainingRun.stopped


def result_hashes(run: RunFolder) -> set[str]:
    """SHA-256 of the files of the run's result, with and without a thumbnail."""
    return {run.record["sha256"], *run.record.get("sha256_also", ())}


def result_hash(name: str) -> str:
    """SHA-256 of a file in the loras folders; empty if the file is gone."""
    try:
        return _file_hash(lora_path(name))
    except (TLoRAError, OSError):
        return ""


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        file_digest = getattr(hashlib, "file_digest", None)  # from Python 3.11 on
        digest = hashlib.sha256(file.read()) if file_digest is None else file_digest(file, "sha256")
        return digest.hexdigest()
