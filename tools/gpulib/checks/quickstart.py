"""The bundled quickstart: a training on the tiny base as the Train node makes it, also one that is cancelled and
resumed."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import folder_paths
import numpy as np
import torch
from comfy.model_management import InterruptProcessingException
from comfy.utils import ProgressBar

from tlora_core.hosts.comfy.draw import draw
from tlora_core.hosts.comfy.sampling import apply_tlora
from tlora_core.hosts.comfy.training.found import train_or_find
from tlora_core.hosts.comfy.training.keeping import Keeping
from tlora_core.hosts.comfy.training.personalize import TrainRequest
from tlora_core.tiny import comfy as tiny
from tlora_core.tiny import world
from tlora_core.training.config import TrainConfig
from tlora_core.training.dataset import training_images

from .. import models
from ..running import Failed, Run
from ..train import relative_error

LEARNT_BY = 100  # the step by which the loss must be below that of the same steps without an update
SUBJECT = ("lime circle", "beach", "centre")


def quickstart(run: Run) -> None:
    steps, short, rank = run.size.quickstart
    base = _tiny_base()
    before = [models.stored_bytes(base[0]), _bytes_of(base[1].cond_stage_model), _bytes_of(base[2].first_stage_model)]
    whole = _train(base, steps, rank)
    compared = min(steps, LEARNT_BY)
    idle = _train(base, compared, rank, rate=1e-9)
    learnt, bare = (_mean(each.losses[compared // 2 : compared]) for each in (whole, idle))
    run.note(steps=steps, loss=learnt, loss_untrained=bare)
    run.require(learnt < bare, f"nothing was learnt: the loss is {learnt:.3g}, without training {bare:.3g}")
    run.note(effect=_effect(base, whole.tlora))
    _resume(run, base, short, rank)
    after = [models.stored_bytes(base[0]), _bytes_of(base[1].cond_stage_model), _bytes_of(base[2].first_stage_model)]
    run.require(all(map(models.same_bytes, before, after)), "the base model's weights are not as they were")
    run.note(base_bit_identical=True)


def _resume(run: Run, base, steps: int, rank: int) -> None:
    """On a GPU not every kernel adds in the same order each time. If two uninterrupted runs differ too, a resumed one
    may differ by as much."""
    whole = _train(base, steps, rank).tlora
    resumed = _train(base, steps, rank, cancelled_at=3 * steps // 4).tlora
    difference = _difference(resumed, whole)
    run.note(resume_difference=difference, resume_bit_identical=difference == 0)
    if difference:
        chance = _difference(_train(base, steps, rank).tlora, whole)
        run.note(run_to_run_difference=chance)
        run.require(difference <= 3 * chance, f"resumed, it differs by {difference:.3g}; by chance, by {chance:.3g}")


def _tiny_base():
    with torch.inference_mode():  # as in the host
        return tiny.load(str(Path(world.__file__).parent / "weights" / "tiny_base.safetensors"))


def _train(base, steps: int, rank: int, cancelled_at: int = 0, rate: float = 0.0015):
    """The Outcome of a run in folders of its own. cancelled_at: the step after which the user cancels it and queues it
    again; its run state is saved half-way."""
    config = TrainConfig(steps=steps, learning_rate=rate)
    request = TrainRequest("sks", "circle", rank=rank, min_rank=rank // 2, resolution=64, config=config)

    def once():
        with torch.inference_mode():
            return train_or_find(*base, _picture(), request, Keeping(checkpoint_every=steps // 2), "gpu_check/circle")

    with _folders():
        if cancelled_at:
            try:
                with _cancelling(cancelled_at):
                    once()
            except InterruptProcessingException:
                pass
            else:
                raise Failed(f"a cancel after step {cancelled_at} did not end the training")
        return once()


def _picture():
    name, background, place = SUBJECT
    concept = next(each for each in world.CONCEPTS if each.name == name)
    scene = world.concept_scenes(concept, 1, np.random.default_rng(1), background, place)
    return training_images(torch.from_numpy(world.render(scene)).float())


@contextmanager
def _folders():
    """ComfyUI's output and loras folders within the block, empty, and gone afterwards."""
    output, loras = folder_paths.get_output_directory(), folder_paths.folder_names_and_paths["loras"]
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        (Path(folder) / "loras").mkdir()
        folder_paths.set_output_directory(folder)
        folder_paths.folder_names_and_paths["loras"] = ([str(Path(folder) / "loras")], loras[1])
        try:
            yield
        finally:
            folder_paths.set_output_directory(output)
            folder_paths.folder_names_and_paths["loras"] = loras


@contextmanager
def _cancelling(step: int):
    """Within the block, the user presses Cancel when a training has made so many steps. The host's own hook on its
    progress bars would not do: it leaves steps out that follow within a tenth of a second."""
    update = ProgressBar.update_absolute

    def updating(bar, value, *args, **kwargs):
        update(bar, value, *args, **kwargs)
        if value == step:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()

    ProgressBar.update_absolute = updating
    try:
        yield
    finally:
        ProgressBar.update_absolute = update


def _effect(base, tlora) -> float:
    """How much the T-LoRA changes a picture. Raises Failed for a picture that is not finite."""
    model, clip, vae = base
    prompt = ["a photo of sks circle in the snow"]
    with torch.inference_mode():
        pictures = [draw(m, clip, vae, prompt, 64, [7])[0].float() for m in (model, apply_tlora(model, tlora))]
    if not all(bool(picture.isfinite().all()) for picture in pictures):
        raise Failed("a picture holds values that are not finite")
    return relative_error(pictures[1], pictures[0])


def _difference(one, two) -> float:
    """Of the updates of all layers, relative; 0 only for the same numbers."""
    pairs = [
        (getattr(one.layers[n], part), getattr(two.layers[n], part)) for n in two.layers for part in ("up", "down")
    ]
    if all(torch.equal(a, b) for a, b in pairs):
        return 0.0
    a, b = (torch.cat([pair[i].double().reshape(-1) for pair in pairs]) for i in (0, 1))
    return max(relative_error(a, b), 1e-300)


def _bytes_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
