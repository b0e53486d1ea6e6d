"""Training and sampling on a device whose numbers cannot be read: PyTorch's "meta", in a GPU's place.

An operation on tensors of two devices fails on it as on a GPU, and so does whatever has to wait for a number. Kernels are not run.
"""
import copy

import pytest
import torch

META = torch.device("meta")


@pytest.fixture
def unreadable(comfy, monkeypatch):
    """Lets the host and the trainer work on META: nothing is loaded, kept to fall back on, or read at the end of a step."""
    import comfy.model_management

    from tlora_core.trainer import Reading, Trainer

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
    monkeypatch.setattr(comfy.model_management, "get_free_memory",
                        lambda device=None, torch_free_too=False: (1 << 40, 1 << 40) if torch_free_too else 1 << 40)
    monkeypatch.setattr(Trainer, "_keep_as_good", lambda trainer: None)
    monkeypatch.setattr(Reading, "value", lambda reading: 0.1)


def small_model(kind):
    import random_models

    return {"sdxl": lambda: random_models.sdxl(64, (0, 1, 1), 64, dtype=torch.bfloat16),
            "flux": lambda: random_models.flux(256, (2, 3), 64, 32, dtype=torch.bfloat16),
            "sd3": lambda: random_models.small("sd3")}[kind]()


def move(model):
    """All of a MODEL to META, but for its table of noise levels, which the denoiser copies to the CPU beforehand."""
    levels, model.model.model_sampling = model.model.model_sampling, torch.nn.Identity()
    model.model.to(META)
    model.model.model_sampling, model.model.device, model.load_device = levels, META, META


def train(model, batch, checkpointing, prior, method=None, **config):
    import random_models

    from tlora_core import RankSchedule, make_adapters
    from tlora_core.comfy_host.denoiser import HostDenoiser
    from tlora_core.comfy_host.encode import Sample
    from tlora_core.comfy_host.families import defaults_for, target_layers
    from tlora_core.comfy_host.training import training_session
    from tlora_core.config import TrainConfig
    from tlora_core.trainer import Trainer

    move(model)
    shapes = {name: layer.shape for name, layer in target_layers(model).items()}
    adapters = make_adapters(method or defaults_for(model).method, "last_random", shapes, 8, 0)
    for adapter in adapters.values():
        adapter.to(META)
    channels = model.model.latent_format.latent_channels
    mean, weights = torch.zeros(channels, 16, 16), torch.ones(16, 16)
    samples = [Sample(mean, mean + 1, weights, random_models.conditioning(model, 7, seed=i)) for i in range(batch)]
    config = TrainConfig(steps=3, batch_size=batch, prior_weight=float(prior), **config)
    trainer = Trainer(adapters, config)
    trainer.step = 1  # the first step's loss is read, to keep the start as good
    with training_session(model, checkpointing):
        denoiser = HostDenoiser(model, adapters, RankSchedule(8, 4), samples, config, samples[:1] if prior else ())
        model.model.model_sampling = copy.deepcopy(model.model.model_sampling).to(META)
        denoiser.sampling = model.model.model_sampling
        trainer.run(denoiser, 3)
    assert trainer.step == 3 and len(trainer.losses) == 2
    assert all(p.grad.device == META for p in trainer.parameters)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["sdxl", "flux", "sd3"])
def test_a_step_meets_on_one_device_and_waits_for_nothing(unreadable, kind, batch, checkpointing):
    train(small_model(kind), batch, checkpointing, prior=False)


@pytest.mark.parametrize("config", [
    {"min_snr_gamma": 5.0}, {"orthogonality": 0.1}, {"max_grad_norm": 1.0}, {"ema_decay": 0.9}, {"gradient_accumulation": 2},
    {"fresh_latents": False, "noise_from": 0.2}, {"lr_schedule": "cosine"}], ids=lambda config: next(iter(config)))
def test_nor_does_it_with_other_settings(unreadable, config):
    train(small_model("sdxl"), 2, False, prior=True, method="tlora", **config)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "beside"])
@pytest.mark.parametrize("kind", ["sdxl", "flux", "sd3"])
def test_evaluations_of_a_sampling_meet_on_one_device(unreadable, monkeypatch, kind, fold):
    """A sampling reads the noise level, here from the CPU, and at most once whether the text is that of the evaluation before."""
    import random_models

    from tlora_core.comfy_host import sampling

    model = small_model(kind)
    move(model)
    patched = sampling.apply_tlora(model, random_models.random_tlora(model, 8, 4), fold=fold)
    levels = iter((0.9, 0.5, 0.1))
    monkeypatch.setattr(sampling, "noise_level", lambda *args: (torch.full((2,), next(levels)), 1.0))
    compared = []
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a) or True)
    base, (text, pooled) = model.model, random_models.conditioning(model, 7)[0]
    inputs = {name: cond.cond.to(META) for name, cond in base.extra_conds(
        cross_attn=text.expand(2, -1, -1), noise=torch.zeros(2, base.latent_format.latent_channels, 16, 16), device="cpu",
        **{key: value.expand(2, -1) if isinstance(value, torch.Tensor) else value for key, value in pooled.items()}).items()}
    base.model_sampling.to(META)
    base.current_patcher = patched
    x = torch.zeros(2, base.latent_format.latent_channels, 16, 16, device=META)
    with torch.inference_mode():
        for _ in range(3):
            out = base.apply_model(x, torch.ones(2, device=META), transformer_options={"wrappers": patched.wrappers}, **inputs)
            assert out.device == META
    assert bool(sampling.Folds.of(base).layers) is fold and len(compared) == (2 if fold and kind == "sdxl" else 0)
