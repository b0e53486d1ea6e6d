"""How much memory a training step will take, measured on small latents beforehand."""

import gc
import math
from typing import NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....layers.overlay import replaced_forward
from ....layers.saving import saving
from ....training.optimizers import STATE_SIZES
from ..model.layers import is_dynamic, stored
from .denoiser import HostDenoiser
from .encode import Sample
from .failure import at_smallest
from .session import blocks

# Sides of the smaller of the two latents that are measured, multiples of what any U-Net halves; the other is twice as
# large. The first does for almost all models.
_SIDES = (16, 32, 64)
# What a backward pass holds besides: gradients on their way, and buffers of attention and convolution.
_MARGIN = 1.25


class Need(NamedTuple):
    """Bytes that a step keeps for its backward pass, as it is and with gradient checkpointing."""

    plain: int
    checkpointed: int


class Fit(NamedTuple):
    """How a training uses the memory of its device: with gradient checkpointing or without, and with the whole model
    loaded or only what fits beside `room` bytes; see `session.training_session`."""

    checkpointing: bool
    room: int | None = None

    def __str__(self) -> str:
        if not self.checkpointing:
            return "fast"
        return "low" if self.room is None else "lowest"


FAST, LOW = Fit(False), Fit(True)


def training_memory(denoiser: HostDenoiser, batch: int) -> Need:
    """What `batch` of the largest pictures need, inside a training session without checkpointing.

    What is kept grows as the picture does, from two sizes small enough to be cheap: attention keeps no tokens by tokens
    matrix. The adapters, their gradients and the optimizer's state are not part of it; they are there by the second
    step.
    """
    sample = max(denoiser.samples, key=lambda s: s.mean.numel())
    (cells, small), (more, large) = at_smallest(
        _SIDES, lambda side: [_measured(denoiser, sample, each) for each in (side, 2 * side)]
    )
    gc.collect()  # the measurement leaves cycles behind, and they hold factors
    if cells == more:
        return Need(*(batch * each for each in large))
    grown = (math.prod(sample.shape[-2:]) - cells) / (more - cells)
    return Need(*(int(batch * (one + grown * (other - one))) for one, other in zip(small, large)))


def _measured(denoiser: HostDenoiser, sample: Sample, side: int) -> tuple[int, Need]:
    """(cells, need) of latents with this side, or with the sample's own where that is smaller."""
    height, width = (min(side, own) for own in sample.shape[-2:])
    latents = torch.zeros(1, *sample.shape[:-2], height, width, device=denoiser.device)
    latents = denoiser.base.process_latent_in(latents)  # which may have another number of channels
    sigmas = torch.full((1,), float(denoiser.levels.sigma_max))
    with _Kept(denoiser.base.diffusion_model) as kept:
        denoiser.output_error([sample], latents, latents, sigmas)
    return height * width, kept.need()


def state_bytes(denoiser: HostDenoiser) -> int:
    """Of the adapters' gradients and the optimizer's state, which are there from the second step on."""
    return int((1 + STATE_SIZES[denoiser.config.optimizer]) * denoiser.adapter_bytes)


def fit_for(denoiser: HostDenoiser, batch: int, leanest: bool = False) -> Fit:
    """The fastest way to train that fits, or the leanest. Activations, gradients and the optimizer come first; the
    weights get the rest. Inside a training session without checkpointing."""
    need, model = training_memory(denoiser, batch), denoiser.model
    plain, checkpointed = (int(_MARGIN * each) + state_bytes(denoiser) for each in need)
    left = available(model) - model.model_size()
    if leanest or checkpointed > left:
        return leanest_fit(model, checkpointed)
    return FAST if plain <= left else LOW


def leanest_fit(model: ModelPatcher, room: int) -> Fit:
    """With checkpointing, and with only those weights on the device that fit beside `room` bytes. The CPU has nothing
    to stream from; with dynamic VRAM the host streams by itself whatever does not fit, however a model is loaded."""
    is_streamed = comfy.model_management.is_device_cpu(model.load_device) or is_dynamic(model)
    return LOW if is_streamed else Fit(True, room)


def available(model: ModelPatcher) -> int:
    """Bytes that the model's weights and its training can have together: the free memory, and that of all models that
    the host has loaded, as it moves the others off. With dynamic VRAM these count as used although each allocation can
    take their place."""
    device, free = model.load_device, comfy.model_management.get_free_memory(model.load_device)
    if comfy.model_management.is_device_cpu(device):
        return free + model.model_size()  # its weights are in RAM already, and stay there
    loaded = {id(each.model): each for each in (*comfy.model_management.loaded_models(), model)}
    return free + sum(each.loaded_size() for each in loaded.values() if each.load_device == device)


class _Kept:
    """Counts what autograd keeps within the block, by block of the model."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.counted = {
            t.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers()) for t in stored(p)
        }
        self.outside, self.inputs, self.inside = 0, 0, []
        self.depth = 0

    def __enter__(self):
        self.saving = saving(self._pack)
        self.replaced = replaced_forward()
        replace = self.replaced.__enter__()
        for block in blocks(self.network):
            replace(block, self._counting(block.forward))
        self.saving.__enter__()
        return self

    def __exit__(self, *error):
        self.saving.__exit__(*error)
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
            if storage._cdata not in self.counted:
                self.counted.add(storage._cdata)
                if self.depth:
                    self.inside[-1] += storage.nbytes()
                else:
                    self.outside += storage.nbytes()
        return tensor
