"""Gradients of adapters on the host's own models. Import inside tests that use the `comfy` fixture."""

from contextlib import contextmanager

import torch

DOUBLE = torch.float64
ALIKE, MIXED = (0.5, 0.5), (0.2, 0.9)  # noise levels of the two samples of a batch: of one rank, or of a rank each


class Setting:
    """A small model with adapters on all target layers, moved away from their start."""

    def __init__(self, family, dtype=DOUBLE, storage=None, model=None, layers="attention"):
        import random_models

        from tlora_core import make_adapters
        from tlora_core.hosts.comfy.model.families import target_layers

        self.model = model or random_models.small(family, dtype=dtype)
        if storage is not None:
            cast_to(self.model, storage)
        self.layers = target_layers(self.model, layers)
        shapes = {name: layer.shape for name, layer in self.layers.items()}
        self.adapters = make_adapters("tlora", "last_random", shapes, 4, 0).to(dtype)
        self.parameters = self.adapters.parameters()
        self.generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(self.rand(*parameter.shape).to(dtype) * 0.2)
        side = random_models.family_of(self.model).side
        self.latents = self.rand(2, *random_models.latent(self.model, side).shape[1:]).float()
        self.noise, self.weights = self.rand(*self.latents.shape).float(), self.rand(*self.latents.shape)

    def rand(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=DOUBLE)

    @contextmanager
    def session(self, checkpointing=False, room=None):
        import random_models

        from tlora_core import RankSchedule
        from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
        from tlora_core.hosts.comfy.training.encode import Sample
        from tlora_core.hosts.comfy.training.session import training_session
        from tlora_core.training.config import TrainConfig

        with training_session(self.model, checkpointing, room):
            texts = [random_models.conditioning(self.model, 5, seed) for seed in range(4)]
            samples = [
                Sample(latent, None, None, texts[index], texts[index + 2]) for index, latent in enumerate(self.latents)
            ]
            self.denoiser = HostDenoiser(self.model, self.adapters, RankSchedule(4, 1), samples, TrainConfig())
            yield

    def drawn(self, levels):
        from tlora_core.hosts.comfy.training.denoiser import Drawn

        sampling = self.model.model.model_sampling
        sigmas = sampling.sigmas[[int(level * (len(sampling.sigmas) - 1)) for level in levels]].clone()
        return Drawn(self.latents, self.noise, sigmas)

    def loss(self, levels):
        error = self.denoiser.output_error(self.denoiser.samples, *self.drawn(levels))
        return (error * self.weights).mean()

    def gradients(self, levels):
        for parameter in self.parameters:
            parameter.grad = None
        self.loss(levels).backward()
        return [parameter.grad for parameter in self.parameters]


class ClassSetting(Setting):
    """The loss is that of output preservation."""

    def loss(self, levels):
        return self.denoiser._change_of_class(self.denoiser.samples, self.drawn(levels))


def cast_to(model, storage):
    """As the host loads a model whose dtype it cannot compute in: weights in `storage`, cast at each use to float32."""
    import comfy.ops

    plain, casting = comfy.ops.disable_weight_init, comfy.ops.manual_cast
    names = ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "RMSNorm")
    classes = {getattr(plain, name): getattr(casting, name) for name in names}
    for module in model.model.diffusion_model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            for parameter in module.parameters():
                parameter.data = parameter.data.to(storage)


def slope(setting, name, levels, step=1e-2):
    """(what the gradients say, what the loss does) when one layer's adapter moves along its gradient. The host gives
    its output in float32, so the step must not be too small."""
    adapter = setting.adapters[name]
    whole = list(adapter.module.parameters())
    parameters = [p[adapter.index] for p in whole]
    gradients = [p.grad[adapter.index].clone() for p in whole]
    length = sum(g.square().sum() for g in gradients).sqrt()
    # SD3's last block makes a query of the text that nothing looks at: no gradient, and no direction to go in.
    directions = [g / length.clamp(min=1e-12) for g in gradients]
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, direction in zip(parameters, directions):
                parameter.add_(direction, alpha=sign * step)
            values.append(setting.loss(levels).item())
    return length.item(), (values[0] - values[1]) / (2 * step)


def saved_bytes(setting) -> int:
    from tlora_core.layers.saving import saving

    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in setting.model.model.diffusion_model.parameters()}
    with saving(pack):
        loss = setting.loss(ALIKE)
    total = sum(size for pointer, size in saved.items() if pointer not in weights)
    del loss
    return total
