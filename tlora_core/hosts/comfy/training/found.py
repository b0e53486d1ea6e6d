"""Trains a T-LoRA, or finds the result of an equal run that is finished, stopped or to be resumed."""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ....errors import TLoRAError
from ....files.atomic import stem_of, write_whole
from ....files.card import read_card
from ....files.tlora_file import TLoRAFile
from ....training.dataset import TrainingImage
from ....training.run_folder import RunFolder
from ....training.trainer import STATE_FORMAT
from ..files import class_pictures_folder, lora_path, name_of, new_lora_path, runs_folder
from ..page.training import LiveRun
from ..room import LORAS_ADVICE, RUNS_ADVICE, Need, require_room, require_writable
from .class_pictures import ClassPictures
from .fingerprint import RESULTS_BEFORE, RESULTS_OF, AsTrained, fingerprint
from .keeping import LAST, STOP_WHEN_PAST, Keeping
from .personalize import Personalization, TrainRequest
from .run import DTYPE, Outcome, TrainingRun, result_hash, result_hashes
from .scored import drawn_prompts, encoder_of, live_scorer, scores_of, shown


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
    parts += _choice(keeping, request)
    key = fingerprint(RESULTS_OF, *parts)
    found = None if keeping.rerun == "restart" else _found(key, parts)
    if found is not None:
        outcome = _finished(found, file_name, keeping)
        if outcome is not None:
            _show_found(outcome, found.record["state"] == "stopped", request, node_id)
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
    remark = personalization.remark
    if state is not None and state.get("format") != STATE_FORMAT:
        remark = (
            f"The first {state['step']} steps were trained by an older version and cannot be resumed; training starts "
            "again."
        )
        logging.warning("[T-LoRA] %s", remark)
        state = None
    if state is not None:
        personalization.go_on_from(state)
    scorer = None
    if keeping.is_scored:
        scorer = live_scorer(encoder_of(keeping, clip), personalization, images, keeping)
        remark = " ".join(filter(None, (remark, scorer.remark)))
    require_room(_needs(personalization, keeping, path, found if state else None))
    if found is None or state is None:
        settings = {**asdict(request), "images": len(images), "base_model": type(model.model.model_config).__name__}
        found = RunFolder.create(runs_folder(), _without_counter(stem_of(path)), key, request.config.steps, settings)
    else:
        found.update(state="running", message="")
    scored = state and state.get("validations")
    return TrainingRun(personalization, found, keeping, file_name, node_id, remark, scorer, scored).go()


def _choice(keeping: Keeping, request: TrainRequest) -> tuple:
    """What the step in the file depends on, beside the training itself; nothing if it is the last in any case."""
    if keeping.keep == LAST:
        return ()
    by = keeping.scorer if keeping.clip_vision is None else keeping.clip_vision.patcher
    patience = keeping.patience if keeping.keep == STOP_WHEN_PAST else None
    return ((by, drawn_prompts(keeping, request), keeping.score_seeds, keeping.validate_every, patience),)


def _found(key: str, parts: Sequence) -> RunFolder | None:
    """The run with this key, or one of an earlier version with the same parts."""
    return RunFolder.find(runs_folder(), key) or next(
        filter(None, (RunFolder.find(runs_folder(), fingerprint(version, *parts)) for version in RESULTS_BEFORE)), None
    )


def _finished(run: RunFolder, file_name: str, keeping: Keeping) -> Outcome | None:
    """The result of a run that needs no more training, under `file_name`; None if it must be trained."""
    wanted = ("done",) if keeping.rerun == "continue" else ("done", "stopped")
    if run.record["state"] not in wanted:
        return None
    intact = [name for name in run.record["files"].values() if result_hash(name) in result_hashes(run)]
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
        run.update(
            files={**run.record["files"], file_name: name}, sha256_also=sorted(result_hashes(run) | {result_hash(name)})
        )
    tlora, why = TLoRAFile.load(lora_path(name)), run.record.get("why", "")
    return Outcome(tlora, name, run.path, run.load_losses(), scores_of(run), why)


def _show_found(outcome: Outcome, is_stopped: bool, request: TrainRequest, node_id: str | None) -> None:
    done, steps = len(outcome.losses), request.config.steps
    live = LiveRun.begin(node_id, steps, done, str(request))
    for step, loss in enumerate(outcome.losses, 1):
        live.report(step, loss)
    if outcome.scores:
        live.scored(shown(outcome.scores))
    hint = f"Stopped at step {done} of {steps}; set rerun to continue to resume." if is_stopped else ""
    live.finish("found", " ".join(filter(None, (hint, outcome.why, outcome.tlora.note))), outcome.file)


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
    best = 0 if keeping.keep == LAST else personalization.file_bytes(torch.float32)  # in each run state
    return [
        Need(
            path.parent,
            files * personalization.file_bytes(DTYPE),
            "the T-LoRA file" if files == 1 else "T-LoRA files",
            LORAS_ADVICE,
        ),
        Need(runs_folder(), states * (trainer.state_bytes + best), "the run state", "set checkpoint_every to 0"),
    ]
