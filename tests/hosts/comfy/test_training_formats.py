"""Training and sampling on every format of weights that the host loads, and on layers of other node packs."""

import json

import host_models as models
import pytest
import sampling_runs as runs
import torch
from gradients import MIXED, Setting, slope


def gradients(model, family="flux", checkpointing=False):
    """Of all adapters on MODEL, in one row."""
    setting = Setting(family, torch.float32, model=model)
    with setting.session(checkpointing):
        return torch.cat([gradient.flatten() for gradient in setting.gradients(MIXED)])


class TestHostsFP8Product:
    """The host's class of layers for `fp8_e4m3fn_fast` clamps a layer's input in place, and rounds it to fp8."""

    @pytest.fixture(params=["flux", "sd15"])
    def pair(self, request, comfy):
        """(family, MODEL with the host's fp8 product, the same one whose layers get a copy of their input)."""
        import comfy.ops
        import random_models

        class Copying(comfy.ops.fp8_ops):
            class Linear(comfy.ops.fp8_ops.Linear):
                def forward(self, input):
                    return super().forward(input.clone())

        options = {"dtype": torch.float32, "storage": torch.float8_e4m3fn}
        made = [random_models.small(request.param, **options, ops=ops) for ops in (comfy.ops.fp8_ops, Copying)]
        return request.param, *made

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_are_those_of_layers_that_leave_their_input_alone(self, pair, checkpointing):
        family, fast, copying = pair
        got, wanted = (gradients(model, family, checkpointing) for model in (fast, copying))
        assert torch.equal(got, wanted) and wanted.norm() > 0


class TestResidentWeights:
    """Dynamic VRAM keeps a layer's cast weight for its next use. Made in a sampling, it is an inference tensor."""

    @pytest.fixture(params=["cast", "quantised"])
    def model(self, request, comfy, monkeypatch):
        import comfy.ops
        import random_models

        with torch.inference_mode():
            if request.param == "cast":
                model = random_models.small("flux", storage=torch.float8_e4m3fn)
            else:
                model = random_models.small("flux", quantised=random_models.quantise(random_models.small("flux")))
            for module in model.model.diffusion_model.modules():
                if hasattr(module, "comfy_cast_weights"):
                    module.comfy_cast_weights = True  # as the host does under dynamic VRAM
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", self.resident)
        return model

    @staticmethod
    def resident(layer, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False, **_):
        from comfy.quant_ops import QuantizedTensor

        def copied(tensor):
            if tensor is None or not isinstance(tensor.data, QuantizedTensor):
                return tensor if tensor is None else tensor.data.clone()
            names, rest = (data := tensor.data).__tensor_flatten__()
            parts = {name: getattr(data, name).clone() for name in names}
            return QuantizedTensor.__tensor_unflatten__(parts, rest, 0, 0)

        def cast(tensor, dtype):
            tensor = tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
            return tensor.dequantize() if isinstance(tensor, QuantizedTensor) and dtype.is_floating_point else tensor

        if not hasattr(layer, "_v_weight"):
            layer._v_weight, layer._v_bias = copied(layer.weight), copied(getattr(layer, "bias", None))
        dtype = dtype or input.dtype
        weight, bias = cast(layer._v_weight, dtype), cast(layer._v_bias, bias_dtype or dtype)
        return (weight, bias, None) if offloadable else (weight, bias)

    @pytest.fixture
    def alone(self, model):
        return gradients(model)

    def test_a_training_after_a_sampling_is_one_without(self, model, alone):
        texts, kept = self.sample(model)
        assert kept, "all norms and layers kept what the sampling has made"
        assert torch.equal(gradients(model), alone)
        self.sample(model)
        assert torch.equal(gradients(model, checkpointing=True), alone)

    @staticmethod
    def sample(model):
        """Forget all weights, as for another model that takes their place, then draw a picture."""
        import random_models

        modules = [m for m in model.model.diffusion_model.modules() if hasattr(m, "comfy_cast_weights")]
        for module in modules:
            for name in ("_v_weight", "_v_bias"):
                vars(module).pop(name, None)
        texts = [random_models.conditioning(model, 5, seed) for seed in (0, 1)]
        with torch.inference_mode():
            runs.sample(model, *texts, latent=random_models.latent(model))
        return texts, [m for m in modules if getattr(vars(m).get("_v_weight"), "is_inference", bool)()]


def quantised(format, options):
    """(MODEL with its attention layers quantised by the host, one with what their weights are worth)."""
    import comfy.quant_ops as host
    import random_models

    worth = random_models.small("flux")
    weights = worth.model.diffusion_model.state_dict()
    for path in random_models.attention_layers(worth):
        weight = weights.pop(f"{path}.weight")
        made = host.QuantizedTensor.from_float(
            weight.clone(), host.QUANT_ALGOS[format]["comfy_tensor_layout"], **options
        )
        note = {"format": format, **options}
        if group := getattr(made._params, "convrot_groupsize", None):
            note["convrot_groupsize"] = group
        weights |= made.state_dict(f"{path}.weight")
        weights[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        weight.copy_(made.dequantize())
    with torch.inference_mode():
        return random_models.small("flux", quantised={k: w.clone() for k, w in weights.items()}), worth


TURNED = {"convrot": True, "convrot_groupsize": 64, "per_channel": True}
FORMATS = [("float8_e4m3fn", {}), ("float8_e5m2", {}), ("nvfp4", {}), ("mxfp8", {}), ("int8_tensorwise", {})]


@pytest.mark.parametrize("format, options", [*FORMATS, ("int8_tensorwise", TURNED), ("convrot_w4a4", {})])
def test_input_gradients_of_a_quantised_layer_are_those_of_what_its_weight_is_worth(comfy, format, options):
    import comfy.quant_ops
    import random_models

    if format not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"This ComfyUI has no {format}.")
    stored, worth = quantised(format, options)
    setting = Setting("flux", torch.float32, model=stored)
    with setting.session():
        for path, layer in random_models.attention_layers(stored).items():
            x = torch.randn(1, 8, layer.in_features, requires_grad=True)
            gradient = torch.randn(1, 8, layer.out_features)
            got = torch.autograd.grad(layer(x), x, gradient)[0]
            weight = random_models.attention_layers(worth)[path].weight
            assert models.relative_error(got, gradient @ weight) < 1e-5, path
        assert torch.cat([gradient.flatten() for gradient in setting.gradients(MIXED)]).isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_a_compiled_model_is_trained_uncompiled(comfy, family, checkpointing):
    import random_models
    import torch._dynamo.testing
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    counter = torch._dynamo.testing.CompileCounter()
    model = random_models.small(family)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, counter, keys=["diffusion_model"])
    torch._dynamo.reset()
    got = gradients(compiled, family, checkpointing)
    torch._dynamo.reset()
    assert counter.frame_count == 0 and torch.equal(got, gradients(model, family, checkpointing))


GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16"]


class TestGGUF:
    """A model from a GGUF file, whose layers behave as those of ComfyUI-GGUF."""

    @pytest.fixture(params=GGUF)
    def kind(self, request):
        import gguf

        return getattr(gguf.GGMLQuantizationType, request.param)

    @pytest.mark.parametrize("family", ["flux"])
    def test_trains_as_what_its_weights_are_worth(self, comfy, tmp_path, kind, family):
        import gguf_pack

        packed, worth = gguf_pack.models(tmp_path / "model.gguf", family, kind)
        layers = [m for m in packed.model.diffusion_model.modules() if isinstance(m, gguf_pack.Ops.Linear)]
        assert sum(type(layer.weight) is gguf_pack.Packed for layer in layers) == len(layers) > 9
        before = [(layer.weight, layer.weight.as_subclass(torch.Tensor).clone()) for layer in layers]
        for checkpointing in (False, True):
            got, wanted = (gradients(model, family, checkpointing) for model in (packed, worth))
            assert models.relative_error(got, wanted) < 1e-4
        for layer, (weight, values) in zip(layers, before):
            assert layer.weight is weight and torch.equal(weight.as_subclass(torch.Tensor), values)

    def test_gradients_are_those_of_finite_differences(self, comfy, tmp_path, kind):
        import gguf_pack

        packed, _ = gguf_pack.models(tmp_path / "model.gguf", "flux", kind)
        setting = Setting("flux", torch.float32, model=packed)
        with setting.session():
            setting.gradients(MIXED)
            for name in list(setting.adapters)[::5]:
                said, done = slope(setting, name, MIXED)
                assert said == pytest.approx(done, rel=2e-2), name

    def test_samples_as_what_its_weights_are_worth(self, comfy, tmp_path, kind):
        import gguf_pack
        import random_models

        packed, worth = gguf_pack.models(tmp_path / "model.gguf", "flux", kind)
        tlora = random_models.random_tlora(worth, runs.RANK, runs.MIN_RANK, size=0.3)
        texts = [random_models.conditioning(worth, 6, seed) for seed in (1, 2)]
        got, wanted = (
            runs.sample(runs.apply(model, tlora), *texts, latent=random_models.latent(worth))
            for model in (packed, worth)
        )
        assert models.relative_error(got, wanted) < 1e-4


def test_a_gguf_model_is_recognised_by_its_bytes(comfy, tmp_path):
    import gguf
    import gguf_pack

    from tlora_core.hosts.comfy.training.fingerprint import fingerprint

    packed, _ = gguf_pack.models(tmp_path / "model.gguf", "flux", gguf.GGMLQuantizationType.Q8_0)
    before = fingerprint(packed)
    assert fingerprint(packed) == before
    layer = packed.model.diffusion_model.double_blocks[0].img_attn.proj
    with torch.inference_mode():
        layer.weight.as_subclass(torch.Tensor).view(-1)[0].add_(1)
    assert fingerprint(packed) != before


def test_weights_for_a_start_are_those_that_a_gguf_layer_unpacks(comfy, tmp_path):
    import gguf
    import gguf_pack

    from tlora_core.hosts.comfy.model.families import target_layers

    packed, worth = gguf_pack.models(tmp_path / "model.gguf", "flux", gguf.GGMLQuantizationType.Q4_K)
    for (name, got), wanted in zip(target_layers(packed).items(), target_layers(worth).values()):
        assert torch.equal(got.weight, wanted.weight), name


class TestOtherPacks:
    """Layers that are torch's Linear with packed weights of a class of their own, and no function of the host's, as
    those of bitsandbytes are."""

    class Bytes(torch.Tensor):
        """Eight bits for each number of a weight, and nothing else may be done with them."""

    @pytest.fixture
    def pair(self, comfy):
        """(MODEL whose attention layers are packed so, MODEL of the same worth)."""
        import comfy.utils
        import random_models

        class Packed(torch.nn.Linear):
            def forward(self, x):
                return torch.nn.functional.linear(
                    x, (self.weight.as_subclass(torch.Tensor).float() - 128) * self.step, self.bias
                )

        packed, worth = random_models.small("flux"), random_models.small("flux")
        for path, layer in random_models.attention_layers(packed).items():
            step = layer.weight.abs().max() / 127
            whole = (layer.weight / step).round()
            fresh = Packed(layer.in_features, layer.out_features, device="meta")
            with torch.inference_mode():
                data = (whole + 128).to(torch.uint8).as_subclass(self.Bytes)
            fresh.weight, fresh.bias, fresh.step = torch.nn.Parameter(data, False), layer.bias, step
            comfy.utils.set_attr(packed.model.diffusion_model, path, fresh)
            random_models.attention_layers(worth)[path].weight.copy_(whole * step)
        return packed, worth

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_are_trained_through_their_own_forward_and_never_wrapped_anew(self, pair, checkpointing):
        import random_models

        packed, worth = pair
        before = [layer.weight for layer in random_models.attention_layers(packed).values()]
        got, wanted = (gradients(model, checkpointing=checkpointing) for model in pair)
        assert models.relative_error(got, wanted) < 1e-5 and wanted.norm() > 0
        for layer, weight in zip(random_models.attention_layers(packed).values(), before):
            assert layer.weight is weight and type(weight) is self.Bytes


def test_a_training_with_a_gguf_text_encoder_is_made_once_and_found_again(base, output):
    import comfy.utils
    import gguf
    import gguf_pack
    from training_runs import request, run

    clip = base[1]
    network, packed = clip.patcher.model, []
    for path, layer in list(network.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == 0:
            fresh = gguf_pack.Ops.Linear(layer.in_features, layer.out_features, device="meta")
            data = gguf.quants.quantize(layer.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            weight = gguf_pack.Packed.of(torch.from_numpy(data), gguf.GGMLQuantizationType.Q8_0, layer.weight.shape)
            fresh.weight, fresh.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
            comfy.utils.set_attr(network, path, fresh)
            packed.append(fresh)
    assert packed
    first, again = (run(base, request(2)) for _ in range(2))
    assert first.file == again.file and len(again.losses) == 2
    assert all(type(layer.weight) is gguf_pack.Packed for layer in packed)
