"""Training steps on a MODEL, as the pack's training makes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlora_core import Adapters, RankSchedule, make_adapters
from tlora_core.hosts.comfy.model.defaults import defaults_for
from tlora_core.hosts.comfy.model.families import target_layers
from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
from tlora_core.hosts.comfy.training.encode import Sample
from tlora_core.hosts.comfy.training.session import training_session
from tlora_core.training.config import TrainConfig
from tlora_core.training.trainer import Trainer

from .sample import exact_sigmas, texts
from .sizes import Shape

_LOSS_SCALE = 1024.0  # for models in float16, as the trainer's own scaler starts high too


class Setup(NamedTuple):
    """What a training begins with."""

    adapters: Adapters
    sample: Sample
    schedule: RankSchedule


def setup(model, shape: Shape, rank: int, moved: float = 0.0) -> Setup:
    """Adapters of the kind that the model has by default. moved: how far they are from their start, so that every
    factor gets a gradient."""
    layers = {name: layer.shape for name, layer in target_layers(model).items()}
    with torch.inference_mode(False), torch.no_grad():
        method = defaults_for(model).method
        adapters = make_adapters(method, "last_random", layers, rank, 0, device=model.load_device)
        generator = torch.Generator().manual_seed(7)
        for parameter in adapters.parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return Setup(adapters, training_sample(model, shape), RankSchedule(rank, max(1, rank // 2)))


def training_sample(model, shape: Shape) -> Sample:
    channels = model.model.latent_format.latent_channels
    mean = torch.randn(channels, shape.latent, shape.latent, generator=torch.Generator().manual_seed(3))
    return Sample(mean, None, None, texts(model, shape)[0])


def losses(model, start: Setup, steps: int) -> list[float]:
    """Of so many updates, on the adapters' values, which are put back."""
    parameters = start.adapters.parameters()
    before = [p.detach().clone() for p in parameters]
    try:
        return _trained(model, start, TrainConfig(steps=steps, learning_rate=1e-3), checkpointing=False)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)
                parameter.grad = None


def usual_losses(model, start: Setup, steps: int, checkpointing: bool) -> list[float]:
    """Of so many updates by the model's own optimizer, with all ranks on."""
    rank = start.schedule.rank
    config = TrainConfig(steps=steps + 1, optimizer=defaults_for(model).optimizer)
    return _trained(model, start._replace(schedule=RankSchedule(rank, rank)), config, checkpointing)[:steps]


def _trained(model, start: Setup, config: TrainConfig, checkpointing: bool) -> list[float]:
    with torch.inference_mode(False):
        trainer = Trainer(start.adapters, config)
        with training_session(model, checkpointing):
            denoiser = HostDenoiser(model, start.adapters, start.schedule, [start.sample], config)
            trainer.run(denoiser, config.steps)
    return trainer.losses


def gradient(model, start: Setup) -> Tensor:
    """By all adapters, of the squared error at a medium noise level, as one vector in float64 on the CPU."""
    parameters: list[Any] = start.adapters.parameters()
    with torch.inference_mode(False), training_session(model):
        denoiser = HostDenoiser(model, start.adapters, start.schedule, [start.sample], TrainConfig(steps=1))
        latents = model.model.process_latent_in(start.sample.mean[None]).to(denoiser.device)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(11)).to(denoiser.device)
        error = denoiser.output_error([start.sample], latents, noise, exact_sigmas(model, 2)[1:2])
        scale = _LOSS_SCALE if denoiser.needs_loss_scaling else 1.0
        (scale * error.float().square().mean()).backward()
    found = torch.cat([p.grad.detach().to("cpu", torch.float64).reshape(-1) / scale for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


def relative_error(value: Tensor, exact: Tensor) -> float:
    exact = exact.double().cpu()
    return float((value.double().cpu() - exact).norm() / exact.norm())
