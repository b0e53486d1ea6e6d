"""What a training step is said to keep, against what it keeps."""
import pytest
import torch


def denoiser_for(model, channels, side):
    import random_models

    from tlora_core import RankSchedule, make_adapters
    from tlora_core.comfy_host.denoiser import HostDenoiser
    from tlora_core.comfy_host.encode import Sample
    from tlora_core.comfy_host.families import target_layers
    from tlora_core.config import TrainConfig

    shapes = {name: layer.shape for name, layer in target_layers(model).items()}
    adapters = make_adapters("tlora", "last_random", shapes, 8, 0)
    sample = Sample(torch.zeros(channels, side, side), None, None, random_models.conditioning(model, 20))
    return HostDenoiser(model, adapters, RankSchedule(8, 4), [sample], TrainConfig())


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_it_is_foretold_from_small_pictures(comfy, name):
    import random_models

    from tlora_core.comfy_host.memory import _Kept, training_memory
    from tlora_core.comfy_host.training import checkpointed, training_session

    model = {"sdxl": lambda: random_models.sdxl(64, (0, 1, 1), 64), "flux": lambda: random_models.flux(256, (2, 3), 64, 32),
             "sd3": lambda: random_models.small("sd3")}[name]()
    with training_session(model):
        denoiser = denoiser_for(model, 4 if name == "sdxl" else 16, 48)
        said = training_memory(denoiser, 2)
        latents, sigmas = torch.zeros(2, *denoiser.samples[0].shape), torch.ones(2)
        with _Kept(model.model.diffusion_model) as kept:
            denoiser.output_error(denoiser.samples * 2, latents, latents, sigmas)
        assert said.plain == pytest.approx(kept.need().plain, rel=0.1)
        with checkpointed(model), torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            seen = []
            denoiser.output_error(denoiser.samples * 2, latents, latents, sigmas)
    weights = {p.data_ptr() for p in model.model.diffusion_model.parameters()}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen if t.data_ptr() not in weights}
    assert sum(held.values()) < 1.1 * said.checkpointed < said.plain


def test_checkpointing_is_chosen_when_memory_is_short(comfy, monkeypatch):
    import comfy.model_management
    import random_models

    from tlora_core.comfy_host.memory import should_checkpoint, training_memory
    from tlora_core.comfy_host.training import training_session

    model = random_models.flux(256, (1, 1), 64, 32)
    with training_session(model):
        denoiser = denoiser_for(model, 16, 32)
        need = training_memory(denoiser, 1).plain + 3 * denoiser.adapter_bytes
        for free, wanted in ((2 * need, False), (need, True)):
            monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device, free=free: free)
            assert should_checkpoint(denoiser, 1) is wanted
