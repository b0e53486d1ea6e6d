"""How exact a sampling with a T-LoRA is in half precision, against float64."""

from __future__ import annotations

from contextlib import contextmanager

import comfy.model_management as management
import random_models
import torch

from tlora_core.hosts.comfy.model.noise import noise_level
from tlora_core.hosts.comfy.sampling import apply_tlora

from .. import models, sample
from ..running import Run
from ..train import relative_error

# A T-LoRA may double the error of the latent that the plain model's own rounding makes.
LARGEST_RATIO = 2.0
UPDATE = 1.0  # size of the updates to their weights, so that no rounding hides them


def sampling_error(run: Run, weights: str) -> None:
    for kind in run.size.small:
        _sampling_error(run, kind, weights)


def _sampling_error(run: Run, kind: str, weights: str) -> None:
    shape = run.size.small[kind]
    built = models.build_small(run, kind, weights)
    exact = models.reference(run, kind, built.worth, torch.float64)
    tlora = random_models.random_tlora(exact, run.size.rank, size=UPDATE)
    plain = sample.latent(built.model, shape)
    with _in_float64():
        plain_exact, adapted_exact = sample.latent(exact, shape), sample.latent(merged(exact, tlora), shape)
    own = relative_error(plain, plain_exact)
    with_it = relative_error(sample.latent(apply_tlora(built.model, tlora), shape), adapted_exact)
    beside = relative_error(sample.latent(apply_tlora(built.model, tlora, fold=False), shape), adapted_exact)
    effect = relative_error(plain_exact, adapted_exact)
    figures = {"plain_error": own, "tlora_error": with_it, "beside_error": beside, "effect": effect}
    run.note(**{f"{kind}_{name}": value for name, value in figures.items()})
    worst = max(with_it, beside)
    run.require(worst < LARGEST_RATIO * own, f"{kind}: error {worst:.3g} with the T-LoRA, {own:.3g} of the plain model")
    run.require(LARGEST_RATIO * own < effect, f"{kind}: the plain model's error {own:.3g} hides the T-LoRA's effect")


@contextmanager
def _in_float64():
    """Within the block the host computes rotary embeddings by plain operations, as in its own training: its kernels
    take no float64."""
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


def merged(model, tlora):
    """A clone of MODEL that merges at each evaluation, into its own weights and in their precision, the update that
    r(t) leaves on: what a T-LoRA is defined as, by none of the ways that the pack puts it on."""
    patched = model.clone()
    patched.add_wrapper_with_key("apply_model", "gpu_check", _Merging(tlora))
    return patched


class _Merging:
    def __init__(self, tlora):
        self.tlora = tlora

    def __call__(self, executor, x, sigma, *args, **kwargs):
        base = executor.class_obj
        modules = dict(base.diffusion_model.named_modules())
        timesteps, T = noise_level(base.model_sampling, sigma)
        [t] = set(timesteps.tolist())
        originals = {name.path: modules[name.path].weight for name in self.tlora.layers}
        try:
            for name, layer in self.tlora.layers.items():
                module, columns = modules[name.path], layer.group * self.tlora.schedule_of(name).active_rank(t, T)
                up, down = (part.to(module.weight) for part in (layer.up[:, :columns], layer.down[:columns]))
                update = torch.zeros_like(module.weight)
                update[name.row : name.row + len(up)] = up @ down
                module.weight = torch.nn.Parameter(module.weight + update, requires_grad=False)
            return executor(x, sigma, *args, **kwargs)
        finally:
            for path, weight in originals.items():
                modules[path].weight = weight
