"""Gradients of adapters on the host's own models, against finite differences in float64: its blocks write in place, and what is
computed again for a backward pass starts from what was written there."""
import pytest
import torch

DOUBLE = torch.float64
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": [1, 1],
    "use_spatial_transformer": True, "context_dim": 24, "use_temporal_attention": False, "use_temporal_resblock": False,
    "legacy": False,
}
SD15 = {**UNET, "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1],
        "use_linear_in_transformer": False, "num_classes": None, "adm_in_channels": None}
SDXL = {**UNET, "transformer_depth": [0, 2], "transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 2, 1],
        "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 32}
KINDS = ["sd15", "sdxl", "sd3", "flux"]


def make(kind, dtype=DOUBLE):
    import comfy.supported_models as supported
    import random_models

    if kind in ("sd15", "sdxl"):
        config = supported.SD15(dict(SD15)) if kind == "sd15" else supported.SDXL(dict(SDXL))
        config.unet_config.update(num_heads=2 if kind == "sd15" else -1, num_head_channels=-1 if kind == "sd15" else 16)
        return random_models._filled(config, dtype=dtype)
    return random_models.small("sd3", dtype=dtype) if kind == "sd3" else random_models.flux(256, (2, 2), 24, 32, dtype=dtype)


class Setting:
    """A model with adapters on all target layers, moved away from their start."""

    def __init__(self, kind, dtype=DOUBLE, storage=None):
        from comfy.ldm.modules.attention import attention_pytorch

        from tlora_core import make_adapters
        from tlora_core.comfy_host.families import target_layers

        self.model = make(kind, dtype)
        if storage is not None:
            cast_to(self.model, storage)
        self.layers = target_layers(self.model)
        shapes = {name: layer.shape for name, layer in self.layers.items()}
        self.adapters = {name: a.to(dtype) for name, a in make_adapters("tlora", "last_random", shapes, 4, 0).items()}
        self.parameters = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        generator = torch.Generator().manual_seed(0)

        def rand(*shape):
            return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)

        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(rand(*parameter.shape) * 0.2)
        is_unet = kind in ("sd15", "sdxl")
        self.x, self.t = rand(2, 4 if is_unet else 16, 8, 8), torch.tensor([0.3, 0.7], dtype=dtype) * (1000 if is_unet else 1)
        self.conditions = {"context": rand(2, 5, 64 if kind == "sd3" else 24)}
        if kind != "sd15":
            self.conditions["y"] = rand(2, 32)
        if kind == "flux":
            self.conditions["guidance"] = torch.ones(2, dtype=dtype)
        self.options = {"optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)}
        self.weights = rand(*self.x.shape)

    def loss(self, active):
        from tlora_core.attach import Attachment, attached

        with attached(Attachment(self.layers[name].module, a, active, self.layers[name].row) for name, a in self.adapters.items()):
            output = self.model.model.diffusion_model(
                self.x.clone(), self.t, transformer_options=dict(self.options), **self.conditions)
        return (output * self.weights).mean()

    def gradients(self, active):
        for parameter in self.parameters:
            parameter.grad = None
        self.loss(active).backward()
        return [parameter.grad for parameter in self.parameters]


def cast_to(model, storage):
    """As the host loads a model whose dtype it cannot compute in: weights in `storage`, cast at each use to float32."""
    import comfy.ops

    plain, casting = comfy.ops.disable_weight_init, comfy.ops.manual_cast
    names = ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "RMSNorm")
    classes = {getattr(plain, name): getattr(casting, name) for name in names}
    for module in model.model.diffusion_model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            for parameter in module.parameters():
                parameter.data = parameter.data.to(storage)


def slope(setting, names, active, step=1e-3):
    """(what the gradients say, what the loss does) when the adapters of these layers move along their gradient."""
    parameters = [p for name in names for p in setting.adapters[name].parameters()]
    length = sum(p.grad.square().sum() for p in parameters).sqrt()
    directions = [p.grad.clone() / length for p in parameters]
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, direction in zip(parameters, directions):
                parameter.add_(direction, alpha=sign * step)
            values.append(setting.loss(active).item())
    return length.item(), (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("active", [3, torch.tensor([4, 2])], ids=["one rank", "a rank a sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(comfy, kind, active, checkpointing):
    from tlora_core.comfy_host.training import training_session

    setting = Setting(kind)
    with training_session(setting.model, checkpointing):
        setting.gradients(active)
        names = list(setting.adapters)
        for group in (names[:1], names[len(names) // 2:][:1], names[-1:]):
            said, done = slope(setting, group, active)
            assert said == pytest.approx(done, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient_and_saves_memory(comfy, kind):
    from tlora_core.comfy_host.training import checkpointed, training_session

    setting, kept = Setting(kind), []
    with training_session(setting.model):
        plain = setting.gradients(3)
        kept.append(saved_bytes(setting))
        with checkpointed(setting.model):
            for _ in range(2):  # the first call finds out what a block overwrites
                for one, other in zip(plain, setting.gradients(3)):
                    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
            kept.append(saved_bytes(setting))
    assert kept[1] < kept[0] / 2


def saved_bytes(setting) -> int:
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in setting.model.model.diffusion_model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = setting.loss(3)
    total = sum(size for pointer, size in saved.items() if pointer not in weights)
    del loss
    return total


def test_what_is_computed_again_has_the_ranks_it_had(comfy):
    """Another evaluation, with other ranks and without adapters, may come between a forward pass and its backward pass."""
    from tlora_core.comfy_host.training import training_session

    setting = Setting("flux")
    with training_session(setting.model, checkpointing=True):
        wanted = [g.clone() for g in setting.gradients(2)]
        for parameter in setting.parameters:
            parameter.grad = None
        loss = setting.loss(2)
        with torch.no_grad():
            setting.loss(4)
        setting.loss(3)
        loss.backward()
    for one, parameter in zip(wanted, setting.parameters):
        assert torch.equal(one, parameter.grad)


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_weights_that_are_cast_for_each_use_are_not_kept(comfy, kind, storage):
    from tlora_core.comfy_host.training import training_session

    full, cast = Setting(kind, torch.float32), Setting(kind, torch.float32, storage)
    with torch.no_grad():
        for one, other in zip(full.model.model.diffusion_model.parameters(), cast.model.model.diffusion_model.parameters()):
            one.copy_(other.float())
    with training_session(full.model):
        wanted, needed = full.gradients(3), saved_bytes(full)
    with training_session(cast.model):
        got, kept = cast.gradients(3), saved_bytes(cast)
    for one, other in zip(wanted, got):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5 * float(one.abs().max()))
    assert kept < 1.01 * needed


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_on_the_model_after_an_error_in_a_backward_pass(comfy, kind):
    from tlora_core.comfy_host.training import training_session

    setting = Setting(kind, torch.float32)
    network = setting.model.model.diffusion_model
    before = {k: (v.clone(), v.data_ptr()) for k, v in network.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError), training_session(setting.model, checkpointing=True):
        loss = setting.loss(3)
        last = next(reversed(setting.layers.values())).module
        handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("injected")))
        try:
            loss.backward()
        finally:
            handle.remove()
    assert not [m for m in network.modules() if "forward" in m.__dict__]
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key][0]) and value.data_ptr() == before[key][1]
