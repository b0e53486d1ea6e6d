"""The training loop: the paper's, with no knowledge of the model's home."""
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from .adapters import Adapter
from .errors import TLoRAError

SNAPSHOT_EVERY = 25  # steps between copies of the adapters, to fall back on when the loss stops being a number


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's for SDXL (appendix, training details): AdamW, no warm-up.

    Raises TLoRAError when a field is out of its range.
    """

    steps: int = 800
    learning_rate: float = 1e-4
    batch_size: int = 1
    seed: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise TLoRAError(f"{name} is {getattr(self, name)}; set it to {low} or more.")
        if not 0 < self.learning_rate < math.inf:
            raise TLoRAError(f"learning_rate is {self.learning_rate}; set it to a number above 0 (the paper uses 1e-4).")

    def as_dict(self) -> dict:
        return asdict(self)


class Denoiser(Protocol):
    """A frozen model with the adapters attached to it, and the images it is trained on."""

    latents: Tensor  # [N, C, H, W], one per image, in the model's own scale
    needs_loss_scaling: bool  # True where gradients pass through float16

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels of `count` samples, t uniform over the training timesteps."""

    def output_error(self, rows: list[int], noise: Tensor, sigmas: Tensor) -> Tensor:
        """What the model predicts (noise, v or flow) minus what it should, for images `rows` with this noise
        [B, C, H, W] and sigmas [B]. Each sample has the ranks of its own timestep."""


class TrainingDiverged(TLoRAError):
    """The loss was no number any more. The adapters are back at `kept_step`, the last state known to be good."""

    def __init__(self, step: int, kept_step: int):
        super().__init__(
            f"Training stopped at step {step + 1} because the loss was no longer a finite number; lower learning_rate. "
            f"The adapters are back at step {kept_step}, the last state known to be good.")
        self.step, self.kept_step = step, kept_step


def train(adapters: Mapping[str, Adapter], denoiser: Denoiser, config: TrainConfig,
          on_step: Callable[[int, float], None] = lambda step, loss: None) -> list[float]:
    """Train the adapters in place; returns the loss of each step, mean squared error in the model's own prediction.

    `on_step(step, loss)` is called after each step, counted from 1; what it raises stops the training and leaves the
    adapters as they are then. All randomness comes from `config.seed` and is drawn on the CPU, so that it is the same
    on every device. Raises TrainingDiverged when the loss is not finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    device = denoiser.latents.device
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay,
        fused=device.type in ("cuda", "cpu"))  # one kernel instead of ten for each of a thousand small tensors
    scaler = torch.amp.GradScaler(device.type, enabled=denoiser.needs_loss_scaling)
    order = _image_order(len(denoiser.latents), generator)
    losses: list[float] = []
    snapshot = (0, [])
    for step in range(config.steps):
        rows = [next(order) for _ in range(config.batch_size)]
        noise = torch.randn(len(rows), *denoiser.latents.shape[1:], generator=generator).to(device)
        sigmas = denoiser.draw_sigmas(len(rows), generator).to(device)
        loss = denoiser.output_error(rows, noise, sigmas).float().square().mean()
        value = loss.item()
        if not math.isfinite(value):
            _restore(parameters, snapshot[1])
            raise TrainingDiverged(step, snapshot[0])
        if step % SNAPSHOT_EVERY == 0:
            # Taken only here, after these very weights gave a finite loss.
            snapshot = (step, [p.detach().to("cpu", copy=True) for p in parameters])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(value)
        on_step(step + 1, value)
    return losses


def _image_order(count: int, generator: torch.Generator):
    """Image rows without end, each image once in every round."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def _restore(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)
