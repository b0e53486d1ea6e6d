"""Samplings by the host, at noise levels whose timesteps half precision holds exactly.

At others the host's own rounding of the timestep to bfloat16 changes what FLUX predicts more than all else, and with
random weights by half. The same goes for a guidance of 3.5, which is 3500 in the model and 3504 in bfloat16.
"""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import random_models
import torch
from torch import Tensor

from .sizes import Shape


def texts(model, shape: Shape) -> tuple[list, list]:
    """Positive and negative CONDITIONING, with the guidance of training."""
    made = [random_models.conditioning(model, shape.tokens, seed) for seed in (1, 2)]
    positive, negative = ([[text, {**options, "guidance": 1.0}]] for [[text, options]] in made)
    return positive, negative


def exact_sigmas(model, steps: int) -> Tensor:
    """[steps + 1] from the highest to 0, on the CPU; `steps` is a power of 2."""
    table = model.get_model_object("model_sampling").sigmas.detach().float().cpu()
    levels = torch.arange(steps, 0, -1) / steps
    if float(table[-1]) > 1:  # by timestep, of 1000
        return torch.cat([table[(levels * 992).long()], torch.zeros(1)])
    return torch.cat([levels, torch.zeros(1)])


def latent(model, shape: Shape) -> Tensor:
    """The latent of a whole sampling with MODEL, in float64 on the CPU: Euler, always the same noise and texts."""
    empty = torch.zeros(1, model.model.latent_format.latent_channels, shape.latent, shape.latent)
    positive, negative = texts(model, shape)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        found = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(empty, 0),
            shape.guidance,
            sampler,
            exact_sigmas(model, shape.steps),
            positive,
            negative,
            empty,
            disable_pbar=True,
            seed=0,
        )
    return found.to("cpu", torch.float64)
