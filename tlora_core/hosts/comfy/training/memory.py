"""How much memory a training step will take, measured on small latents beforehand."""

import gc

import comfy.model_management
import torch
from torch import Tensor, nn

from ....training.optimizers import STATE_SIZES
from ..model.layers import bytes_to_come, stored
from .denoiser import HostDenoiser

_PROBES = (16, 32)  # sides of the latents that are measured, multiples of what any U-Net halves
# A backward pass also holds intermediate gradients, and buffers of attention and convolution.
_MARGIN = 1.25


def training_memory(denoiser: HostDenoiser, batch: int) -> int:
    """The bytes that a step on `batch` of the largest pictures keeps for its backward pass, inside a training session
    without gradient checkpointing.

    Extrapolated from two latents small enough to be cheap, as what is kept grows with the number of pixels: attention
    keeps no matrix of tokens by tokens. The adapters, their gradients and the optimizer's state are not counted.
    """
    sample = max(denoiser.samples, key=lambda s: s.mean.numel())
    height, width = sample.mean.shape[-2:]
    cells, measured = [], []
    for side in _PROBES:
        shape = (*sample.mean.shape[:-2], min(side, height), min(side, width))
        latents = torch.zeros(1, *shape, device=denoiser.device)
        sigmas = torch.full((1,), float(denoiser.levels.sigma_max))
        with SavedBytes(denoiser.base.diffusion_model) as saved:
            denoiser.output_error([sample], latents, latents, sigmas)
        cells.append(shape[-2] * shape[-1])
        measured.append(saved.total)
    small, large = measured
    if cells[0] == cells[1]:
        return batch * large
    growth = (height * width - cells[0]) / (cells[1] - cells[0])
    return int(batch * (small + growth * (large - small)))


def should_checkpoint(denoiser: HostDenoiser, batch: int) -> bool:
    """Whether a step would not fit into the free memory, once the rest of the weights, the adapters' gradients and the
    optimizer's state are loaded too."""
    need = (
        _MARGIN * training_memory(denoiser, batch)
        + (1 + STATE_SIZES[denoiser.config.optimizer]) * denoiser.adapter_bytes
    )
    gc.collect()  # the measurement leaves reference cycles that hold factors
    return need + bytes_to_come(denoiser.model) > comfy.model_management.get_free_memory(denoiser.device)


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass within the block, without the weights of `network`."""

    def __init__(self, network: nn.Module):
        self.total = 0
        self._counted = {
            t.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers()) for t in stored(p)
        }
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        return self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        for part in stored(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self._counted:
                self._counted.add(storage.data_ptr())
                self.total += storage.nbytes()
        # With its history the tensor would hold the graph that holds it, and with that the model, for good.
        return tensor.detach()
