"""Training and sampling on a device whose values cannot be read: PyTorch's "meta", in place of a GPU.

An operation on tensors of two devices fails there as on a GPU, and so does everything that has to wait for a value. No
kernels run.
"""

import copy
import sys

import pytest
import torch
from places import REPO
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(REPO / "benchmarks"))
import memory  # noqa: E402
from memory import META  # noqa: E402


@pytest.fixture
def unreadable(comfy):
    """The host and the trainer work on META: nothing is loaded, kept as a fallback, or read at the end of a step."""
    with memory.host_on_meta():
        yield


def small_model(kind, **options):
    import random_models

    options = {"dtype": torch.bfloat16, "device": META, **options}
    return {
        "sdxl": lambda: random_models.sdxl(64, (0, 1, 1), 64, **options),
        "flux": lambda: random_models.flux(256, (2, 3), 64, 32, **options),
        "sd3": lambda: random_models.small("sd3", **options),
    }[kind]()


def train(model, batch, checkpointing, prior, method=None, **config):
    import random_models

    from tlora_core import RankSchedule
    from tlora_core.hosts.comfy.model.defaults import defaults_for
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.hosts.comfy.training.session import training_session
    from tlora_core.training.config import TrainConfig
    from tlora_core.training.trainer import Trainer

    memory.move(model)
    adapters = memory.adapters_on_meta(model, method or defaults_for(model).method, 8)
    channels = model.model.latent_format.latent_channels
    mean, weights = torch.zeros(channels, 16, 16), torch.ones(16, 16)
    texts = [random_models.conditioning(model, 7, seed=i) for i in range(batch + 1)]
    samples = [Sample(mean, mean + 1, weights, text, texts[-1]) for text in texts[:-1]]
    config = TrainConfig(steps=3, batch_size=batch, prior_weight=float(prior), **config)
    trainer = Trainer(adapters, config)
    trainer.step = 1  # the first step's loss is read, to record the start as a good state
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


@pytest.mark.parametrize(
    "config",
    [
        {"min_snr_gamma": 5.0},
        {"orthogonality": 0.1},
        {"max_grad_norm": 1.0},
        {"ema_decay": 0.9},
        {"gradient_accumulation": 2},
        {"fresh_latents": False, "noise_from": 0.2},
        {"lr_schedule": "cosine"},
        {"preservation_weight": 1.0},
    ],
    ids=lambda config: next(iter(config)),
)
def test_nor_does_it_with_other_settings(unreadable, config):
    prior = "preservation_weight" not in config  # only one of the two can be on
    train(small_model("sdxl"), 2, False, prior=prior, method="tlora", **config)


class Transfers(TorchDispatchMode):
    """Counts tensors that move from the CPU to META. Each of them makes a GPU wait, or takes time to prepare."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and kwargs.get("device") == META:
            self.count += 1
        return func(*args, **kwargs)


def test_samples_of_mixed_ranks_send_them_once_for_all_layers(unreadable):
    import random_models

    counted = []
    for blocks in ((0, 1, 1), (0, 2, 3)):
        with Transfers() as transfers:
            train(random_models.sdxl(64, blocks, 64, dtype=torch.bfloat16, device=META), 2, False, prior=False)
        counted.append(transfers.count)
    assert counted[0] == counted[1]


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "beside"])
@pytest.mark.parametrize("kind", ["sdxl", "flux", "sd3"])
def test_evaluations_of_a_sampling_meet_on_one_device(unreadable, monkeypatch, kind, fold):
    """A sampling reads the noise level, here from the CPU, and at most once whether the text is the same as in the
    evaluation before."""
    import random_models

    from tlora_core.hosts.comfy import sampling

    model = small_model(kind)
    memory.move(model)
    patched = sampling.apply_tlora(model, random_models.random_tlora(model, 8, 4), fold=fold)
    levels = iter((0.9, 0.5, 0.1))
    monkeypatch.setattr(sampling, "noise_level", lambda *args: (torch.full((2,), next(levels)), 1.0))
    compared = []
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a) or True)
    base, (text, pooled) = model.model, random_models.conditioning(model, 7)[0]
    inputs = {
        name: cond.cond.to(META)
        for name, cond in base.extra_conds(
            cross_attn=text.expand(2, -1, -1),
            noise=torch.zeros(2, base.latent_format.latent_channels, 16, 16),
            device="cpu",
            **{key: value.expand(2, -1) if isinstance(value, torch.Tensor) else value for key, value in pooled.items()},
        ).items()
    }
    base.model_sampling.to(META)
    base.current_patcher = patched
    x = torch.zeros(2, base.latent_format.latent_channels, 16, 16, device=META)
    with torch.inference_mode():
        for _ in range(3):
            out = base.apply_model(
                x, torch.ones(2, device=META), transformer_options={"wrappers": patched.wrappers}, **inputs
            )
            assert out.device == META
    assert bool(sampling.Folds.of(base).layers) is fold and len(compared) == (2 if fold and kind == "sdxl" else 0)


@pytest.mark.parametrize("storage", [None, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_a_step_leaves_nothing_behind_but_gradients_and_the_optimizers_state(unreadable, kind, storage):
    """Whatever a step keeps is still there in the next step, beside everything that one needs."""
    counted = {way: memory.step(small_model(kind, storage=storage), 7, 32, 8, way) for way in ("fast", "low")}
    for each in counted.values():
        assert each["own"] <= each["after"] < each["own"] + 60_000
        assert each["weights"] < each["own"] < each["peak"]
    plain, checkpointed = (counted[key]["peak"] - counted[key]["own"] for key in ("fast", "low"))
    assert checkpointed < plain / 2 and counted["low"]["kernels"] > counted["fast"]["kernels"]


def test_memory_is_counted_while_it_lives():
    before = torch.empty(100, device=META)
    with memory.Counter([before]) as counter:
        a = torch.empty(1000, device=META)
        assert (counter.live, counter.kernels) == (4400, 0)
        b = a.view(10, 100).t() * 2
        del b
        assert (counter.live, counter.peak, counter.kernels) == (4400, 8400, 1)
        torch.empty(5000)
    assert counter.live == 4400, "the CPU's memory is another's"
