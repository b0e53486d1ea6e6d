"""Layers that the host runs while it prepares the conditioning, and layers that it does not call at all."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sampling_runs as runs
import torch

# By family: where its layers outside of the evaluations are.
OUTSIDE = {"anima": "llm_adapter.", "ltxav": "_connector.", "minimax-h3": "token_refiner."}


@pytest.fixture(scope="module", params=OUTSIDE)
def family(request, comfy):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    import random_models

    return random_models.small(family)


@pytest.fixture(scope="module")
def anima(comfy):
    import random_models

    return random_models.small("anima")


def linear_shapes(model, *parts, without=()):
    """(out, in) of the linear layers whose path holds all of `parts` and none of `without`."""
    return {
        path: (m.out_features, m.in_features)
        for path, m in model.model.diffusion_model.named_modules()
        if isinstance(m, torch.nn.Linear)
        and all(part in path for part in parts)
        and not any(part in path for part in without)
    }


def random_file(model, shapes, rank=4, min_rank=4, seed=0):
    import random_models

    return random_models.random_tlora(model, rank, min_rank, size=0.5, seed=seed, shapes=shapes)


def outside_file(model, family="anima", **options):
    return random_file(model, linear_shapes(model, OUTSIDE[family], "attn"), **options)


def sampled(model) -> torch.Tensor:
    """What the host draws, flat."""
    import random_models

    texts = [random_models.conditioning(model, 6, seed) for seed in (1, 2)]
    latent = random_models.own_latent(model)
    drawn = runs.sample(model, *texts, latent=latent, scheduler="simple", steps=2)
    return torch.cat([part.flatten() for part in drawn.unbind()]) if drawn.is_nested else drawn.flatten()


def with_hosts_loader(model, tlora, path, strength=1.0):
    import comfy.sd
    import comfy.utils

    tlora.save(path, torch.float32)
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), strength, 0)[0]


def difference(a, b) -> float:
    return float((a - b).norm() / b.norm())


def test_they_act_with_their_full_rank_as_in_the_hosts_loader(model, family, tmp_path):
    tlora = outside_file(model, family, min_rank=1)  # which the host's loader does not know
    base, own = sampled(model), dict(vars(model.model))
    expected = sampled(with_hosts_loader(model, tlora, tmp_path / "outside.safetensors", 0.7))
    assert difference(expected, base) > 1e-3
    assert difference(sampled(runs.apply(model, tlora, 0.7)), expected) < 1e-5
    assert torch.equal(sampled(model), base) and "extra_conds" not in own.keys() | vars(model.model).keys()


def test_those_inside_follow_the_noise_level_beside_them(anima, tmp_path):
    inside = random_file(anima, linear_shapes(anima, "attn", without=["llm_adapter"]), rank=6, min_rank=1, seed=1)
    outside = outside_file(anima)
    both = replace(inside, layers={**inside.layers, **outside.layers})
    expected = sampled(runs.apply(with_hosts_loader(anima, outside, tmp_path / "outside.safetensors"), inside))
    assert difference(sampled(runs.apply(anima, both)), expected) < 1e-5
    assert difference(sampled(runs.apply(runs.apply(anima, inside), outside)), expected) < 1e-5


def test_user_is_told_once_of_layers_with_full_rank(anima, caplog):
    told = []
    with caplog.at_level(logging.INFO):
        model = runs.apply(anima, outside_file(anima), tell=told.append)
        assert not told  # known only once the model runs
        sampled(model)
        sampled(model)
    (sentence,) = told
    assert sentence.startswith("Full rank at every step for") and "llm_adapter.blocks.0" in sentence
    assert caplog.text.count(sentence) == 1
    assert f"{len(outside_file(anima).layers)} layers" in sentence


def test_node_shows_it_below_what_it_shows_already(anima, monkeypatch):
    from server import PromptServer

    from tlora_core.hosts.comfy.progress import adding_to

    shown = []
    page = SimpleNamespace(send_progress_text=lambda text, node: shown.append((node, text)))
    monkeypatch.setattr(PromptServer, "instance", page, raising=False)
    for report, start in (("the file's report", "the file's report\nFull rank"), ("", "Full rank")):
        sampled(runs.apply(anima, outside_file(anima), tell=adding_to(report, "7")))
        ((node, text),) = shown
        assert node == "7" and text.startswith(start)
        shown.clear()


def test_file_whose_layers_all_follow_the_noise_level_says_nothing(unet, tlora, caplog):
    told = []
    runs.sample(runs.apply(unet, tlora, tell=told.append), *runs.texts(), steps=1)
    assert not told and "[T-LoRA]" not in caplog.text


def test_layer_that_the_model_does_not_call_is_named_once(unet, tlora, caplog):
    network = unet.model.diffusion_model
    network.idle = torch.nn.Linear(8, 8)
    told = []
    try:
        shapes = {name: (layer.up.shape[0], layer.down.shape[1]) for name, layer in tlora.layers.items()}
        model = runs.apply(unet, random_file(unet, {**shapes, "idle": (8, 8)}), tell=told.append)
        runs.sample(model, *runs.texts(), steps=2)
        runs.sample(model, *runs.texts(), steps=1)
    finally:
        del network.idle
    (sentence,) = told
    assert sentence.startswith("No effect from 1 layer (idle)") and caplog.text.count(sentence) == 1


@pytest.mark.parametrize(("is_compiled", "hooks"), [(False, [1, 0, 0]), (True, [0, 0, 0])])
def test_only_the_first_evaluation_is_watched_and_none_of_a_compiled_model(
    unet, tlora, monkeypatch, is_compiled, hooks
):
    from tlora_core.hosts.comfy import sampling

    monkeypatch.setattr(sampling, "is_compiled", lambda *_: is_compiled)
    layer = unet.model.diffusion_model.get_submodule(next(iter(tlora.layers)))
    watched = []

    def note(executor, *args, **kwargs):
        watched.append(len(layer._forward_pre_hooks))
        return executor(*args, **kwargs)

    model = runs.apply(unet, tlora)
    model.add_wrapper_with_key("apply_model", "note", note)
    runs.sample(model, *runs.texts(), steps=3)
    assert watched == hooks and not layer._forward_pre_hooks


def test_model_is_restored_when_a_sampling_is_cancelled(anima):
    from comfy.model_management import InterruptProcessingException

    def cancel(*_):
        raise InterruptProcessingException

    model = runs.apply(anima, outside_file(anima))
    layer = anima.model.diffusion_model.get_submodule(next(iter(outside_file(anima).layers)))
    hook, before = layer.register_forward_pre_hook(cancel), anima.model.extra_conds
    try:
        with pytest.raises(InterruptProcessingException):
            sampled(model)
    finally:
        hook.remove()
    assert anima.model.extra_conds == before and "forward" not in vars(layer) and not layer._forward_pre_hooks


def test_method_of_another_node_is_used_and_kept(anima):
    base = sampled(anima)
    other = anima.clone()
    own = anima.model.extra_conds
    calls = []

    def extra_conds(**kwargs):
        calls.append(1)
        return own(**kwargs)

    other.add_object_patch("extra_conds", extra_conds)
    with_ours = sampled(runs.apply(other, outside_file(anima)))
    assert calls and difference(with_ours, sampled(runs.apply(anima, outside_file(anima)))) < 1e-6
    assert torch.equal(sampled(anima), base)
    assert anima.model.extra_conds == own  # which the host has put there itself


def denoiser_on(model, shapes, latent, conditioning):
    from tlora_core import RankSchedule, make_adapters
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.training.config import TrainConfig

    adapters = make_adapters("lora", "last_random", shapes, 2, 0)
    sample = Sample(latent, None, None, conditioning)
    return HostDenoiser(model, adapters, RankSchedule(2, 2), [sample], TrainConfig())


def test_training_refuses_layers_of_which_the_model_calls_none(unet):
    from tlora_core.errors import TLoRAError

    network = unet.model.diffusion_model
    network.idle = torch.nn.Linear(8, 8)
    try:
        with pytest.raises(TLoRAError, match=r"layers has 1 layer \(idle\) that this model does not call"):
            first_loss(unet, {"idle": (8, 8)})
    finally:
        del network.idle


def test_training_names_layers_that_the_model_does_not_call(unet, tlora, caplog):
    network = unet.model.diffusion_model
    network.idle = torch.nn.Linear(8, 8)
    try:
        path = next(iter(tlora.layers))
        first_loss(unet, {path: linear_shapes(unet, path)[path], "idle": (8, 8)})
    finally:
        del network.idle
    assert caplog.text.count("layers has 1 layer (idle) that this model does not call") == 1


def first_loss(model, shapes):
    from tlora_core.hosts.comfy.training.session import training_session

    with torch.inference_mode(), training_session(model):
        denoiser = denoiser_on(model, shapes, torch.zeros(16, 8, 8), runs.texts()[0])
        next(denoiser.losses([0], torch.Generator().manual_seed(1)))
        next(denoiser.losses([0], torch.Generator().manual_seed(1)))


def test_training_sees_the_text_as_a_tlora_beneath_makes_it(anima):
    import random_models

    from tlora_core.hosts.comfy.training.session import training_session

    latent, conditioning = random_models.own_latent(anima)[0], random_models.conditioning(anima, 6)
    texts = []
    for model in (anima, runs.apply(anima, outside_file(anima))):
        with torch.inference_mode(), training_session(model):
            denoiser = denoiser_on(model, linear_shapes(anima, "blocks.0.self_attn.q"), latent, conditioning)
            texts.append(denoiser._condition(denoiser.samples[0], latent[None])["c_crossattn"].cond)
    assert difference(texts[1], texts[0]) > 1e-3


def test_training_asked_for_layers_outside_says_that_they_learn_nothing(anima, caplog):
    import random_models

    from tlora_core.hosts.comfy.training.session import training_session

    latent, conditioning = random_models.own_latent(anima)[0], random_models.conditioning(anima, 6)
    shapes = linear_shapes(anima, "blocks.0.", "q_proj")
    assert any("llm_adapter" in path for path in shapes) and not all("llm_adapter" in path for path in shapes)
    with torch.inference_mode(), training_session(anima):
        denoiser = denoiser_on(anima, shapes, latent, conditioning)
        with torch.no_grad():  # the host's rotation has no backward pass
            next(denoiser.losses([0], torch.Generator().manual_seed(1)))
    assert "layers has 2 layers (llm_adapter.blocks.0.cross_attn.q_proj" in caplog.text
    assert "they learn nothing" in caplog.text
