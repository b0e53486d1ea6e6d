"""Seconds of a training step and of a sampling step, in turn with what they are compared to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import comfy.model_management
import sampling  # this and the next of benchmarks/
import torch
import training

from .. import card, models, train
from ..running import Run
from ..sample import texts
from ..sizes import GIB as NEEDS
from ..sizes import Shape


def training_speed(run: Run, kind: str) -> None:
    """A step as it is and with checkpointing, to the floor: the frozen model forward and backward to its input."""
    weights = _weights(run, kind, " checkpointing")
    setting = _Setting(run, run.size.real[kind], weights)
    candidates = {"floor": training.Floor(setting)}
    adapters = None
    for row, checkpointing in training.OURS.items():
        if run.free_gib() + _loaded_gib(run) < NEEDS[f"{kind} {weights}{' checkpointing' if checkpointing else ''}"]:
            run.note(**{row: "does not fit"})
            continue
        candidates[row] = training.Ours(setting, checkpointing, adapters)
        adapters = candidates[row].adapters
    if adapters is None:
        run.skip("not even a step with checkpointing fits on the card")
    run.note(
        weights=weights,
        start_seconds=next(c.start_seconds for c in candidates.values() if c is not candidates["floor"]),
    )
    taken = in_turn(run, {row: lambda c=c: c.seconds(run.size.timed) for row, c in candidates.items()})
    for row, own in taken.items():
        run.note(**{f"{row}_seconds": statistics.median(own)})
        if row != "floor":
            run.note(**{f"{row}_to_floor": statistics.median(a / b for a, b in zip(own, taken["floor"]))})
    run.note(rounds=len(taken["floor"]))


def sampling_speed(run: Run, kind: str) -> None:
    """Whole samplings with nothing, with the host's own static LoRA of the same update, and with the T-LoRA: as the
    pack puts it on, and beside the layers."""
    shape = run.size.real[kind]
    weights = _weights(run, kind, " sampling")
    runs = _Samplings(models.build(run, shape, weights), shape)
    with torch.inference_mode():
        every = {row["what"]: model for row, model in sampling.candidates(runs, [run.size.real_rank], [1])}
        taken = in_turn(run, {what: lambda m=m: _checked(runs, run, m) for what, m in every.items()})
        runs.time(every["tlora"])
    run.note(
        weights=weights, rounds=len(taken["bare"]), layers=runs.ways.get("layers"), kept_mb=runs.ways.get("kept_mb")
    )
    for what, own in taken.items():
        loading, steps = (statistics.median(each[i] for each in own) for i in (0, 1))
        run.note(**{f"{what}_seconds": steps / shape.steps, f"{what}_loading": loading})
        if what != "bare":
            run.note(**{f"{what}_ratio": statistics.median(a[1] / b[1] for a, b in zip(own, taken["bare"]))})


def in_turn(run: Run, candidates: dict[str, Callable]) -> dict[str, list]:
    """What each gives, for as many rounds as the size asks for and the part's time allows, at least one. The first
    round warms up kernels and caches, and none always follows the same one."""
    names, found = list(candidates), {name: [] for name in candidates}
    for i in range(run.size.rounds + 1):
        began = time.monotonic()
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            value = candidates[name]()
            if i:
                found[name].append(value)
        if i and run.seconds_left < 2 * (time.monotonic() - began) + 5:
            break
    return found


def _checked(runs, run: Run, model):
    loading, seconds, _ = runs.time(model)
    run.require(seconds > 0, "a sampling took no time")
    return loading, seconds


def _weights(run: Run, kind: str, ending: str) -> str:
    """What a card of this size would load. Skips the check where nothing fits."""
    run.kept.clear()
    card.empty()
    every = ("bf16", "fp8") if kind == "flux" else ("bf16",)
    needs = {w: NEEDS.get(f"{kind} {w}{ending}", NEEDS.get(f"{kind}{ending}", 0.0)) for w in every}
    for weights, gib in needs.items():
        if run.free_gib() >= gib:
            return weights
    run.skip(f"needs {min(needs.values()):g} GiB on the card, where {run.free_gib():.1f} are free")


def _loaded_gib(run: Run) -> float:
    return torch.cuda.memory_allocated(run.device) / 2**30 if run.on_gpu else 0.0


class _Setting:
    """What benchmarks/training.py's rows take."""

    def __init__(self, run: Run, shape: Shape, weights: str):
        self.rank, self.device, self.paper_steps = run.size.real_rank, run.device, shape.paper_steps
        self.model = models.build(run, shape, weights)
        self.clock = time.perf_counter if run.on_gpu else time.process_time
        sample = train.training_sample(self.model, shape)
        self.latent, self.text = sample.mean[None], sample.conditioning
        comfy.model_management.load_models_gpu([self.model])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class _Samplings(sampling.Runs):
    """benchmarks/sampling.py's runs, of another model than those it names."""

    def __init__(self, model, shape: Shape):
        self.bare, self.steps, self.guidance, self.size = model, shape.steps, shape.guidance, shape.latent
        self.channels = model.model.latent_format.latent_channels
        self.positive, self.negative = texts(model, shape)
