"""Gradients of adapters on the host's own models: its blocks write in place, and what is computed again for a backward
pass starts from what was written there. tests/hosts/comfy/test_every_family.py compares each family's with finite
differences."""

import pytest
import torch
from gradients import ALIKE, MIXED, Setting, saved_bytes

FAMILIES = ["sd15", "sdxl", "sd3", "flux", "chroma", "lumina2", "z-image", "qwen-image", "krea2", "wan"]
SOME = ["sdxl", "sd3", "flux"]


@pytest.mark.parametrize("input_scale", [None, 0.5])
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_gradients_on_quantised_layers_are_those_on_their_values(comfy, family, input_scale):
    import comfy.quant_ops
    import random_models

    if input_scale and "pre_quant_scale" not in comfy.quant_ops.QUANT_ALGOS["nvfp4"]["parameters"]:
        pytest.skip("This ComfyUI's layers do not scale their input.")
    worth = random_models.small(family)
    with torch.inference_mode():
        quantised = random_models.small(family, quantised=random_models.quantise(worth))
    for path, layer in random_models.attention_layers(quantised).items():
        if input_scale:
            layer.pre_quant_scale = torch.full((layer.in_features,), input_scale)
            random_models.attention_layers(worth)[path].weight.mul_(input_scale)
    found = []
    for model in (quantised, worth):
        setting = Setting(family, torch.float32, model=model)
        for checkpointing in (False, True):
            with setting.session(checkpointing):
                found.append(torch.cat([gradient.flatten() for gradient in setting.gradients(MIXED)]))
    for got, wanted in zip(found, found[2:]):
        assert (got - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient_and_saves_memory(comfy, family):
    from tlora_core.hosts.comfy.training.session import checkpointed

    setting, kept = Setting(family), []
    with setting.session():
        plain = setting.gradients(ALIKE)
        kept.append(saved_bytes(setting))
        with checkpointed(setting.model):
            for _ in range(2):  # the first call finds out what a block overwrites
                for one, other in zip(plain, setting.gradients(ALIKE)):
                    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
            kept.append(saved_bytes(setting))
    assert kept[1] < kept[0] * 0.6


def test_what_is_computed_again_has_the_ranks_it_had(comfy):
    """Other evaluations, with other ranks, may come between a forward pass and its backward pass."""
    setting = Setting("flux")
    with setting.session(checkpointing=True):
        wanted = [g.clone() for g in setting.gradients(MIXED)]
        for parameter in setting.parameters:
            parameter.grad = None
        loss = setting.loss(MIXED)
        with torch.no_grad():
            setting.loss(ALIKE)
        setting.loss((0.05, 0.05))
        loss.backward()
    for one, parameter in zip(wanted, setting.parameters):
        assert torch.equal(one, parameter.grad)


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_weights_that_are_cast_for_each_use_are_not_kept(comfy, family, storage):
    full, cast = Setting(family, torch.float32), Setting(family, torch.float32, storage)
    with torch.no_grad():
        for one, other in zip(
            full.model.model.diffusion_model.parameters(), cast.model.model.diffusion_model.parameters()
        ):
            one.copy_(other.float())
    with full.session():
        wanted, needed = full.gradients(ALIKE), saved_bytes(full)
    with cast.session():
        got, kept = cast.gradients(ALIKE), saved_bytes(cast)
    for one, other in zip(wanted, got):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5 * float(one.abs().max()))
    assert kept < 1.01 * needed


@pytest.mark.parametrize("family", SOME)
def test_nothing_is_left_on_the_model_after_an_error_in_a_backward_pass(comfy, family):
    setting = Setting(family, torch.float32)
    network = setting.model.model.diffusion_model
    before = {k: (v.clone(), v.data_ptr()) for k, v in network.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError), setting.session(checkpointing=True):
        loss = setting.loss(ALIKE)
        last = next(reversed(setting.layers.values())).module
        handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("injected")))
        try:
            loss.backward()
        finally:
            handle.remove()
    assert not [m for m in network.modules() if "forward" in m.__dict__]
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key][0]) and value.data_ptr() == before[key][1]
