"""A T-LoRA on each family of models, small and random, in the host's own classes."""

import host_models as models
import pytest
import sampling_runs as runs
import torch

RANK, MIN_RANK = 16, 4
# Family: (what its timesteps are, whether the text's keys and values are computed once).
FAMILIES = {
    "sd15": ("discrete", True),
    "sd2": ("discrete", True),
    "sdxl-refiner": ("discrete", True),
    "ssd-1b": ("discrete", True),
    "sd3": ("flow", False),
    "flux": ("flow", False),
    "chroma": ("flow", False),
    "lumina2": ("flow", False),
    "z-image": ("flow", False),
    "qwen-image": ("flow", False),
    "krea2": ("flow", False),
    "wan": ("flow", False),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, comfy):
    """(name, MODEL, its T-LoRA, positive and negative text)."""
    import random_models

    model = random_models.small(request.param)
    tlora = random_models.random_tlora(model, RANK, MIN_RANK, size=0.3, split=("qkv", "linear1"))
    return request.param, model, tlora, [random_models.conditioning(model, 6, seed) for seed in (1, 2)]


def sample(model, texts, **options):
    import random_models

    return runs.sample(model, *texts, latent=random_models.latent(model), **options)


def test_each_evaluation_is_that_of_merged_weights_in_either_way(family, monkeypatch):
    name, model, tlora, texts = family
    domain, has_text = FAMILIES[name]
    assert tlora.noise_domain == domain
    pictures = []
    for fold, wanted in ((None, {"weight"} | ({"output"} if has_text else set())), (False, {"product"})):
        recorded, ways = runs.Evaluations(model), runs.Ways(monkeypatch)
        pictures.append(sample(runs.apply(recorded.model, tlora, -0.8, fold=fold), texts))
        monkeypatch.undo()
        assert ways.used == wanted
        recorded.assert_merged((tlora, -0.8))
    assert models.relative_error(*pictures) < 1e-5
    assert models.relative_error(pictures[0], sample(model, texts)) > 1e-3


def test_rows_that_differ_in_their_timestep_are_each_as_if_alone(family):
    name, model, tlora, texts = family
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
