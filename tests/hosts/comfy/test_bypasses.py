"""Ways of the host that leave a layer's forward out: its fused activation, and its compiler."""

import json
from types import SimpleNamespace

import pytest
import sampling_runs as runs
import torch


def quantised_in_eight_bits(network, paths) -> dict[str, torch.Tensor]:
    """The state dict with these layers in int8, a scale each, as the host's files have them."""
    weights = network.state_dict()
    note = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    for path in paths:
        weight = weights[f"{path}.weight"]
        scale = weight.abs().max() / 127
        eight = (weight / scale).round().to(torch.int8)
        weights.update({f"{path}.weight": eight, f"{path}.weight_scale": scale, f"{path}.comfy_quant": note})
    return weights


def drawn(model) -> torch.Tensor:
    import random_models

    texts = [random_models.conditioning(model, 6, seed) for seed in (1, 2)]
    latent = runs.sample(model, *texts, latent=random_models.own_latent(model), scheduler="simple", steps=2)
    return torch.cat([part.flatten() for part in latent.unbind()])


def test_tlora_on_int8_feed_forward_layers_acts(comfy):
    import random_models

    plain = random_models.small("minimax-h3")
    network = plain.model.diffusion_model
    paths = [path for path, _ in network.named_modules() if path.endswith("mlp.fc2")]
    with torch.inference_mode():  # as in the host
        model = random_models.small("minimax-h3", quantised=quantised_in_eight_bits(network, paths))
    layers = {path: network.get_submodule(path) for path in paths}
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    tlora = random_models.random_tlora(model, 4, 2, size=0.5, shapes=shapes)
    base, told = drawn(model), []
    adapted = drawn(runs.apply(model, tlora, tell=told.append))
    # The same T-LoRA on the weights before they were rounded to eight bits.
    expected, before = drawn(runs.apply(plain, tlora)), drawn(plain)
    effect = (adapted - base).norm() / base.norm()
    assert effect > 0.01
    assert ((adapted - base) - (expected - before)).norm() / (expected - before).norm() < 0.3
    assert torch.equal(drawn(model), base)
    assert not any(sentence.startswith("No effect") for sentence in told)


def fused_for_all_weights(linear, x, input_act, act_weight=None, act_eps=0.0, residual=None, residual_scale=None):
    """A stand-in for hosts that fuse plain weights too; like theirs, it calls a layer that must keep full precision."""
    x = torch.nn.functional.gelu(x, approximate="tanh") if input_act == "gelu_tanh" else x
    if getattr(linear, "_full_precision_mm", False):
        output = linear(x)
    else:
        output = torch.nn.functional.linear(x, linear.weight, linear.bias)
    return output if residual is None else torch.addcmul(residual, output, residual_scale)


def test_newer_fused_function_calls_adapted_layers_and_no_others(comfy, monkeypatch):
    import comfy.ops

    from tlora_core.hosts.comfy.model.bypasses import call_layers_with_adapters
    from tlora_core.layers.overlay import replaced_forward

    monkeypatch.setattr(comfy.ops, "linear_input_act", fused_for_all_weights)
    call_layers_with_adapters()
    call_layers_with_adapters()
    assert comfy.ops.linear_input_act.__wrapped__ is fused_for_all_weights, "once"
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 8), torch.randn(3, 8)
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    before = comfy.ops.linear_input_act(layer, x, "gelu_tanh", residual=x, residual_scale=x)
    assert not calls and torch.equal(before, fused_for_all_weights(layer, x, "gelu_tanh", residual=x, residual_scale=x))
    with replaced_forward() as replace:
        replace(layer, lambda x: torch.ones_like(x))
        assert torch.equal(comfy.ops.linear_input_act(layer, x, "gelu_tanh"), torch.ones_like(x)) and calls == [1]
        assert torch.equal(comfy.ops.linear_input_act(layer, x, None, None, 0.0, x, x), x + x)


def test_host_without_fused_function_is_left_alone(comfy, monkeypatch):
    import comfy.ops

    from tlora_core.hosts.comfy.model.bypasses import call_layers_with_adapters

    monkeypatch.delattr(comfy.ops, "linear_input_act")
    call_layers_with_adapters()
    assert not hasattr(comfy.ops, "linear_input_act")


@pytest.fixture
def args(comfy, monkeypatch):
    """The host's arguments, with the one that newer hosts have for their compiler."""
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_comfy_compiler", False, raising=False)
    return args


def test_compiler_is_off_while_a_tlora_samples(unet, tlora, args):
    seen = []

    def note(executor, *arguments, **options):
        seen.append(args.disable_comfy_compiler)
        return executor(*arguments, **options)

    for model in (runs.apply(runs.apply(unet, tlora), tlora), unet.clone()):
        model.add_wrapper_with_key("apply_model", "note", note)
        runs.sample(model, *runs.texts(), steps=2)
        assert args.disable_comfy_compiler is False
    assert seen == [True, True, False, False]


def test_compiler_is_on_again_after_an_error(unet, tlora, args):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    model = runs.apply(unet, tlora)
    model.add_wrapper_with_key("apply_model", "fail", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        runs.sample(model, *runs.texts(), steps=2)
    assert args.disable_comfy_compiler is False


def test_compiler_is_off_in_a_training(unet, args):
    from tlora_core.hosts.comfy.training.session import training_session

    with training_session(unet):
        assert args.disable_comfy_compiler is True
    assert args.disable_comfy_compiler is False


def test_host_without_compiler_gets_no_such_argument(comfy, monkeypatch):
    import comfy.cli_args

    from tlora_core.hosts.comfy.model.bypasses import without_compiler

    monkeypatch.setattr(comfy.cli_args, "args", SimpleNamespace(cpu=True))
    with without_compiler():
        assert vars(comfy.cli_args.args) == {"cpu": True}
    assert vars(comfy.cli_args.args) == {"cpu": True}
