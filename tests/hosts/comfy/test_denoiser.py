"""Training on the host's model."""

import host_models as models
import pytest
import torch
from training_runs import train


@pytest.fixture
def model(comfy):
    return models.random_unet()


def denoiser_for(model, method="tlora", rank=16, min_rank=8, latents=1, moved=0.1):
    from tlora_core import RankSchedule, make_adapters
    from tlora_core.hosts.comfy.model.families import target_layers
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.training.config import TrainConfig

    shapes = {path: layer.shape for path, layer in target_layers(model).items()}
    adapters = make_adapters(method, "last_random", shapes, rank, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            is_scale = parameter.shape[1] == 1
            parameter.add_(torch.randn_like(parameter) * moved * (1 if is_scale else 0.3))
    means = torch.randn(latents, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    samples = [Sample(mean, None, None, models.conditioning(i)) for i, mean in enumerate(means)]
    return adapters, HostDenoiser(model, adapters, RankSchedule(rank, min_rank), samples, TrainConfig())


def output_error(denoiser, rows, noise, sigmas):
    samples = [denoiser.samples[row] for row in rows]
    latents = denoiser.base.process_latent_in(torch.stack([sample.mean for sample in samples]))
    return denoiser.output_error(samples, latents, noise, sigmas)


def noise_for(count):
    return torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(2))


def in_node(work):
    """Run as the host runs a node: in inference mode."""
    with torch.inference_mode():
        return work()


def test_weights_end_bit_identical_and_are_never_copied(model):
    from tlora_core.hosts.comfy.training.session import training_session
    from tlora_core.training.config import TrainConfig

    with torch.inference_mode():  # weights as a loader node leaves them
        for module in model.model.diffusion_model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
                    module._parameters[name]._model_dtype = torch.float16  # as the host notes where it streams weights
    before = {k: (v.clone(), v.data_ptr()) for k, v in model.model.diffusion_model.state_dict().items()}
    assert any(p.is_inference() for p in model.model.diffusion_model.parameters())

    def work():
        with training_session(model):
            adapters, denoiser = denoiser_for(model)
            start = {path: a.A.detach().clone() for path, a in adapters.items()}
            train(adapters, denoiser, TrainConfig(steps=3, learning_rate=1e-2))
            assert all(p._model_dtype == torch.float16 for p in model.model.diffusion_model.parameters())
            return all(not torch.equal(a.A, start[path]) for path, a in adapters.items())

    assert in_node(work), "every adapter learns"
    for key, value in model.model.diffusion_model.state_dict().items():
        assert torch.equal(value, before[key][0]) and value.data_ptr() == before[key][1]
    assert models.is_untouched(model) and not any(p.requires_grad for p in model.model.diffusion_model.parameters())


def test_loss_is_the_error_of_the_predicted_noise(model):
    from tlora_core.hosts.comfy.sampling import diffusion_modules
    from tlora_core.hosts.comfy.training.session import training_session

    def work():
        with training_session(model):
            _, denoiser = denoiser_for(model, moved=0.0)
            sampling, noise = model.model.model_sampling, noise_for(1)
            errors = []
            for t in (0, 300, 999):
                sigma = sampling.sigmas[t : t + 1].clone()
                x = model.model.process_latent_in(denoiser.samples[0].mean[None]) + sigma * noise
                inputs = denoiser._condition(denoiser.samples[0], noise)
                predicted = model.model.diffusion_model(
                    x / (sigma**2 + 1) ** 0.5,
                    torch.tensor([float(t)]),
                    context=inputs["c_crossattn"].cond,
                    y=inputs["y"].cond,
                )
                errors.append(models.relative_error(output_error(denoiser, [0], noise, sigma), predicted - noise))
            return errors

    assert diffusion_modules(model.model.diffusion_model)
    assert max(in_node(work)) < 1e-4


def test_gradient_agrees_with_finite_differences(model):
    from tlora_core.hosts.comfy.training.session import training_session

    def work():
        with training_session(model):
            adapters, denoiser = denoiser_for(model, latents=2)
            sigmas, noise = model.model.model_sampling.sigmas[[700, 100]].clone(), noise_for(2)
            parameters = adapters.parameters()
            loss = lambda: output_error(denoiser, [0, 1], noise, sigmas).double().square().mean()  # noqa: E731
            gradients = torch.autograd.grad(loss(), parameters)
            norm = torch.stack([g.norm() for g in gradients]).norm()
            step = 1e-2
            with torch.no_grad():
                values = []
                for sign in (1, -2):
                    for p, g in zip(parameters, gradients):
                        p.add_(g, alpha=float(sign * step / norm))
                    values.append(loss().item())
            return (values[0] - values[1]) / (2 * step), norm.item()

    slope, norm = in_node(work)
    assert slope == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("method, wanted", [("tlora", 8), ("vanilla_tlora", 8), ("ortho_lora", 16), ("lora", 16)])
def test_only_the_active_ranks_learn_at_the_noisiest_timestep(model, method, wanted):
    from tlora_core.hosts.comfy.training.session import training_session

    def work():
        with training_session(model):
            masked = method.endswith("tlora")
            adapters, denoiser = denoiser_for(model, method, min_rank=8 if masked else 16)
            sigma = model.model.model_sampling.sigmas[999:].clone()
            output_error(denoiser, [0], noise_for(1), sigma).square().mean().backward()
            return {int((a.module.A.grad[a.index].abs().sum(1) > 0).sum()) for a in adapters.values()}

    assert in_node(work) == {wanted}


def test_each_sample_of_a_batch_is_masked_by_its_own_timestep(model):
    from tlora_core.hosts.comfy.training.session import training_session

    def work():
        with training_session(model):
            _, denoiser = denoiser_for(model, latents=3)
            sigmas, noise = model.model.model_sampling.sigmas[[999, 500, 0]].clone(), noise_for(3)
            together = output_error(denoiser, [0, 1, 2], noise, sigmas)
            return [
                models.relative_error(
                    together[i : i + 1], output_error(denoiser, [i], noise[i : i + 1], sigmas[i : i + 1])
                )
                for i in range(3)
            ]

    assert max(in_node(work)) < 1e-4


def test_cancel_stops_within_a_step_and_leaves_no_trace(model):
    import comfy.model_management

    from tlora_core.hosts.comfy.training.session import training_session
    from tlora_core.training.config import TrainConfig

    before, seen = models.evaluate(model, [1.0]), []

    def on_step(step, loss):
        seen.append(step)
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    def work():
        with training_session(model):
            adapters, denoiser = denoiser_for(model)
            train(adapters, denoiser, TrainConfig(steps=50), on_step)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        in_node(work)
    assert seen == [1, 2]
    assert models.is_untouched(model) and model.wrappers == {} and not comfy.model_management.in_training
    assert torch.equal(models.evaluate(model, [1.0]), before)


def test_error_in_the_middle_of_a_step_leaves_no_trace(model):
    from tlora_core.hosts.comfy.training.session import training_session
    from tlora_core.training.config import TrainConfig

    before = models.evaluate(model, [1.0])
    layer = list(m for m in model.model.diffusion_model.modules() if isinstance(m, torch.nn.Linear))[40]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("injected")))
    try:
        with pytest.raises(MemoryError), training_session(model):
            adapters, denoiser = denoiser_for(model)
            train(adapters, denoiser, TrainConfig(steps=2))
    finally:
        handle.remove()
    assert models.is_untouched(model)
    assert torch.equal(models.evaluate(model, [1.0]), before)


def test_model_of_another_kind_is_refused_before_it_is_touched(comfy):
    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.model.families import target_layers

    class Patcher:
        model = type("SD3", (torch.nn.Module,), {})()

    Patcher.model.diffusion_model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(TLoRAError, match="SD3.*patterns of layer names"):
        target_layers(Patcher)


def test_a_unets_output_for_the_text_is_computed_once_a_session(model):
    from tlora_core.hosts.comfy.training.session import training_session
    from tlora_core.training.config import TrainConfig

    layer = next(m for path, m in model.model.diffusion_model.named_modules() if path.endswith("attn2.to_k"))
    calls = []
    handle = torch.nn.functional.linear

    def work():
        with training_session(model):
            adapters, denoiser = denoiser_for(model, latents=2)
            train(adapters, denoiser, TrainConfig(steps=6))
        return calls

    def counted(x, weight, bias=None):
        calls.extend([1] if weight.data_ptr() == layer.weight.data_ptr() else [])
        return handle(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counted)
        # A text of one sample and one of the other; the first call of all, which finds out what a layer overwrites; and
        # the trial of its block, which finds out what a block overwrites.
        assert len(in_node(work)) == 4


def test_copies_of_a_tlora_that_was_trained_on_top_of_leave_the_device(base):
    import random_models

    from tlora_core.hosts.comfy.sampling import apply_tlora
    from tlora_core.hosts.comfy.training.session import training_session

    model = apply_tlora(base[0], random_models.random_tlora(base[0], 4))
    ((patch,),) = model.wrappers["apply_model"].values()
    with training_session(model):
        patch.placed(model.model, torch.device("meta"))
        assert patch._placed
    assert not patch._placed
