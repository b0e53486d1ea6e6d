"""FLUX's blocks write their result onto their input in place: also where that is the output of a layer that is trained,
or that gradients pass."""

import pytest
import torch


def loss_of(model, adapters, sample, x):
    """(loss, gradient by the adapters, gradient by the latent x) of the small FLUX, at one noise level."""
    from tlora_core import RankSchedule
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.session import training_session
    from tlora_core.training.config import TrainConfig

    parameters = adapters.parameters()
    with torch.inference_mode(False), torch.enable_grad(), training_session(model):
        denoiser = HostDenoiser(model, adapters, RankSchedule(4, 4), [sample], TrainConfig())
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        x = x.clone().requires_grad_()
        loss = denoiser.output_error([sample], x, noise, torch.tensor([0.5])).square().mean()
        gradients = torch.autograd.grad(loss, [*parameters, x])
    return loss.item(), gradients[:-1], gradients[-1]


@pytest.mark.parametrize("storage", [None, torch.float8_e4m3fn], ids=["float32", "fp8"])
@pytest.mark.parametrize("layers", ["img_in", "attention"])
def test_gradients_are_right_where_the_host_writes_onto_a_layers_output(comfy, layers, storage):
    import random_models

    from tlora_core import make_adapters
    from tlora_core.hosts.comfy.model.families import target_layers
    from tlora_core.hosts.comfy.training.encode import Sample

    model = random_models.small("flux", storage=storage)
    shapes = {name: layer.shape for name, layer in target_layers(model, layers).items()}
    adapters = make_adapters("tlora", "last_random", shapes, 4, 0)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    sample = Sample(x[0], None, None, random_models.conditioning(model, 7))
    _, by_adapters, by_latent = loss_of(model, adapters, sample, x)
    step = 1e-2 / float(torch.cat([g.reshape(-1) for g in by_adapters]).norm())
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, gradient in zip(adapters.parameters(), by_adapters):
                parameter.add_(gradient, alpha=sign * step)
        sides.append(loss_of(model, adapters, sample, x)[0])
        with torch.no_grad():
            for parameter, gradient in zip(adapters.parameters(), by_adapters):
                parameter.sub_(gradient, alpha=sign * step)
    expected = sum(float(g.double().square().sum()) for g in by_adapters)
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(expected, rel=0.02)
    step = 1e-2 / float(by_latent.norm())
    sides = [loss_of(model, adapters, sample, x + sign * step * by_latent)[0] for sign in (1, -1)]
    expected = float(by_latent.double().square().sum())
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(expected, rel=0.02)
