"""Optimizers and learning rate schedules, imported from their libraries on demand."""

import torch
from torch import Tensor

from ..errors import TLoRAError
from ..packages import required
from .adamw8bit import STATE_SIZE, AdamW8bit
from .config import TrainConfig

# Size of each optimizer's state, in sizes of the parameters: AdamW has two moments; Prodigy also the start and a sum of
# gradients; schedule-free the second moment and its own weights; Adafactor's rows and columns are negligible.
STATE_SIZES = {"adamw": 2.0, "adamw8bit": STATE_SIZE, "prodigy": 4.0, "adafactor": 0.0, "schedule_free": 2.0}
_RESTARTS, _POWER, _POLYNOMIAL_END = 3, 2.0, 1e-7  # one restart and power 1 would equal cosine and linear


def make_optimizer(parameters: list[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` for `parameters`, all on one device.

    Raises TLoRAError when its package is not installed.
    """
    device = parameters[0].device.type
    betas, decay, rate = (config.beta1, config.beta2), config.weight_decay, config.learning_rate
    if config.optimizer == "adamw8bit":
        return AdamW8bit(parameters, rate, betas, weight_decay=decay)
    if config.optimizer == "prodigy":
        # Safeguards and bias correction as in the published LoRA trainers.
        return required("prodigyopt", "optimizer prodigy").Prodigy(
            parameters, rate, betas, weight_decay=decay, use_bias_correction=True, safeguard_warmup=True
        )
    if config.optimizer == "adafactor":
        # Steps as large as AdamW's at the same rate. Adafactor's default step is relative to the parameter, so factors
        # that start at zero would stay there.
        return torch.optim.Adafactor(parameters, rate, eps=(None, 1.0), weight_decay=decay)
    if config.optimizer == "schedule_free":
        optimizer = required("schedulefree", "optimizer schedule_free").AdamWScheduleFree(
            parameters, rate, betas, weight_decay=decay, warmup_steps=config.warmup_steps
        )
        optimizer.train()
        return optimizer
    # Fused: one kernel instead of ten for each of a thousand small tensors.
    return torch.optim.AdamW(parameters, rate, betas, weight_decay=decay, fused=device in ("cuda", "cpu"))


def make_lr_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The schedule of `config`, or None for a constant rate. Schedule-free does its own warm-up."""
    if config.optimizer == "schedule_free":
        if config.lr_schedule != "constant":
            raise TLoRAError(f"lr_schedule is {config.lr_schedule}; set it to constant for optimizer schedule_free.")
        return None
    if config.lr_schedule == "constant" and not config.warmup_steps:
        return None
    name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    if name == "polynomial" and config.learning_rate <= _POLYNOMIAL_END:
        raise TLoRAError(
            f"learning_rate is {config.learning_rate:g}; set it above {_POLYNOMIAL_END:g}, the final rate of "
            "lr_schedule polynomial."
        )
    get_scheduler = required("diffusers.optimization", f"lr_schedule {name}").get_scheduler
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
        num_cycles=_RESTARTS,
        power=_POWER,
    )


def flow_density(name: str, count: int, generator: torch.Generator) -> Tensor:
    """`count` noise levels, float32 in 0..1, from the density "logit_normal" or "mode" (Esser et al. 2024)."""
    helpers = required("diffusers.training_utils", f"timestep_density {name}")
    return helpers.compute_density_for_timestep_sampling(
        name, count, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator
    )
