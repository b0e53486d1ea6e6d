"""Training on small cards, and the peak of a step against the counted figure."""

from __future__ import annotations

import time

import memory  # of benchmarks/
import random_models
import torch
from sampling import PeakMemory  # of benchmarks/

from tlora_core.hosts.comfy.model.defaults import defaults_for
from tlora_core.hosts.comfy.training.personalize import Personalization, TrainRequest
from tlora_core.training.config import TrainConfig
from tlora_core.training.dataset import training_images

from .. import card, models, train
from ..card import GIB
from ..running import Run
from ..sizes import GIB as NEEDS
from ..sizes import Shape

WEIGHTS = {"sdxl": "fp16", "flux": "fp8"}
RAM = {"sdxl": 9, "flux": 16}  # GiB for the weights and what else is going on
# What is measured may lie so far from the count, which leaves out workspaces and what the allocator loses.
LEAST, LARGEST, WORKSPACE = 0.8, 1.15, GIB // 2


def small_card(run: Run, kind: str, gib: int) -> None:
    """A training with memory "auto", from weights in RAM as the host's loader leaves them."""
    if ("in RAM", kind) in run.kept:
        if not run.on_gpu:
            run.skip("a CPU has no memory of its own to limit, and has been tried")
    elif run.on_gpu:
        run.needs_ram(RAM[kind])
    model, shape = _in_ram(run, kind), run.size.real[kind]
    with card.small_card(run, gib) as taken, card.LeastFree(run) as free:
        _reset_peak(run)
        personalization = _personalization(model, shape, run.size.card_rank)
        times: list[float] = []
        personalization.train(run.size.timed + 1, lambda step, loss: times.append(time.perf_counter()))
        chosen, in_ram, _ = personalization.way
        run.note(
            seconds_per_step=(times[-1] - times[0]) / (len(times) - 1), memory=chosen, weights_in_ram_gib=in_ram / GIB
        )
        if run.on_gpu:
            peak = torch.cuda.max_memory_allocated(run.device) - taken
            run.note(torch_peak_gib=peak / GIB, least_free_gib=free.bytes / GIB)
        losses = personalization.trainer.losses
    run.note(losses=losses)
    run.require(all(0 < loss < 100 for loss in losses), f"the losses are {losses}")


def _in_ram(run: Run, kind: str):
    key = "in RAM", kind
    if key not in run.kept:
        run.kept.clear()  # two large models may not fit
        run.kept[key] = models.build(run, run.size.real[kind], WEIGHTS[kind], in_ram=True)
    return run.kept[key]


def _personalization(model, shape: Shape, rank: int):
    """As the Train node makes it, of noise for a picture and with stand-ins for CLIP and VAE."""
    usual = defaults_for(model)
    size = 8 * shape.latent
    config = TrainConfig(steps=100, learning_rate=1e-4, optimizer=usual.optimizer)
    request = TrainRequest(
        "sks", "dog", usual.method, rank=rank, min_rank=max(1, rank // 2), resolution=size, config=config
    )
    pictures = training_images(torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(5)))
    with torch.inference_mode():
        return Personalization(model, _Texts(model, shape), _Latents(model, shape), pictures, request)


class _Texts:
    """In CLIP's place."""

    def __init__(self, model, shape: Shape):
        self.model, self.shape = model, shape

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        return train.texts(self.model, self.shape)[0]


class _Latents:
    """In the VAE's place."""

    first_stage_model = None

    def __init__(self, model, shape: Shape):
        self.model, self.shape = model, shape

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return train.training_sample(self.model, self.shape).mean[None]


def peak(run: Run, kind: str) -> None:
    """A step's highest memory, as it is and with checkpointing, against the count of `bench memory`."""
    run.kept.clear()
    card.empty()
    for checkpointing in (False, True):
        name = "checkpointing" if checkpointing else "plain"
        weights = _weights_that_fit(run, kind, checkpointing)
        if weights is None:
            run.note(**{name: "does not fit"})
            continue
        counted, measured = _counted(run, kind, weights, checkpointing), _measured(run, kind, weights, checkpointing)
        run.note(weights=weights, **{f"{name}_gib": measured / GIB, f"{name}_counted_gib": counted / GIB})
        if run.on_gpu:
            require_close(run, name, measured, counted)
    if not any(name.endswith("counted_gib") for name in run.figures):
        run.skip(f"{run.free_gib():.1f} GiB are free, too little for a step")


def require_close(run: Run, name: str, measured: int, counted: int) -> None:
    near = LEAST * counted <= measured <= LARGEST * counted + WORKSPACE
    run.require(near, f"{name}: {measured / GIB:.2f} GiB were measured, and {counted / GIB:.2f} counted")


def _weights_that_fit(run: Run, kind: str, checkpointing: bool) -> str | None:
    ending = " checkpointing" if checkpointing else ""
    every = ("bf16", "fp8") if kind == "flux" else ("bf16",)
    return next((w for w in every if run.free_gib() >= NEEDS[f"{kind} {w}{ending}"]), None)


def _counted(run: Run, kind: str, weights: str, checkpointing: bool) -> int:
    shape = run.size.real[kind]
    storage = torch.float8_e4m3fn if weights == "fp8" else None
    with memory.host_on_meta():
        make = getattr(random_models, shape.function)
        model = make(**shape.make, dtype=torch.bfloat16, storage=storage, device=memory.META)
        return memory.step(model, shape.tokens, shape.latent, run.size.real_rank, "low" if checkpointing else "fast")[
            "peak"
        ]


def _measured(run: Run, kind: str, weights: str, checkpointing: bool) -> int:
    """On a CPU, of the process, which is no measure for a model as small as it has there."""
    shape = run.size.real[kind]
    with PeakMemory(run.device) as taken:
        model = models.build(run, shape, weights)
        start = train.setup(model, shape, run.size.real_rank)
        train.usual_losses(model, start, 2, checkpointing)
    del model, start
    card.empty()
    return int(taken.mb * 2**20)


def _reset_peak(run: Run) -> None:
    if run.on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
