"""The training settings: every number in the training loop and its loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import TLoRAError, require_choice

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "schedule_free")
LR_SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
DENSITIES = ("uniform", "logit_normal", "mode")
# Of a field that versions before did not have. A run's hash counts it only where it is set, so that their finished runs
# are found.
ADDED_LATER = {"added later": True}


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the paper's for SDXL (appendix, training details): AdamW, no warm-up, uniform timesteps.

    steps: updates of the adapters. gradient_accumulation: batches per update.
    learning_rate: of the optimizer; Prodigy adapts its own rate and needs 1.
    optimizer, lr_schedule: one of OPTIMIZERS and of LR_SCHEDULES. warmup_steps: steps in which the rate rises from 0.
    max_grad_norm: clips the gradients of all adapters together to this norm; 0 turns clipping off.
    ema_decay: decay of the moving average of the weights, which is the result; 0 uses the weights themselves.
    orthogonality: lambda of the paper's equation 4; 0 turns it off.
    min_snr_gamma: gamma of Min-SNR weighting (Hang et al. 2023) for noise and v prediction; 0 turns it off.
    timestep_density: distribution of the training timesteps; the last two (Esser et al. 2024) are for flow models.
    noise_from, noise_to: range of noise levels for the timesteps, 0 clean, 1 pure noise (the paper's figure 2).
    fresh_latents: sample the VAE's posterior anew at each step, like the paper, instead of its mean.
    outside_mask: weight of the loss outside a picture's mask, 0..1.
    prior_weight: weight of the loss on class pictures (Ruiz et al. 2023); 0 turns it off. prior_count: number of class
        pictures that the model generates if none are given.
    preservation_weight: weight of the loss that keeps the model's own prediction for the caption without the token; 0
        turns it off. It does what prior_weight does, without class pictures, so only one of them can be on.

    Raises TLoRAError when a field is out of its range.
    """

    steps: int = 800
    learning_rate: float = 1e-4
    batch_size: int = 1
    seed: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-4
    optimizer: str = "adamw"
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    gradient_accumulation: int = 1
    max_grad_norm: float = 0.0
    ema_decay: float = 0.0
    orthogonality: float = 0.0
    min_snr_gamma: float = 0.0
    timestep_density: str = "uniform"
    noise_from: float = 0.0
    noise_to: float = 1.0
    fresh_latents: bool = True
    outside_mask: float = 0.0
    prior_weight: float = 0.0
    prior_count: int = 16
    preservation_weight: float = field(default=0.0, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        for name, (fits, advice) in _RANGES.items():
            value = getattr(self, name)
            if not fits(value):
                raise TLoRAError(f"{name} is {value}; {advice}.")
        require_choice("optimizer", self.optimizer, OPTIMIZERS)
        require_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        require_choice("timestep_density", self.timestep_density, DENSITIES)
        if self.noise_from >= self.noise_to:
            raise TLoRAError(
                f"noise_from is {self.noise_from} and noise_to {self.noise_to}; set noise_from below noise_to."
            )
        if self.prior_weight and self.preservation_weight:
            raise TLoRAError(
                "prior_weight and preservation_weight are both on, and both keep the class as it was; set one of them "
                "to 0."
            )


def _at_least(low: float) -> tuple[Callable, str]:
    return (lambda value: low <= value < math.inf), f"set it to {low} or more"


def _between(low: float, high: float) -> tuple[Callable, str]:
    return (lambda value: low <= value <= high), f"set it to a number from {low} to {high}"


_BELOW_ONE = (lambda value: 0 <= value < 1), "set it to a number from 0 to below 1"
_RANGES = {
    "steps": _at_least(1),
    "batch_size": _at_least(1),
    "gradient_accumulation": _at_least(1),
    "prior_count": _at_least(1),
    "learning_rate": ((lambda value: 0 < value < math.inf), "set it to a number above 0 (the paper uses 1e-4)"),
    "beta1": _BELOW_ONE,
    "beta2": _BELOW_ONE,
    "ema_decay": _BELOW_ONE,
    "weight_decay": _at_least(0),
    "warmup_steps": _at_least(0),
    "max_grad_norm": _at_least(0),
    "orthogonality": _at_least(0),
    "min_snr_gamma": _at_least(0),
    "prior_weight": _at_least(0),
    "preservation_weight": _at_least(0),
    "noise_from": _between(0, 1),
    "noise_to": _between(0, 1),
    "outside_mask": _between(0, 1),
}
