"""The loss on the output of every prediction type of the host."""

import inspect

import pytest
import torch
from training_runs import images, request

SIGMAS = 0.03, 0.4, 0.9


def sampling_of(prediction, schedule=None):
    """A model's `model_sampling` with this prediction type and the schedule that the host gives it."""
    import comfy.model_sampling as ms

    of_name = {
        "EDM": ms.ModelSamplingContinuousEDM,
        "CONST": ms.ModelSamplingDiscreteFlow,
        "IMG_TO_IMG_FLOW": ms.ModelSamplingDiscreteFlow,
        "COSMOS_RFLOW": ms.ModelSamplingCosmosRFlow,
    }
    schedule = schedule or of_name.get(prediction.__name__, ms.ModelSamplingDiscrete)
    return type("ModelSampling", (schedule, prediction), {})()


def predictions():
    """Every prediction type of the host, by name: whatever in its module makes a denoised latent of an output."""
    import comfy.model_sampling as ms

    classes = dict(inspect.getmembers(ms, inspect.isclass))
    return {name: each for name, each in classes.items() if hasattr(each, "calculate_denoised")}


def test_a_loss_on_the_output_is_the_error_of_the_output_or_refused_whatever_the_host_predicts(comfy):
    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.model.noise import output_scale, require_trainable

    generator, refused, step = torch.Generator().manual_seed(0), [], 1e-4
    for name, prediction in predictions().items():
        sampling = sampling_of(prediction)
        try:
            require_trainable(sampling)
        except TLoRAError:
            refused.append(name)
            continue
        sigma = torch.tensor(SIGMAS, dtype=torch.float64).view(-1, 1, 1)
        x, output, change = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
        with_change, against = (
            sampling.calculate_denoised(sigma, output + side * step * change, x) for side in (1, -1)
        )
        derivative = (with_change - against) / (2 * step)
        torch.testing.assert_close(-output_scale(sampling, sigma) * change, derivative, rtol=1e-6, atol=1e-9, msg=name)
    assert refused == ["IMG_TO_IMG", "IMG_TO_IMG_FLOW"]


def test_scales_are_those_of_each_prediction_types_formula(comfy):
    from tlora_core.hosts.comfy.model.noise import output_scale

    sigma = torch.tensor(SIGMAS)
    wanted = {
        "EPS": sigma,
        "CONST": sigma,
        "V_PREDICTION": sigma / (sigma**2 + 1).sqrt(),
        "V_PREDICTION_DDPM": sigma / (sigma**2 + 1).sqrt(),
        "EDM": -sigma / (sigma**2 + 1).sqrt(),
        "X0": -torch.ones(3),
        "COSMOS_RFLOW": sigma / (sigma + 1),
    }
    for name, scale in wanted.items():
        torch.testing.assert_close(output_scale(sampling_of(predictions()[name]), sigma), scale, msg=name)


def test_a_model_gets_latents_of_the_size_that_it_was_trained_on_at_every_noise(comfy):
    from tlora_core.hosts.comfy.model.noise import noised, output_scale, require_trainable

    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(9, 4, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    for name in ("EPS", "V_PREDICTION", "V_PREDICTION_DDPM", "EDM", "CONST", "COSMOS_RFLOW"):
        sampling = sampling_of(predictions()[name])
        require_trainable(sampling)
        sigma = sampling.sigmas[:: len(sampling.sigmas) // 8].double()[:9].view(-1, 1, 1)
        latents, noise = latents[: len(sigma)], noise[: len(sigma)]
        noisy = noised(sampling, sigma, noise, latents)
        given = sampling.calculate_input(sigma, noisy)
        assert given.std() < 1.2, name
        # What a perfect model answers, too, is of the size of noise or of the picture.
        target = (sampling.calculate_denoised(sigma, torch.zeros_like(noisy), noisy) - latents) / output_scale(
            sampling, sigma
        )
        assert 0.8 < target.std() < 1.6, name


def test_unlearnable_predictions_are_refused_in_a_sentence(comfy):
    import comfy.model_sampling as ms

    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.model.noise import require_trainable

    class Squared(ms.EPS):
        def calculate_denoised(self, sigma, model_output, model_input):
            return model_input - model_output.square() * sigma

    class Ignored(ms.EPS):
        def calculate_denoised(self, sigma, model_output, model_input):
            return model_input

    class Multiplied(ms.EPS):
        def calculate_denoised(self, sigma, model_output, model_input):
            return model_input * (1 - model_output * sigma)

    for prediction in (Squared, Ignored, Multiplied):
        with pytest.raises(TLoRAError, match=f"prediction type \\({prediction.__name__}\\)"):
            require_trainable(sampling_of(prediction))
    with pytest.raises(TLoRAError, match=r"makes one picture from another.*IMG_TO_IMG_FLOW"):
        require_trainable(sampling_of(ms.IMG_TO_IMG_FLOW))


def test_timesteps_of_a_flow_whose_sigma_is_a_ratio_are_drawn_evenly(comfy):
    import comfy.model_sampling as ms

    from tlora_core.hosts.comfy.model.noise import draw_sigmas, noise_level

    sampling, generator = sampling_of(ms.COSMOS_RFLOW), torch.Generator().manual_seed(0)
    drawn, _ = noise_level(sampling, draw_sigmas(sampling, 4000, generator))
    assert drawn.mean() == pytest.approx(0.5, abs=0.02) and drawn.std() == pytest.approx(12**-0.5, abs=0.02)
    half, _ = noise_level(sampling, draw_sigmas(sampling, 1000, generator, "logit_normal", 0.5, 1.0))
    assert half.min() >= 0.5 and half.mean() == pytest.approx(0.75, abs=0.02)


def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_encoded(base, monkeypatch):
    import comfy.model_sampling as ms

    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.training.encode import Encoder
    from tlora_core.hosts.comfy.training.personalize import Personalization

    monkeypatch.setattr(Encoder, "sample", lambda *args: pytest.fail("encoded a picture"))
    model, clip, vae = base
    model = model.clone()
    model.add_object_patch("model_sampling", sampling_of(ms.IMG_TO_IMG))
    with pytest.raises(TLoRAError, match="one picture from another"):
        Personalization(model, clip, vae, images(1), request(1))


@pytest.mark.parametrize("family", ["chroma-radiance", "z-image-pixel", "hidream-o1", "z-image"])
def test_no_step_of_a_model_that_draws_pixels_outweighs_the_others(comfy, monkeypatch, family):
    """Its error of the picture is given: 0.02, as the finest details that a model misses however little the noise."""
    import random_models

    from tlora_core import RankSchedule, make_adapters
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.training.config import TrainConfig

    model = random_models.small(family, device=torch.device("meta"))
    shape = random_models.latent(model, 8).shape[1:]
    model.load_device = torch.device("cpu")
    missed = lambda noisy, sigmas, **inputs: latents + 0.02  # noqa: E731
    monkeypatch.setattr(model.model, "apply_model", missed)
    monkeypatch.setattr(HostDenoiser, "inputs", lambda *args: {})
    latents, sigmas = torch.zeros(4, *shape), torch.tensor([1e-3, 0.02, 0.05, 0.5])
    samples = [Sample(latents[0], None, None, random_models.conditioning(model, 5))] * 4
    denoiser = HostDenoiser(
        model, make_adapters("lora", "", {"": (1, 1)}, 1, 0), RankSchedule(1, 1), samples, TrainConfig()
    )
    error = denoiser.output_error(samples, latents, torch.zeros_like(latents), sigmas)
    divided_by = -0.02 / error.flatten(1)[:, 0]
    of_pixels = torch.tensor([0.05, 0.05, 0.05, 0.5])
    torch.testing.assert_close(divided_by, sigmas if family == "z-image" else of_pixels, rtol=1e-4, atol=1e-6)
