"""How much memory a training step will take, measured on small latents beforehand."""

import gc
from typing import NamedTuple

import comfy.model_management
import torch
from torch import Tensor, nn

from ....layers.overlay import replaced_forward
from ....training.optimizers import STATE_SIZES
from ..model.layers import bytes_to_come, stored
from .denoiser import HostDenoiser
from .session import blocks

_PROBES = (16, 32)  # sides of the latents that are measured, multiples of what any U-Net halves
# What a backward pass holds besides: gradients on their way, and buffers of attention and convolution.
_MARGIN = 1.25


class Need(NamedTuple):
    """Bytes that a step keeps for its backward pass, as it is and with checkpointing."""

    plain: int
    checkpointed: int


def training_memory(denoiser: HostDenoiser, batch: int) -> Need:
    """What `batch` of the largest pictures need, inside a training session without checkpointing.

    What is kept grows as the picture does, from two sizes small enough to be cheap: attention keeps no tokens by tokens
    matrix. The adapters, their gradients and the optimizer's state are not part of it; they are there by the second
    step.
    """
    sample = max(denoiser.samples, key=lambda s: s.mean.numel())
    height, width = sample.mean.shape[-2:]
    cells, measured = [], []
    for side in _PROBES:
        shape = (*sample.mean.shape[:-2], min(side, height), min(side, width))
        latents = torch.zeros(1, *shape, device=denoiser.device)
        sigmas = torch.full((1,), float(denoiser.levels.sigma_max))
        with _Kept(denoiser.base.diffusion_model) as kept:
            denoiser.output_error([sample], latents, latents, sigmas)
        cells.append(shape[-2] * shape[-1])
        measured.append(kept.need())
    if cells[0] == cells[1]:
        return Need(*(batch * each for each in measured[1]))
    grown = (height * width - cells[0]) / (cells[1] - cells[0])
    return Need(*(int(batch * (small + grown * (large - small))) for small, large in zip(*measured)))


def should_checkpoint(denoiser: HostDenoiser, batch: int) -> bool:
    """Whether a step would not fit in the memory that is free now, once the rest of the weights, the adapters'
    gradients and the optimizer's state are there too."""
    need = (
        _MARGIN * training_memory(denoiser, batch).plain
        + (1 + STATE_SIZES[denoiser.config.optimizer]) * denoiser.adapter_bytes
    )
    gc.collect()  # what was measured leaves cycles behind, and they hold factors
    return need + bytes_to_come(denoiser.model) > comfy.model_management.get_free_memory(denoiser.device)


class _Kept:
    """Counts what autograd keeps within the block, by block of the model."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.counted = {
            t.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers()) for t in stored(p)
        }
        self.outside, self.inputs, self.inside = 0, 0, []
        self.depth = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.replaced = replaced_forward()
        replace = self.replaced.__enter__()
        for block in blocks(self.network):
            replace(block, self._counting(block.forward))
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)
        return self.replaced.__exit__(*error)

    def need(self) -> Need:
        inside = sum(self.inside)
        return Need(self.outside + inside, self.outside + self.inputs + max(self.inside, default=0))

    def _counting(self, forward):
        def counting(*args, **kwargs):
            self.inputs += sum(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad)
            self.inside.append(0)
            self.depth += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self.depth -= 1

        return counting

    def _pack(self, tensor: Tensor) -> Tensor:
        for part in stored(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self.counted:
                self.counted.add(storage.data_ptr())
                if self.depth:
                    self.inside[-1] += storage.nbytes()
                else:
                    self.outside += storage.nbytes()
        return (
            tensor.detach()
        )  # with its history it would hold the graph that holds it, and with that the model, for good
