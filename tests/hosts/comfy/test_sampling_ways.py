"""The ways in which a T-LoRA is put on a model while sampling: they agree, and nothing stays behind."""

import host_models as models
import pytest
import sampling_runs as runs
import torch


class Kept:
    """Bytes that are kept of weights and of texts' outputs, looked at after each step of a sampling."""

    def __init__(self, model):
        self.base, self.seen = model.model, []

    def __call__(self, *_):
        from tlora_core.hosts.comfy.sampling import Folds

        folds = Folds.of(self.base)
        weights = [each.weight for each in folds.layers.values() if getattr(each, "weight", None) is not None]
        outputs = [output for text in folds.texts.texts for output in text.outputs.values()] if folds.texts else []
        tensors = [each for output in outputs for each in output.tensors]
        self.seen.append((sum(each.nbytes for each in weights), sum(each.nbytes for each in tensors)))


class TestWhateverIsFree:
    """Free memory decides what is kept, and nothing else."""

    @pytest.fixture(params=["sdxl", "flux"])
    def case(self, request, comfy):
        """A function of a dtype that gives (MODEL, T-LoRA, texts)."""
        import random_models

        def make(dtype):
            if request.param == "sdxl":
                model = random_models.sdxl(64, (0, 1, 1), 64, dtype=dtype)
            else:
                model = random_models.flux(256, (1, 1), 64, 32, dtype=dtype)
            tlora = random_models.random_tlora(model, runs.RANK, runs.MIN_RANK, split=("qkv", "linear1"))
            return model, tlora, [random_models.conditioning(model, 6, seed) for seed in (1, 2)]

        return make

    def sample(self, model, tlora, texts, **options):
        import random_models

        kept = Kept(model)
        latent = random_models.latent(model, 4)
        return runs.sample(runs.apply(model, tlora), *texts, latent=latent, callback=kept, **options), kept.seen

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_picture_is_the_same_to_the_bit(self, case, dtype, monkeypatch):
        from tlora_core.hosts.comfy import sampling

        model, tlora, texts = case(dtype)
        wanted, much = self.sample(model, tlora, texts)
        monkeypatch.setattr(sampling, "_room", lambda base, x: 0)
        ways = runs.Ways(monkeypatch)
        got, none = self.sample(model, tlora, texts)
        assert torch.equal(got, wanted) and "product" not in ways.used
        assert all(weights for weights, _ in much) and set(none) == {(0, 0)}

    def test_in_single_precision_too_since_it_is_not_asked_there(self, case, monkeypatch):
        import comfy.model_management

        from tlora_core.hosts.comfy import sampling

        model, tlora, texts = case(torch.float32)
        wanted, _ = self.sample(model, tlora, texts)
        monkeypatch.setattr(sampling, "_room", lambda base, x: 0)
        got, kept = self.sample(model, tlora, texts)
        assert torch.equal(got, wanted) and all(weights and not outputs for weights, outputs in kept)
        monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: model.model_size())
        got, kept = self.sample(model, tlora, texts)
        assert models.relative_error(got, wanted) < 1e-5 and not any(weights for weights, _ in kept)

    def test_texts_come_first_and_weights_get_the_rest(self, case, monkeypatch):
        from tlora_core.hosts.comfy import sampling

        model, tlora, texts = case(torch.bfloat16)
        _, ((weights, outputs), *_) = self.sample(model, tlora, texts)
        for room, kept in (
            (weights + outputs + 1, (weights, outputs)),
            (weights + outputs - 1, (0, outputs)),
            (outputs - 1, (0, 0)),
        ):
            monkeypatch.setattr(sampling, "_room", lambda base, x, room=room: room)
            assert set(self.sample(model, tlora, texts)[1]) == {kept}

    def test_what_the_host_would_take_off_counts_as_free_but_not_the_models_own_weights(self, unet, monkeypatch):
        """As with its dynamic VRAM, where text encoder and VAE stay until their memory is asked for."""
        import comfy.model_management

        from tlora_core.hosts.comfy import sampling

        x = torch.zeros(1, 16, 8, 8)
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 1000)
        monkeypatch.setattr(unet.model, "memory_required", lambda shape: 100)
        monkeypatch.setattr(unet.model, "current_patcher", unet)
        monkeypatch.setattr(unet, "loaded_size", lambda: 300)
        for evictable, room in ((0, 900), (300, 900), (5000, 900 + 4700)):
            monkeypatch.setattr(unet, "get_free_memory", lambda device, more=evictable: 1000 + more, raising=False)
            assert sampling._room(unet.model, x) == room


def test_nothing_is_kept_after_a_sampling_or_outside_one(unet, tlora, monkeypatch):
    from tlora_core.hosts.comfy.sampling import Folds

    patched = runs.apply(unet, tlora)
    during = []
    runs.sample(patched, *runs.texts(), callback=lambda *args: during.append(unet.model in Folds._of_models))
    assert set(during) == {True} and unet.model not in Folds._of_models
    ways = runs.Ways(monkeypatch)
    models.evaluate(patched, [3.0])
    assert ways.used == {"product"} and unet.model not in Folds._of_models and models.is_untouched(unet)


def test_what_is_kept_of_a_sampling_that_never_ended_goes_with_its_model(comfy):
    import gc
    import weakref

    import comfy.model_management

    from tlora_core.hosts.comfy.sampling import Folds

    model = models.random_unet()
    patched = runs.apply(model, models.random_tlora(model))
    model.model.current_patcher = patched
    models.evaluate(patched, [3.0])
    assert model.model in Folds._of_models
    network = weakref.ref(model.model)
    model.model.current_patcher = None
    del model, patched
    comfy.model_management.unload_all_models()
    gc.collect()
    assert network() is None


def test_no_copies_of_a_tlora_outlast_a_sampling(unet, tlora, monkeypatch):
    """On the CPU, as on a GPU with --highvram or --gpu-only, idle models stay on the device that computes."""
    from tlora_core.hosts.comfy import sampling

    assert unet.load_device == unet.offload_device
    cells = [runs.apply(unet, tlora, strength) for strength in (0.5, 1.0)]
    patches = [wrapper for cell in cells for (wrapper,) in cell.wrappers["apply_model"].values()]
    made, copy = [], sampling.stacked

    def counted(*args):
        made.append(args)
        return copy(*args)

    monkeypatch.setattr(sampling, "stacked", counted)
    held = []
    for cell in cells:
        runs.sample(
            cell, *runs.texts(), steps=3, callback=lambda *_: held.append([bool(each._placed) for each in patches])
        )
        assert not any(each._placed for each in patches)
    assert held == [[True, False]] * 3 + [[False, True]] * 3 and len(made) == len(cells), (
        "once a sampling, not at each step"
    )


def test_copies_go_also_where_the_host_tells_the_model_nothing_but_the_end(unet, tlora):
    """As for the model of the negative prompt in the host's Dual Model Guider."""
    patched = runs.apply(unet, tlora)
    ((wrapper,),) = (keyed for keyed in patched.wrappers["apply_model"].values())
    patched.pre_run()
    models.evaluate(patched, [3.0])
    assert wrapper._placed
    patched.cleanup()
    assert not wrapper._placed


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("failure", ["error", "cancel", "memory"])
def test_failure_at_any_step_leaves_weights_and_next_picture_as_they_were(unet, tlora, step, failure):
    import comfy.model_management as mm

    from tlora_core.hosts.comfy.sampling import Folds

    patched, plain = runs.apply(unet, tlora), runs.sample(unet, *runs.texts())
    wanted = runs.sample(patched, *runs.texts())
    weights = {k: v.clone() for k, v in unet.model.state_dict().items()}
    kinds = {"error": RuntimeError, "cancel": mm.InterruptProcessingException, "memory": torch.OutOfMemoryError}

    def fail(i, *args):
        if i == step:
            raise kinds[failure]("injected")

    with pytest.raises(kinds[failure]):
        runs.sample(patched, *runs.texts(), callback=fail)
    assert models.is_untouched(unet) and unet.model not in Folds._of_models
    assert all(torch.equal(v, weights[k]) for k, v in unet.model.state_dict().items())
    assert torch.equal(runs.sample(unet, *runs.texts()), plain)
    assert torch.equal(runs.sample(patched, *runs.texts()), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_hosts_own_static_lora(comfy, dtype, tmp_path):
    import comfy.sd
    import comfy.utils
    import random_models

    half, exact = (random_models.flux(256, (1, 1), 64, 32, dtype=d) for d in (dtype, torch.float32))
    positive, negative = (random_models.conditioning(exact, 6, seed) for seed in (1, 2))
    with torch.no_grad():
        for a, b in zip(exact.model.diffusion_model.parameters(), half.model.diffusion_model.parameters()):
            a.copy_(b)
    # All ranks at every t, like a static LoRA.
    tlora = random_models.random_tlora(exact, runs.RANK, runs.RANK)
    tlora.save(tmp_path / "x.safetensors")
    static = comfy.sd.load_lora_for_models(
        half, None, comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), 1.0, 0
    )[0]
    reference = runs.sample(runs.apply(exact, tlora), positive, negative)
    errors = {
        name: models.relative_error(runs.sample(model, positive, negative), reference)
        for name, model in (
            ("static", static),
            ("folded", runs.apply(half, tlora, fold=True)),
            ("product", runs.apply(half, tlora, fold=False)),
        )
    }
    # Sampling spreads one rounding over the picture by chance; a fifth is far above that chance and below a second
    # rounding.
    assert errors["folded"] < 1.2 * errors["static"] and errors["product"] < 1.2 * errors["static"], errors


def test_with_the_hosts_own_lora_and_after_it(unet, tlora, tmp_path):
    """A static LoRA changes weights between samplings, in place or not; what was folded before must not be used."""
    import comfy.sd
    import comfy.utils

    models.random_tlora(unet, 4, 4, seed=9).save(tmp_path / "x.safetensors")
    static = comfy.sd.load_lora_for_models(
        unet, None, comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), 1.0, 0
    )[0]
    alone = runs.sample(runs.apply(unet, tlora), *runs.texts())
    both = runs.sample(runs.apply(static, tlora), *runs.texts())
    beside = runs.sample(runs.apply(static, tlora, fold=False), *runs.texts())
    assert models.relative_error(both, beside) < 1e-5 < 1e-3 < models.relative_error(both, alone)
    assert torch.equal(runs.sample(runs.apply(unet, tlora), *runs.texts()), alone)


def test_with_the_hosts_hooks_and_keyframes(unet, tlora, tmp_path, monkeypatch):
    import comfy.hooks
    import comfy.utils

    models.random_tlora(unet, 4, 4, seed=9).save(tmp_path / "x.safetensors")
    group = comfy.hooks.create_hook_lora(comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength, start))
    group.set_keyframes_on_hooks(keyframes)

    def run(fold):
        # The host registers a hook on the MODEL under its conditioning, so each run gets conditioning of its own.
        positive = [[t, {**o, "hooks": group.clone()}] for t, o in models.conditioning(1)]
        model = unet.clone()
        comfy_key_map = comfy.lora.model_lora_keys_unet(model.model, {})
        assert comfy_key_map
        return runs.sample(runs.apply(model, tlora, fold=fold), positive, models.conditioning(2), steps=4)

    import comfy.lora

    ways = runs.Ways(monkeypatch)
    got = run(None)
    assert ways.used == {"product"}
    assert models.relative_error(got, run(False)) < 1e-6


def test_a_schedule_whose_timestep_is_unknown_stops_the_sampling(unet, tlora):
    """Set after the T-LoRA, so that only the evaluation can notice."""
    from tlora_core import TLoRAError

    known = unet.model.model_sampling

    class Unknown(torch.nn.Module):
        def __getattr__(self, name):
            return getattr(known, name)

    patched = runs.apply(unet, tlora)
    patched.add_object_patch("model_sampling", Unknown())
    with pytest.raises(TLoRAError, match="not one T-LoRA knows"):
        runs.sample(patched, *runs.texts())
    assert models.is_untouched(unet)
    with pytest.raises(TLoRAError, match="not one T-LoRA knows"):
        runs.apply(patched, tlora)


def test_conditions_evaluated_apart_and_on_areas(unet, tlora, monkeypatch):
    """With little memory, the host evaluates each conditioning separately, so that the texts alternate."""
    left, right = models.conditioning(1), models.conditioning(4)
    left[0][1]["area"], right[0][1]["area"] = (8, 4, 0, 0), (8, 4, 0, 4)
    together = runs.sample(runs.apply(unet, tlora, fold=False), left + right, models.conditioning(2))
    monkeypatch.setattr(unet.model, "memory_required", lambda *args, **kwargs: 1e30)
    ways = runs.Ways(monkeypatch)
    apart = runs.sample(runs.apply(unet, tlora, fold=True), left + right, models.conditioning(2))
    assert ways.used == {"weight", "output"} and models.relative_error(apart, together) < 1e-5


def test_on_another_copy_of_the_model(unet, tlora):
    """The host makes such a copy for a second GPU. The patch finds its layers by path in the evaluated model."""
    patched, other = runs.apply(unet, tlora), models.random_unet()
    clone = patched.clone()
    clone.model = other.model
    assert torch.equal(runs.sample(clone, *runs.texts()), runs.sample(patched, *runs.texts()))
    assert models.is_untouched(other)


def test_a_folded_tlora_inside_one_that_is_beside_the_layers_loses_neither(unet, tlora):
    """Rows with different timesteps: the outer T-LoRA's ranks differ, so it goes beside the layers; the inner one's are
    constant, so it folds."""
    patched = runs.apply(runs.apply(unet, tlora), models.random_tlora(unet, 4, 4, seed=4))
    sigmas = unet.model.model_sampling.sigmas[[999, 300]]
    wanted = models.evaluate(patched, sigmas)
    patched.pre_run()
    try:
        models.evaluate(patched, sigmas[:1])  # one timestep: both fold
        got = models.evaluate(patched, sigmas)
    finally:
        patched.cleanup()
    assert models.relative_error(got, wanted) < 1e-5
