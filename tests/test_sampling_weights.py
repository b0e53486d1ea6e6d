"""A T-LoRA on weights that the host casts, quantises, streams, compiles or copies to another device."""
import json

import host_models as models
import pytest
import sampling_runs as runs
import torch

RANK, MIN_RANK = 16, 4


@pytest.fixture(scope="module")
def unet(comfy):
    return models.random_unet()


@pytest.fixture(scope="module")
def tlora(unet):
    return models.random_tlora(unet, RANK, MIN_RANK)


def texts():
    return models.conditioning(1), models.conditioning(2)


def apply(model, tlora, **options):
    from tlora_core.comfy_host.sampling import apply_tlora

    return apply_tlora(model, tlora, **options)


@pytest.fixture(scope="module")
def flux(comfy):
    """(MODEL, T-LoRA, texts) of a model with few layers."""
    import random_models

    model = random_models.flux(256, (1, 1), 64, 32)
    tlora = random_models.random_tlora(model, RANK, MIN_RANK, size=0.3)
    return model, tlora, tuple(random_models.conditioning(model, 6, seed) for seed in (1, 2))


@pytest.fixture
def compiled(monkeypatch):
    """model -> a clone as the host's TorchCompileModel node makes it, with a backend that needs no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    torch._dynamo.reset()
    yield lambda model, keys=("diffusion_model",), backend="eager": (
        clone := model.clone(),
        set_torch_compile_wrapper(clone, backend, {"guard_filter_fn": skip_torch_compile_dict}, keys=list(keys)))[0]
    torch._dynamo.reset()


class TestCompiled:
    @pytest.mark.parametrize("part", ["diffusion_model", "diffusion_model.double_blocks.0"])
    @pytest.mark.parametrize("first", ["compile", "tlora"])
    def test_every_evaluation_has_its_rank(self, flux, compiled, part, first, monkeypatch):
        model, tlora, texts = flux
        recorded, ways = runs.Evaluations(model), runs.Ways(monkeypatch)
        both = (apply(compiled(recorded.model, [part]), tlora) if first == "compile" else
                compiled(apply(recorded.model, tlora), [part]))
        runs.sample(both, *texts, steps=4)
        monkeypatch.undo()
        assert ways.used == {"product"} and len(set(recorded.sigmas)) == 4
        recorded.assert_merged((tlora, 1.0))
