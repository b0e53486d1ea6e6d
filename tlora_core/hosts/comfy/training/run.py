"""A training run as a person goes through it: watched, paused for pictures and checkpoints, stopped, taken up, found
again."""

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

from ....errors import TLoRAError
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
from .fingerprint import RESULTS_OF, AsTrained, fingerprint
from .personalize import Personalization, TrainRequest

RERUNS = ("auto", "continue", "restart")
DTYPE = torch.float16  # of the files; see docs/FILE_FORMAT.md for its error


@dataclass(frozen=True)
class Keeping:
    """What a run leaves behind on its way; none of it changes the result.

    validation_prompts: drawn every `validate_every` steps (0: never), with {token} and {class_word} in their places.
    checkpoint_every: steps between checkpoints to go on from (0: none). checkpoint_files: a T-LoRA file at each, too.
    save_on_cancel: a cancel leaves a checkpoint and a T-LoRA file.
    rerun: what becomes of an equal run that was there before. "auto" takes a finished or stopped one as it is and goes
        on with an unfinished one; "continue" goes on with a stopped one too; "restart" trains anew.
    wandb: the record goes to Weights & Biases too. memory: see personalize.MEMORY.
    thumbnail: the first of the last validation pictures goes into the files, small; never a training picture.
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
        if self.rerun not in RERUNS:
            raise TLoRAError(f'rerun is "{self.rerun}"; choose one of {", ".join(RERUNS)}.')
        for name in ("validate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise TLoRAError(f"{name} is {getattr(self, name)}; set it to a number of steps, or 0 for never.")
        if self.validate_every and not self.validation_prompts:
            raise TLoRAError(
                f"validate_every is {self.validate_every}, but validation_prompts is empty; write a prompt a line."
            )
        if self.wandb:
            required("wandb", "The input wandb")


@dataclass(frozen=True)
class Outcome:
    """The T-LoRA as its file gives it, the file's name in the loras list, the loss of each step."""

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
    """Train a T-LoRA and save it under `file_name`, unless an equal run has made it already.

    Raises TLoRAError, and lets the host's interrupt through; `model` is as it was in every case.
    """
    _check_parts(clip, vae)
    path = new_lora_path(file_name)  # a name that cannot be is refused before any work
    draws = request.config.prior_weight and not prior  # pictures of the class, with the sampler
    base = model if draws else AsTrained(model)
    key = fingerprint(RESULTS_OF, base, clip.patcher, clip.layer_idx, vae.patcher, list(images), list(prior), request)
    found = None if keeping.rerun == "restart" else RunFolder.find(runs_folder(), key)
    if found is not None:
        outcome = _finished(found, file_name, keeping)
        if outcome is not None:
            _show_found(outcome, request, node_id)
            return outcome
    require_writable(path.parent, LORAS_ADVICE)
    require_writable(runs_folder(), RUNS_ADVICE)
    personalization = Personalization(
        model, clip, vae, images, request, prior, keeping.memory, ClassPictures(class_pictures_folder(), node_id)
    )
    state = None if found is None else found.load_checkpoint()
    remark = ""
    if state is not None and state.get("format") != STATE_FORMAT:
        remark = (
            f"Its first {state['step']} steps were trained by an older version, which this one cannot go on "
            f"from: it is trained anew."
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


def _without_counter(name: str) -> str:
    """A new file's name without the number that `new_lora_path` put behind it; a number or a dot of the user's own
    stays."""
    return re.sub(r"_\d{5,}_$", "", name)


def _check_parts(clip: CLIP | None, vae: VAE | None) -> None:
    """The host's loaders give None, or a VAE without a network, for what a checkpoint file does not hold."""
    for name, part, node in (("clip", clip, "Load CLIP"), ("vae", vae, "Load VAE")):
        if getattr(part, "patcher", None) is None:
            raise TLoRAError(
                f"{name} is empty, as the checkpoint file holds none; connect the {name} of a {node} node."
            )


def _needs(personalization: Personalization, keeping: Keeping, path: Path, taken_up: RunFolder | None) -> list[Need]:
    """What the rest of a training writes: its file at `path`, and checkpoints. taken_up: the run whose checkpoint it
    goes on from."""
    trainer, every = personalization.trainer, keeping.checkpoint_every
    to_come = (personalization.request.config.steps - 1) // every - trainer.step // every if every else 0
    files = 1 + (to_come if keeping.checkpoint_files else 0)
    # One takes the place of the other when it is written whole, so that for a while there are two.
    checkpoints = min(to_come, 2 if taken_up is None else 1)
    return [
        Need(
            path.parent,
            files * personalization.file_bytes(DTYPE),
            "the T-LoRA file" if files == 1 else "T-LoRA files",
            LORAS_ADVICE,
        ),
        Need(runs_folder(), checkpoints * trainer.state_bytes, "checkpoints", "set checkpoint_every to 0"),
    ]


def stopped_runs() -> int:
    """How many runs have been stopped before their last step since the host started: a number that changes when one
    is."""
    return TrainingRun.stopped


def _show_found(outcome: Outcome, request: TrainRequest, node_id: str | None) -> None:
    done, steps = len(outcome.losses), request.config.steps
    live = LiveRun.begin(node_id, steps, done, str(request))
    for step, loss in enumerate(outcome.losses, 1):
        live.report(step, loss)
    hint = "" if done == steps else f"Stopped at step {done} of {steps}; set rerun to continue to go on."
    live.finish("found", " ".join(filter(None, (hint, outcome.tlora.note))), outcome.file)


def _finished(run: RunFolder, file_name: str, keeping: Keeping) -> Outcome | None:
    """The result of a run that need not be trained, under the name now asked for; None where it must."""
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
    """Of the files of its result, which may or may not hold a thumbnail."""
    return {run.record["sha256"], *run.record.get("sha256_also", ())}


def _hash(name: str) -> str:
    """SHA-256 of a file of the loras folders; empty where it is gone."""
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
    """One run from where it stands to its end."""

    stopped = 0  # runs of this process

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
        self.asked_checkpoint = self.is_kept = False  # is_kept: the result is saved
        self.picture: bytes | None = None  # for the files: of the last validation
        # Of a run that was at its end but for its file, or that the user had stopped.
        self.is_over = first == self.steps or (keeping.rerun == "auto" and 0 < first == folder.record.get("unsaved"))
        self.checkpoint_step = first  # of the last state on disk; 0 where there is none
        if first:
            remark = (
                f"going on from step {first} of an earlier run"
                if not self.is_over
                else "writing the file of an earlier run"
            )
        if remark:
            self.live.note(remark)

    def go(self) -> Outcome:
        """Trains to the end, or until the user stops it, and saves. Raises TLoRAError and what else ended it, all of it
        on record, and lets the host's interrupt through."""
        try:
            while not self.is_over and self.trainer.step < self.steps and not self.live.stop_requested:
                self.personalization.train(self._next_pause(), self._on_step)
                self._pause()
            return self._end("done" if self.trainer.step == self.steps else "stopped")
        except InterruptProcessingException:
            if not self.is_kept:
                self._cancelled()
            raise
        except TrainingDiverged as error:
            if not error.kept_step:
                self._ended_badly("failed", str(error), step=0)
                raise
            raise TLoRAError(f"{error} {self._saved_all_the_same(str(error))}") from error
        except Exception as error:
            self._ended_badly("failed", str(error), step=self.trainer.step)
            raise
        finally:
            self.recorder.close()

    def _on_step(self, step: int, loss: float) -> bool:
        self.recorder.loss(step, loss)
        self.live.report(step, loss)
        self.bar.update_absolute(step, self.steps)  # raises the host's interrupt when the user has pressed cancel
        self.asked_checkpoint = self.asked_checkpoint or self.live.take_checkpoint_request()
        return self.live.stop_requested or self.asked_checkpoint

    def _next_pause(self) -> int:
        every = [n for n in (self.keeping.validate_every, self.keeping.checkpoint_every) if n]
        return min([self.steps, *((self.trainer.step // n + 1) * n for n in every)])

    def _pause(self) -> None:
        step, keeping = self.trainer.step, self.keeping
        due = self.asked_checkpoint or (
            keeping.checkpoint_every and step % keeping.checkpoint_every == 0 and step < self.steps
        )
        if due:
            self._checkpoint(self._checkpoint_state)
        if keeping.validate_every and step % keeping.validate_every == 0 and step < self.steps:
            self._validate()
        if self.asked_checkpoint or (
            due and keeping.checkpoint_files
        ):  # after the pictures, one of which it is to hold
            self._checkpoint(self._checkpoint_file)
        self.asked_checkpoint = False

    def _checkpoint(self, save: Callable[[], str]) -> None:
        """A disk that is full ends no training: the user is told, and the final save may find room. `save` gives what
        to tell."""
        try:
            message = save()
        except TLoRAError as error:
            logging.warning("[T-LoRA] %s", error)
            message = str(error)
        self.live.note(message)

    def _save_state(self) -> None:
        self.folder.save_checkpoint(self.trainer.state_dict())
        self.checkpoint_step = self.trainer.step

    def _checkpoint_state(self) -> str:
        self._save_state()
        return f"checkpoint at step {self.trainer.step}"

    def _checkpoint_file(self) -> str:
        path = new_lora_path(f"{self.file_name}_step{self.trainer.step:06}")
        self._write(path)
        return f"checkpoint at step {self.trainer.step}, saved as {name_of(path)}"

    def _write(self, path: Path) -> TLoRAFile:
        """The T-LoRA as it stands, as the file at `path`."""
        tlora = self.personalization.tlora()
        tlora.save(path, DTYPE, self.picture)
        return tlora

    def _validate(self) -> None:
        """Pictures that cannot be drawn or saved end no training either."""
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
        """(name of the file, what to tell the user about it)."""
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
        """What a file that is there can do without: where the disk has no more room, this run is not found again, and
        no more is lost."""
        try:
            write()
        except TLoRAError as error:
            logging.warning("[T-LoRA] %s", error)

    def _end(self, state: Ended, message: str = "") -> Outcome:
        if state == "stopped":
            TrainingRun.stopped += 1
            message = f"{message} {self._checkpoint_of_the_end()}".strip()  # for those who change their mind
        try:
            name, note = self._save()
        except TLoRAError as error:
            raise TLoRAError(f"{error} {self._kept(state)}") from error
        message = f"{message} {note}".strip()
        self._note_down(lambda: self.folder.update(state=state, message=message))
        self.is_kept = True
        try:
            if state == "done":
                self.folder.forget_checkpoint()
                if (
                    self.keeping.validate_every
                ):  # only now, as whoever cancels the last pictures is to keep the training
                    self._validate()
                    self._note_down(lambda: self._renew_picture(name))
        finally:
            self.live.finish(state, message, name)
        # What the file gives, not what it was made from: the next run of the graph finds the file.
        return Outcome(TLoRAFile.load(lora_path(name)), name, list(self.trainer.losses))

    def _renew_picture(self, name: str) -> None:
        """Puts the last validation picture into the finished file, which is whole and known by the record at every
        moment."""
        path = lora_path(name)

        def write(temporary: Path) -> None:
            TLoRAFile.load(path).save(temporary, DTYPE, self.picture)
            self.folder.update(sha256_also=sorted(_hashes(self.folder) | {_file_hash(temporary)}))

        if self.picture is not None:
            write_whole(path, write)

    def _kept(self, ended: str) -> str:
        """Keeps a T-LoRA that the loras folder has not taken, for the same graph to take up where a disk takes the
        run's state, else as a file in another folder; says where. ended: the state in which the training has."""
        missing = ""
        if (
            ended != "failed"
        ):  # after a divergence the last state stays: the optimizer is not at the step that the adapters went back to
            missing = self._checkpoint_of_the_end()
            self._note_down(lambda: self.folder.save_losses(self.trainer.losses))
            if not missing:
                return self._kept_for_the_next_run(ended)
        elsewhere = save_elsewhere(self.file_name, self._write)
        return f"{missing} {elsewhere}".strip()

    def _kept_for_the_next_run(self, ended: str) -> str:
        step, rerun = self.trainer.step, self.keeping.rerun
        only_writes = step == self.steps or (ended == "stopped" and rerun != "continue")
        if only_writes:
            self._note_down(lambda: self.folder.update(unsaved=step))
        press = 'set rerun to "auto" and press Run again' if rerun == "restart" else "press Run again"
        return (
            f'The training is kept in "{self.folder.path.name}"; when there is room, or with another file_name, '
            f"{press}, which "
            f"{'only writes the file' if only_writes else f'goes on from step {step}'}."
        )

    def _saved_all_the_same(self, message: str) -> str:
        """The last good state of a training that has failed, in a file where the disk takes it; says which."""
        try:
            return f"It is saved as {self._end('failed', message).file}."
        except Exception as error:
            self._ended_badly("failed", f"{message} {error}")
            return str(error)

    def _checkpoint_of_the_end(self) -> str:
        """Where the disk takes no checkpoint, it may still take the T-LoRA's file, which is a fraction of it; says so
        then."""
        try:
            self._save_state()
            return ""
        except TLoRAError as error:
            logging.warning("[T-LoRA] %s", error)
            return f"There is no checkpoint of step {self.trainer.step} to go on from: {error}"

    def _cancelled(self) -> None:
        step, file, missing = self.trainer.step, "", ""
        message = f"Cancelled at step {step}"
        if self.keeping.save_on_cancel and step:
            missing = self._checkpoint_of_the_end()
            try:
                file, note = self._save()
                message = ". ".join(filter(None, (f"{message} and saved as {file}", note.rstrip("."))))
            except TLoRAError as error:
                self._ended_badly("cancelled", f"{message} and not saved: {error} {self._kept('cancelled')}")
                return
        self._ended_badly("cancelled", " ".join(filter(None, (f"{message}.", self._what_run_does(), missing))), file)

    def _what_run_does(self) -> str:
        if self.keeping.rerun == "restart":
            return "Run trains from the start, as rerun is restart."
        if not self.checkpoint_step:
            return "Run trains from the start, as there was no checkpoint yet."
        return f"Run goes on from step {self.checkpoint_step}."

    def _ended_badly(self, state: Ended, message: str, file: str = "", **more) -> None:
        """The page first, as the disk may be what has failed."""
        self.live.finish(state, message, file)
        self._note_down(lambda: self.folder.update(state=state, message=message, **more))
