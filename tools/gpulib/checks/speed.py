"""Seconds of a training step and of a sampling step, in turn with what they are compared to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import comfy.model_management
import sampling  # this and the next of benchmarks/
import torch
import training

from .. import card, models, train
from ..running import Run
from ..sample import latent, texts
from ..sizes import GIB as NEEDS
from ..sizes import Shape


def training_speed(run: Run, kind: str) -> None:
    """A step as it is and with checkpointing, to the floor: the frozen model forward and backward to its input."""
    weights = _weights(run, kind, " checkpointing")
    setting = _Setting(run, run.size.real[kind], weights)
    floor, ours = training.Floor(setting), {}
    for row, checkpointing in training.OURS.items():
        if run.free_gib() + _loaded_gib(run) < NEEDS[f"{kind} {weights}{' checkpointing' if checkpointing else ''}"]:
            run.note(**{row: "does not fit"})
            continue
        ours[row] = training.Ours(setting, checkpointing, next((o.adapters for o in ours.values()), None))
    if not ours:
        run.skip("not even a step with checkpointing fits on the card")
    run.note(weights=weights, start_seconds=next(iter(ours.values())).start_seconds)
    # A step of ours is taken to be three floors, and each run makes one more that is not timed.
    per_step = (1 + 3 * len(ours)) * floor.seconds(1)
    steps = fitting(run, run.size.timed + 1, per_step) - 1
    taken = in_turn(run, {row: lambda c=c: c.seconds(max(1, steps)) for row, c in {"floor": floor, **ours}.items()})
    run.note(rounds=len(taken["floor"]), floor_seconds=statistics.median(taken["floor"]))
    for row in ours:
        to_floor = statistics.median(a / b for a, b in zip(taken[row], taken["floor"]))
        run.note(**{f"{row}_seconds": statistics.median(taken[row]), f"{row}_to_floor": to_floor})


def sampling_speed(run: Run, kind: str) -> None:
    """Whole samplings with nothing, with the host's own static LoRA of the same update, and with the T-LoRA: as the
    pack puts it on, and beside the layers."""
    shape = run.size.real[kind]
    weights = _weights(run, kind, " sampling")
    runs = _Samplings(models.build(run, shape, weights), shape)
    with torch.inference_mode():
        every = {row["what"]: model for row, model in sampling.candidates(runs, [run.size.real_rank], [1])}
        bare, adapted = (latent(every[what], replace(shape, steps=2)) for what in ("bare", "tlora"))
        effect = train.relative_error(adapted, bare)
        run.require(0 < effect < float("inf"), f"the T-LoRA changes the latent by {effect:.3g}")
        runs.steps = 2
        per_step = runs.time(every["bare"])[1] / runs.steps
        runs.steps = fitting(run, shape.steps, len(every) * per_step)
        taken = in_turn(run, {what: lambda m=m: runs.time(m) for what, m in every.items()})
        runs.time(every["tlora"])
    run.note(weights=weights, rounds=len(taken["bare"]), steps=runs.steps, effect=effect, **runs.ways)
    for what, own in taken.items():
        loading, seconds = (statistics.median(each[i] for each in own) for i in (0, 1))
        run.note(**{f"{what}_seconds": seconds / runs.steps, f"{what}_loading": loading})
        if what != "bare":
            run.note(**{f"{what}_ratio": statistics.median(a[1] / b[1] for a, b in zip(own, taken["bare"]))})


def fitting(run: Run, most: int, seconds: float) -> int:
    """How many steps a round may have so that three rounds of so many seconds a step fit into what is left of the
    part's time, at most `most`. Skips the check if it is less than one."""
    count = int(0.8 * run.seconds_left / (3 * seconds)) if run.seconds_left < float("inf") else most
    if count < 1:
        run.skip(f"a round of one step takes {seconds:.0f} s here, too long for the {run.seconds_left:.0f} s left")
    return min(most, count)


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
