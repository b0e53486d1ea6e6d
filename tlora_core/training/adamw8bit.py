"""AdamW with a state of two bytes a parameter instead of eight, in plain torch, so that it runs on every device.

As in 8-bit optimizers (Dettmers et al. 2022), values are quantised in blocks that have a scale of their own. What is
stored suits Adam's step, m / sqrt(v):

- sqrt(v) as its logarithm below the block's largest, in steps of a sixteenth of an octave. The error is 2% of any value
  down to 2^-16 of the largest. Smaller ones are taken for that, which makes their steps smaller and never larger.
- m as its quotient by sqrt(v), in 255 equal steps up to the block's largest. So a parameter with small gradients keeps
  its momentum beside one with large gradients.

v changes by a thousandth in a step, far less than its rounding, so it is rounded up or down in turn, as often as its
distance from both says. Which way follows from the parameter's position and the step's number alone, without random
numbers: a run resumed from its state equals an uninterrupted one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
STATE_SIZE = (2 + 2 * 4 / BLOCK) / 4  # in sizes of a float32 parameter
_CHUNK = BLOCK << 14  # values updated at once: few kernels, and temporary memory that is small beside a model
_LEVELS, _OCTAVE = 255, 16
_ACROSS, _ALONG = 40503, 49471  # of 2^16: about the golden and the plastic ratio; odd, so that every value comes up
_TINY = 1e-30


class AdamW8bit(torch.optim.Optimizer):
    """Like torch.optim.AdamW for float32 parameters. State of a parameter: `step`, an int; `ratio` int8 and `octave`
    uint8 [blocks, BLOCK]; `scales` float32 [blocks, 2], of sqrt(v) and of the ratio."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or self._new_state(parameter)
                state["step"] += 1
                values, gradients = parameter.view(-1), parameter.grad.reshape(-1)
                for first in range(0, len(values), _CHUNK):
                    chunk, blocks = slice(first, first + _CHUNK), slice(first // BLOCK, (first + _CHUNK) // BLOCK)
                    ratio, octave, scales = (state[name][blocks] for name in ("ratio", "octave", "scales"))
                    _update(values[chunk], gradients[chunk], ratio, octave, scales, state["step"], group)

    def _new_state(self, parameter: Tensor) -> dict[str, Any]:
        blocks, device = -(-parameter.numel() // BLOCK), parameter.device
        self.state[parameter] = {
            "step": 0,
            "ratio": torch.zeros(blocks, BLOCK, dtype=torch.int8, device=device),
            "octave": torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device),
            "scales": torch.zeros(blocks, 2, device=device),
        }
        return self.state[parameter]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch has cast all of it to the parameter's dtype
            state |= {"ratio": state["ratio"].to(torch.int8), "octave": state["octave"].to(torch.uint8)}


def _update(
    values: Tensor, gradients: Tensor, ratio: Tensor, octave: Tensor, scales: Tensor, step: int, group: dict[str, Any]
) -> None:
    """AdamW's step for consecutive values [n] with gradients [n], and their state, all in place."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    padding = ratio.numel() - len(values)
    gradient = (pad(gradients, (0, padding)) if padding else gradients).view(-1, BLOCK)
    root = _root(octave, scales[:, :1])
    m = (ratio * scales[:, 1:]).mul_(root).lerp_(gradient, 1 - beta1)
    root = root.square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
    divisor = (root / (1 - beta2**step) ** 0.5).add_(group["eps"])
    change = m.div(divisor).view(-1)[: len(values)]
    values.mul_(1 - rate * group["weight_decay"]).add_(change, alpha=-rate / (1 - beta1**step))
    scales[:, :1] = root.amax(1, keepdim=True).clamp_min_(_TINY)
    below = root.div_(scales[:, :1]).log2_().mul_(-_OCTAVE).add_(_dither(root, step))
    octave.copy_(below.floor_().clamp_(0, _LEVELS))
    quotient = m.div_(_root(octave, scales[:, :1]))
    scales[:, 1:] = quotient.abs().amax(1, keepdim=True).clamp_min_(_TINY) / 127
    ratio.copy_(quotient.div_(scales[:, 1:]).round_())


def _root(octave: Tensor, largest: Tensor) -> Tensor:
    """sqrt(v) [blocks, BLOCK] from its code."""
    return octave.to(torch.float32).div_(-_OCTAVE).exp2_().mul_(largest)


def _dither(like: Tensor, step: int) -> Tensor:
    """Numbers from 0 to below 1 in the shape of `like`: evenly spread, over the values of a step and over the steps of
    a value."""
    numbers = (
        torch.arange(like.numel(), dtype=torch.int32, device=like.device).mul_(_ACROSS).add_(step * _ALONG % 65536)
    )
    return numbers.bitwise_and_(65535).view_as(like) / 65536
