"""Batches of several noise levels, on small random models in the host's own classes."""

import host_models as models
import pytest
import sampling_runs as runs
import torch

RANK, MIN_RANK = 16, 4
FAMILIES = ["sd15", "sd2", "sdxl-refiner", "ssd-1b", "sd3", "flux", "chroma", "lumina2", "z-image", "qwen-image", "wan"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, comfy):
    """(MODEL, its T-LoRA, positive and negative text)."""
    import random_models

    model = random_models.small(request.param)
    tlora = random_models.random_tlora(model, RANK, MIN_RANK, size=0.3, split=("qkv", "linear1"))
    return model, tlora, [random_models.conditioning(model, 6, seed) for seed in (1, 2)]


def sample(model, texts, **options):
    import random_models

    return runs.sample(model, *texts, latent=random_models.latent(model), **options)


def test_rows_that_differ_in_their_timestep_are_each_as_if_alone(family):
    model, tlora, texts = family
    recorded = runs.Evaluations(model)
    patched = runs.apply(recorded.model, tlora)
    sample(patched, texts, steps=1)
    x, sigma, (c_concat, text, _, _), kwargs, _ = recorded.calls[0]
    sigmas = torch.stack([sigma[0], model.model.model_sampling.sigmas[200]])

    def evaluate(sigmas):
        with torch.inference_mode():
            return model.model.apply_model(x, sigmas, c_concat, text, None, {"wrappers": patched.wrappers}, **kwargs)

    together = evaluate(sigmas)
    for i in range(2):
        assert models.relative_error(together[i], evaluate(sigmas[i].repeat(2))[i]) < 1e-5
