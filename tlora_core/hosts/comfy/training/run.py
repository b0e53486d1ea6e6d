"""A training run as the user sees it: watched, paused for pictures and saves, stopped, resumed, found again."""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy.utils import ProgressBar

from ....errors import TLoRAError, require_choice
from ....files.atomic import stem_of, write_whole
from ....files.card import read_card
from ....files.tlora_file import TLoRAFile
from ....files.untrusted import one_line
from ....packages import required
from ....training.dataset import TrainingImage, caption_of
from ....training.images import thumbnail as make_thumbnail
from ....training.run_folder import Recorder, RunFolder
from ....training.trainer import STATE_FORMAT, TrainingDiverged
from ..draw import strip
from ..files import class_pictures_folder, lora_path, name_of, new_lora_path, runs_folder, save_elsewhere
from ..page.training import Ended, LiveRun
from ..room import LORAS_ADVICE, RUNS_ADVICE, Need, require_room, require_writable
from .class_pictures import ClassPictures
from .fingerprint import RESULTS_BEFORE, RESULTS_OF, AsTrained, fingerprint
from .personalize import Personalization, TrainRequest

RERUNS = ("auto", "continue", "restart")
DTYPE = torch.float16  # of the files; see docs/FILE_FORMAT.md for its error


@dataclass(frozen=True)
class Keeping:
    """What a run shows and saves; none of it changes the result.

    validation_prompts: drawn every `validate_every` steps (0: never), with {token} and {class_word} filled in.
    checkpoint_every: steps between saves of the run state, from which the run can resume (0: never).
    checkpoint_files: each such save also writes a T-LoRA file.
    save_on_cancel: a cancel saves the run state and a T-LoRA file.
    rerun: what to do if an equal run exists. "auto" uses a finished or stopped run as it is and resumes an unfinished
        one; "continue" also resumes a stopped one; "restart" trains again.
    wandb: also sends the record to Weights & Biases. memory: see personalize.MEMORY.
    thumbnail: stores the first of the last validation pictures in the files, scaled down; never a training picture.
    """

    validation_prompts: tuple[str, ...] = ()
    validate_every: int = 0
    checkpoint_every: int = 100
    checkpoint_files: bool = False
    save_on_cancel: bool = False
    rerun: str = RERUNS[0]
    wandb: bool = False
    memory: str = "auto"
    thumbnail: bool = True

    def __post_init__(self) -> None:
        require_choice("rerun", self.rerun, RERUNS)
        for name in ("validate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise TLoRAError(f"{name} is {getattr(self, name)}; set it to a number of steps, or 0 for never.")
        if self.validate_every and not self.validation_prompts:
            raise TLoRAError(
                f"validate_every is {self.validate_every}, but validation_prompts is empty; write one prompt per line."
            )
        if self.wandb:
            required("wandb", "The input wandb")


@dataclass(frozen=True)
class Outcome:
    """The T-LoRA as read from its file, the file's name in the loras list, and the loss of each step."""

    tlora: TLoRAFile
    file: str
    losses: list[float] = field(default_factory=list)


def train_or_find(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    images: Sequence[TrainingImage],
    request: TrainRequest,
    keeping: Keeping,
    file_name: str,
    node_id: str | None = None,
    prior: Sequence[TrainingImage] = (),
) -> Outcome:
    """Trains a T-LoRA and saves it under `file_name`, or returns the result of an equal finished run.

    Raises TLoRAError, and lets the host's interrupt through. `model` is unchanged in every case.
    """
    _check_parts(clip, vae)
    path = new_lora_path(file_name)  # refuses an invalid name before any work
    draws = request.config.prior_weight and not prior  # the model draws class pictures with the sampler
    base = model if draws else AsTrained(model)
    parts = base, clip.patcher, clip.layer_idx, vae.patcher, list(images), list(prior), request
    key = fingerprint(RESULTS_OF, *parts)
    found = None if keeping.rerun == "restart" else _found(key, parts)
    if found is not None:
        outcome = _finished(found, file_name, keeping)
        if outcome is not None:
            _show_found(outcome, request, node_id)
            return outcome
    require_writable(path.parent, LORAS_ADVICE)
    require_writable(runs_folder(), RUNS_ADVICE)
    personalization = Personalization(
        model,
        clip,
        vae,
        images,
        request,
        prior,
        keeping.memory,
        ClassPictures(class_pictures_folder(), node_id),
        node_id,
    )
    state = None if found is None else found.load_state()
    remark = ""
    if state is not None and state.get("format") != STATE_FORMAT:
        remark = (
            f"The first {state['step']} steps were trained by an older version and cannot be resumed; training starts "
            "again."
        )
        logging.warning("[T-LoRA] %s", remark)
        state = None
    if state is not None:
        personalization.go_on_from(state)
    require_room(_needs(personalization, keeping, path, found if state else None))
    if found is None or state is None:
        settings = {**asdict(request), "images": len(images), "base_model": type(model.model.model_config).__name__}
        found = RunFolder.create(runs_folder(), _without_counter(stem_of(path)), key, request.config.steps, settings)
    else:
        found.update(state="running", message="")
    return TrainingRun(personalization, found, keeping, file_name, node_id, remark).go()


def _found(key: str, parts: Sequence) -> RunFolder | None:
    """The run with this key, or one of an earlier version with the same parts."""
    return RunFolder.find(runs_folder(), key) or next(
        filter(None, (RunFolder.find(runs_folder(), fingerprint(version, *parts)) for version in RESULTS_BEFORE)), None
    )


def _without_counter(name: str) -> str:
    """A new file's name without the number that `new_lora_path` appended. The user's own numbers and dots stay."""
    return re.sub(r"_\d{5,}_$", "", name)


def _check_parts(clip: CLIP | None, vae: VAE | None) -> None:
    """Raises TLoRAError for a part that the model file does not hold: the host's loaders give None, or a VAE without a
    network."""
    for name, part, node in (("clip", clip, "Load CLIP"), ("vae", vae, "Load VAE")):
        if getattr(part, "patcher", None) is None:
            raise TLoRAError(
                f"{name} is empty, because the model file holds none; connect the {name} of a {node} node."
            )


def _needs(personalization: Personalization, keeping: Keeping, path: Path, taken_up: RunFolder | None) -> list[Need]:
    """The disk space for the rest of a training: its T-LoRA files beside `path`, and its run states. taken_up: the run
    that it resumes, or None."""
    trainer, every = personalization.trainer, keeping.checkpoint_every
    to_come = (personalization.request.config.steps - 1) // every - trainer.step // every if every else 0
    files = 1 + (to_come if keeping.checkpoint_files else 0)
    # A new run state replaces the old one only once it is complete, so two exist for a while.
    states = min(to_come, 2 if taken_up is None else 1)
    return [
        Need(
            path.parent,
            files * personalization.file_bytes(DTYPE),
            "the T-LoRA file" if files == 1 else "T-LoRA files",
            LORAS_ADVICE,
        ),
        Need(runs_folder(), states * trainer.state_bytes, "the run state", "set checkpoint_every to 0"),
    ]


def stopped_runs() -> int:
    """How many runs the user has stopped since the host started. The number changes with each stop."""
    return TrainingRun.stopped


def _show_found(outcome: Outcome, request: TrainRequest, node_id: str | None) -> None:
    done, steps = len(outcome.losses), request.config.steps
    live = LiveRun.begin(node_id, steps, done, str(request))
    for step, loss in enumerate(outcome.losses, 1):
        live.report(step, loss)
    hint = "" if done == steps else f"Stopped at step {done} of {steps}; set rerun to continue to resume."
    live.finish("found", " ".join(filter(None, (hint, outcome.tlora.note))), outcome.file)


def _finished(run: RunFolder, file_name: str, keeping: Keeping) -> Outcome | None:
    """The result of a run that needs no more training, under `file_name`; None if it must be trained."""
    wanted = ("done",) if keeping.rerun == "continue" else ("done", "stopped")
    if run.record["state"] not in wanted:
        return None
    intact = [name for name in run.record["files"].values() if _hash(name) in _hashes(run)]
    if not intact:
        return None
    wished = [name for name in intact if keeping.thumbnail or not read_card(lora_path(name)).thumbnail]
    name = run.record["files"].get(file_name)
    if name not in wished:
        path = new_lora_path(file_name)
        if wished:
            write_whole(path, lambda temporary: shutil.copyfile(lora_path(wished[0]), temporary))
        else:
            TLoRAFile.load(lora_path(intact[0])).save(path, DTYPE)
        name = name_of(path)
        run.update(files={**run.record["files"], file_name: name}, sha256_also=sorted(_hashes(run) | {_hash(name)}))
    return Outcome(TLoRAFile.load(lora_path(name)), name, run.load_losses())


def _hashes(run: RunFolder) -> set[str]:
    """SHA-256 of the files of the run's result, with and without a thumbnail."""
    return {run.record["sha256"], *run.record.get("sha256_also", ())}


def _hash(name: str) -> str:
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
    ):
        self.personalization, self.trainer = personalization, personalization.trainer
        self.request, self.folder, self.keeping, self.file_name = personalization.request, folder, keeping, file_name
        self.steps, first = self.request.config.steps, self.trainer.step
        self.prompts = [caption_of(p, self.request.token, self.request.class_word) for p in keeping.validation_prompts]
        self.recorder = Recorder(folder, first, keeping.wandb)
        subject = f"{self.request.token} {self.request.class_word}".strip()
        self.live = LiveRun.begin(
            node_id, self.steps, first, f"{subject}: {self.request}, {len(personalization.adapters)} layers"
        )
        for step, loss in enumerate(self.trainer.losses, 1):
            self.live.report(step, loss)
        self.bar = ProgressBar(self.steps, node_id=node_id)
        self.save_requested = self.is_saved = False  # is_saved: the result is saved
        self.picture: bytes | None = None  # thumbnail for the files, from the last validation
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
            while not self.is_over and self.trainer.step < self.steps and not self.live.stop_requested:
                self.personalization.train(self._next_pause(), self._on_step)
                self._pause()
            return self._end("done" if self.trainer.step == self.steps else "stopped")
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
            self._validate()
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
        self.folder.save_state(self.trainer.state_dict())
        self.state_step = self.trainer.step

    def _save_state_midway(self) -> str:
        self._save_state()
        return f"run state saved at step {self.trainer.step}"

    def _save_file_midway(self) -> str:
        path = new_lora_path(f"{self.file_name}_step{self.trainer.step:06}")
        self._write(path)
        return f"step {self.trainer.step} saved as {name_of(path)}"

    def _write(self, path: Path) -> TLoRAFile:
        """Saves the current T-LoRA to `path` and returns it."""
        tlora = self.personalization.tlora()
        tlora.save(path, DTYPE, self.picture)
        return tlora

    def _validate(self) -> None:
        """Draws the validation pictures. A failure to draw or save them does not end the training."""
        step = self.trainer.step
        try:
            drawn = self.personalization.draw(self.prompts)
            self.live.validation(step, strip(drawn), self.prompts)
            picture = strip(drawn, self.prompts)
            self.recorder.picture(step, picture)
            self.folder.save_picture(step, picture)
            self.picture = make_thumbnail(drawn) if self.keeping.thumbnail else None
        except InterruptProcessingException:
            raise
        except Exception as error:
            logging.warning("[T-LoRA] No validation pictures at step %s: %s", step, error)
            self.live.note(f"no validation pictures at step {step}: {one_line(error)}")

    def _save(self) -> tuple[str, str]:
        """Saves the T-LoRA. Returns (name of the file, note for the user)."""
        path = new_lora_path(self.file_name)
        tlora, name = self._write(path), name_of(path)
        self._note_down(lambda: self.folder.save_losses(self.trainer.losses))
        self._note_down(
            lambda: self.folder.update(
                files={self.file_name: name}, sha256=_hash(name), step=self.trainer.step, unsaved=0
            )
        )
        return name, tlora.note

    def _note_down(self, write: Callable[[], None]) -> None:
        """Writes a record that the saved file does not need. On a full disk only the record is lost, and the run is not
        found again."""
        try:
            write()
        except TLoRAError as error:
            logging.warning("[T-LoRA] %s", error)

    def _end(self, state: Ended, message: str = "") -> Outcome:
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
                if self.keeping.validate_every:
                    self._validate()
                    self._note_down(lambda: self._renew_picture(name))
        finally:
            self.live.finish(state, message, name)
        # Read from the file, because the next run of the graph also reads the file.
        return Outcome(TLoRAFile.load(lora_path(name)), name, list(self.trainer.losses))

    def _renew_picture(self, name: str) -> None:
        """Puts the last validation picture into the finished file. The file is complete and matches the record at every
        moment."""
        path = lora_path(name)

        def write(temporary: Path) -> None:
            TLoRAFile.load(path).save(temporary, DTYPE, self.picture)
            self.folder.update(sha256_also=sorted(_hashes(self.folder) | {_file_hash(temporary)}))

        if self.picture is not None:
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
        only_writes = step == self.steps or (ended == "stopped" and rerun != "continue")
        if only_writes:
            self._note_down(lambda: self.folder.update(unsaved=step))
        press = 'set rerun to "auto" and press Run again' if rerun == "restart" else "press Run again"
        return (
            f'The training is kept in "{self.folder.path.name}". Free some space or change file_name, then {press}: it '
            f"{'only writes the file' if only_writes else f'resumes at step {step}'}."
        )

    def _save_last_good_state(self, message: str) -> str:
        """Saves the last good state of a failed training. Returns a sentence with the file or the error."""
        try:
            return f"It is saved as {self._end('failed', message).file}."
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
