"""The ways in which a T-LoRA is put on a model while sampling: they agree, and nothing stays behind."""
import host_models as models
import pytest
import torch

RANK, MIN_RANK = 16, 4


def sd_conditioning(model, seed):
    return models.conditioning(seed)


@pytest.fixture(scope="module", params=["unet", "flux", "sd3"])
def family(request, comfy):
    """(MODEL, its T-LoRA, conditioning(model, seed))."""
    if request.param == "unet":
        model = models.random_unet()
        return model, models.random_tlora(model, RANK, MIN_RANK), sd_conditioning
    import random_models

    model = random_models.flux(256, (1, 1), 64, 32) if request.param == "flux" else random_models.sd3(2, 64, 32)
    tlora = random_models.random_tlora(model, RANK, MIN_RANK, size=0.3, split=("qkv", "linear1"))
    return model, tlora, lambda model, seed: random_models.conditioning(model, 6, seed)


@pytest.fixture(scope="module")
def unet(comfy):
    return models.random_unet()


@pytest.fixture(scope="module")
def tlora(unet):
    return models.random_tlora(unet, RANK, MIN_RANK)


def sample(model, positive, negative, sampler="euler", steps=3, callback=None, channels=16):
    import comfy.sample

    latent = torch.zeros(1, channels, 8, 8)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, 3), steps, 3.0, sampler, "normal", positive, negative, latent,
            disable_pbar=True, seed=3, callback=callback)


def pair(give, model):
    return give(model, 1), give(model, 2)


class Ways:
    """Counts how the layers were put on."""

    def __init__(self, monkeypatch):
        from tlora_core import attach, folding

        self.used = set()
        for owner, name, label in ((folding.FoldedWeight, "forward", "weight"), (folding.FoldedOutput, "forward", "output"),
                                   (attach, "add_low_rank", "product")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), label))

    def _counting(self, function, label):
        def counted(*args, **kwargs):
            self.used.add(label)
            return function(*args, **kwargs)

        return counted


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde"])
def test_folded_and_beside_give_one_picture(family, sampler, monkeypatch):
    from tlora_core.comfy_host.sampling import apply_tlora

    model, tlora, give = family
    ways = Ways(monkeypatch)
    within = sample(apply_tlora(model, tlora, -0.7), *pair(give, model), sampler)
    assert "weight" in ways.used and "product" not in ways.used
    ways.used.clear()
    beside = sample(apply_tlora(model, tlora, -0.7, fold=False), *pair(give, model), sampler)
    assert ways.used == {"product"}
    assert models.relative_error(within, beside) < 1e-5
    assert models.relative_error(within, sample(model, *pair(give, model), sampler)) > 1e-3


def test_each_evaluation_is_that_of_weights_merged_in_float64(family, monkeypatch):
    """At the source: what the model gives at every sigma of a sampling, against a model with merged weights."""
    from tlora_core.comfy_host.sampling import apply_tlora
    from tlora_core.file import split_name

    model, tlora, give = family
    calls = []

    def record(executor, x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs):
        output = executor(x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs)
        options = {k: v for k, v in transformer_options.items() if k != "wrappers"}
        calls.append((x, sigma, (c_concat, c_crossattn, control, options), kwargs, output))
        return output

    recorder = model.clone()
    recorder.add_wrapper_with_key("apply_model", "recorder", record)
    sample(apply_tlora(recorder, tlora, 0.8), *pair(give, model), steps=4)
    modules, T = dict(model.model.diffusion_model.named_modules()), tlora.num_timesteps
    originals = {split_name(name)[0]: modules[split_name(name)[0]].weight for name in tlora.layers}
    for x, sigma, args, kwargs, output in calls:
        t = float(sigma[0]) if T == 1 else float(model.model.model_sampling.timestep(sigma)[0])
        try:
            for path, weight in originals.items():
                merged = weight.double()
                for name, layer in tlora.layers.items():
                    if split_name(name)[0] == path:
                        row, columns = split_name(name)[1], 2 * tlora.schedule_of(name).active_rank(t, T)
                        update = 0.8 * layer.up[:, :columns].double() @ layer.down[:columns].double()
                        merged[row:row + len(update)] += update
                modules[path].weight = torch.nn.Parameter(merged.float(), requires_grad=False)
            with torch.inference_mode():
                expected = model.model.apply_model(x, sigma, *args, **kwargs)
        finally:
            for path, weight in originals.items():
                modules[path].weight = weight
        assert models.relative_error(output, expected) < 1e-5
    assert len({float(c[1][0]) for c in calls}) == 4


def test_short_memory_falls_back_to_the_product_and_says_the_same(unet, tlora, monkeypatch):
    from tlora_core.comfy_host.sampling import apply_tlora

    wanted = sample(apply_tlora(unet, tlora), *pair(sd_conditioning, unet))
    monkeypatch.setattr(unet.model, "memory_required", lambda *args, **kwargs: 1e30)
    ways = Ways(monkeypatch)
    got = sample(apply_tlora(unet, tlora), *pair(sd_conditioning, unet))
    assert ways.used == {"product", "output"} and models.relative_error(got, wanted) < 1e-5


def test_nothing_is_kept_after_a_sampling_or_outside_one(unet, tlora, monkeypatch):
    from tlora_core.comfy_host.sampling import Folds, apply_tlora

    patched = apply_tlora(unet, tlora)
    during = []
    sample(patched, *pair(sd_conditioning, unet), callback=lambda *args: during.append(len(Folds._of_models)))
    assert set(during) == {1} and len(Folds._of_models) == 0
    ways = Ways(monkeypatch)
    models.evaluate(patched, [3.0])
    assert ways.used == {"product"} and len(Folds._of_models) == 0 and models.is_untouched(unet)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("failure", ["error", "cancel", "memory"])
def test_failure_at_any_step_leaves_weights_and_next_picture_as_they_were(unet, tlora, step, failure):
    import comfy.model_management as mm

    from tlora_core.comfy_host.sampling import Folds, apply_tlora

    patched, plain = apply_tlora(unet, tlora), sample(unet, *pair(sd_conditioning, unet))
    wanted = sample(patched, *pair(sd_conditioning, unet))
    weights = {k: v.clone() for k, v in unet.model.state_dict().items()}
    kinds = {"error": RuntimeError, "cancel": mm.InterruptProcessingException, "memory": torch.OutOfMemoryError}

    def fail(i, *args):
        if i == step:
            raise kinds[failure]("injected")

    with pytest.raises(kinds[failure]):
        sample(patched, *pair(sd_conditioning, unet), callback=fail)
    assert models.is_untouched(unet) and len(Folds._of_models) == 0
    assert all(torch.equal(v, weights[k]) for k, v in unet.model.state_dict().items())
    assert torch.equal(sample(unet, *pair(sd_conditioning, unet)), plain)
    assert torch.equal(sample(patched, *pair(sd_conditioning, unet)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_hosts_own_static_lora(comfy, dtype, tmp_path):
    import comfy.sd
    import comfy.utils
    import random_models

    from tlora_core.comfy_host.sampling import apply_tlora

    half, exact = (random_models.flux(256, (1, 1), 64, 32, dtype=d) for d in (dtype, torch.float32))
    texts = pair(lambda model, seed: random_models.conditioning(model, 6, seed), exact)
    with torch.no_grad():
        for a, b in zip(exact.model.diffusion_model.parameters(), half.model.diffusion_model.parameters()):
            a.copy_(b)
    tlora = random_models.random_tlora(exact, RANK, RANK)  # all ranks at every t, which is what a static LoRA gives
    tlora.save(tmp_path / "x.safetensors")
    static = comfy.sd.load_lora_for_models(half, None, comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), 1.0, 0)[0]
    reference = sample(apply_tlora(exact, tlora), *texts)
    errors = {name: models.relative_error(sample(model, *texts), reference) for name, model in (
        ("static", static), ("folded", apply_tlora(half, tlora, fold=True)), ("product", apply_tlora(half, tlora, fold=False)))}
    # Sampling spreads one rounding over the picture by chance; a fifth is far above that chance and below a second rounding.
    assert errors["folded"] < 1.2 * errors["static"] and errors["product"] < 1.2 * errors["static"], errors


def test_with_the_hosts_own_lora_and_after_it(unet, tlora, tmp_path):
    """A static LoRA changes weights between samplings, in place or not; what was folded before must not be used."""
    import comfy.sd
    import comfy.utils

    from tlora_core.comfy_host.sampling import apply_tlora

    models.random_tlora(unet, 4, 4, seed=9).save(tmp_path / "x.safetensors")
    static = comfy.sd.load_lora_for_models(unet, None, comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), 1.0, 0)[0]
    alone = sample(apply_tlora(unet, tlora), *pair(sd_conditioning, unet))
    both = sample(apply_tlora(static, tlora), *pair(sd_conditioning, unet))
    beside = sample(apply_tlora(static, tlora, fold=False), *pair(sd_conditioning, unet))
    assert models.relative_error(both, beside) < 1e-5 < 1e-3 < models.relative_error(both, alone)
    assert torch.equal(sample(apply_tlora(unet, tlora), *pair(sd_conditioning, unet)), alone)


def test_with_the_hosts_hooks_and_keyframes(unet, tlora, tmp_path, monkeypatch):
    import comfy.hooks
    import comfy.utils

    from tlora_core.comfy_host.sampling import apply_tlora

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
        return sample(apply_tlora(model, tlora, fold=fold), positive, models.conditioning(2), steps=4)

    import comfy.lora

    ways = Ways(monkeypatch)
    got = run(None)
    assert ways.used == {"product"}
    assert models.relative_error(got, run(False)) < 1e-6


def test_text_that_changes_from_step_to_step_is_followed(unet, tlora):
    """As with IP-Adapter-like patches: what the text layers get is not the text, and not the same at every step."""
    from tlora_core.comfy_host.sampling import apply_tlora

    def run(fold):
        model, count = unet.clone(), [0]

        def patch(q, k, v, extra_options):
            count[0] += 1
            return q, k + 0.1 * (count[0] % 7), v * 0.9

        model.set_model_attn2_patch(patch)
        return sample(apply_tlora(model, tlora, fold=fold), *pair(sd_conditioning, unet))

    assert models.relative_error(run(None), run(False)) < 1e-5


def test_two_at_once_with_freeu_and_a_merge(unet, tlora):
    """FreeU patches the output blocks; a merge gives the host patches on the weights."""
    from tlora_core.comfy_host.sampling import apply_tlora

    other = models.random_tlora(unet, 6, 1, seed=4, alpha=2.0)

    def run(fold):
        merged = unet.clone()
        merged.add_patches(models.random_unet(seed=3).get_key_patches("diffusion_model.middle_block"), 0.5, 0.5)
        merged.set_model_output_block_patch(lambda h, hsp, options: (h * 1.1, hsp * 0.9))
        return sample(apply_tlora(apply_tlora(merged, tlora, fold=fold).clone(), other, 0.5, fold=fold), *pair(sd_conditioning, unet))

    assert models.relative_error(run(None), run(False)) < 1e-5


def test_a_schedule_whose_timestep_is_unknown_stops_the_sampling(unet, tlora):
    """Set after the T-LoRA, so that only the evaluation can notice."""
    from tlora_core import TLoRAError
    from tlora_core.comfy_host.sampling import apply_tlora

    known = unet.model.model_sampling

    class Unknown(torch.nn.Module):
        def __getattr__(self, name):
            return getattr(known, name)

    patched = apply_tlora(unet, tlora)
    patched.add_object_patch("model_sampling", Unknown())
    with pytest.raises(TLoRAError, match="not one T-LoRA knows"):
        sample(patched, *pair(sd_conditioning, unet))
    assert models.is_untouched(unet)
    with pytest.raises(TLoRAError, match="not one T-LoRA knows"):
        apply_tlora(patched, tlora)


def test_conditions_evaluated_apart_and_on_areas(unet, tlora, monkeypatch):
    """Little memory makes the host evaluate each conditioning alone, so that the texts take turns."""
    from tlora_core.comfy_host.sampling import apply_tlora

    left, right = models.conditioning(1), models.conditioning(4)
    left[0][1]["area"], right[0][1]["area"] = (8, 4, 0, 0), (8, 4, 0, 4)
    together = sample(apply_tlora(unet, tlora, fold=False), left + right, models.conditioning(2))
    monkeypatch.setattr(unet.model, "memory_required", lambda *args, **kwargs: 1e30)
    ways = Ways(monkeypatch)
    apart = sample(apply_tlora(unet, tlora, fold=True), left + right, models.conditioning(2))
    assert ways.used == {"weight", "output"} and models.relative_error(apart, together) < 1e-5


def test_on_another_copy_of_the_model(unet, tlora):
    """As the host makes one for a second GPU: the patch finds its layers by path in the model that is evaluated."""
    from tlora_core.comfy_host.sampling import apply_tlora

    patched, other = apply_tlora(unet, tlora), models.random_unet()
    clone = patched.clone()
    clone.model = other.model
    assert torch.equal(sample(clone, *pair(sd_conditioning, unet)), sample(patched, *pair(sd_conditioning, unet)))
    assert models.is_untouched(other)


def test_a_folded_tlora_inside_one_that_is_beside_the_layers_loses_neither(unet, tlora):
    """Rows of different timesteps: the outer T-LoRA's ranks differ and go beside, the inner one's are constant and fold."""
    from tlora_core.comfy_host.sampling import apply_tlora

    patched = apply_tlora(apply_tlora(unet, tlora), models.random_tlora(unet, 4, 4, seed=4))
    sigmas = unet.model.model_sampling.sigmas[[999, 300]]
    wanted = models.evaluate(patched, sigmas)
    patched.pre_run()
    try:
        models.evaluate(patched, sigmas[:1])  # one timestep: both fold
        got = models.evaluate(patched, sigmas)
    finally:
        patched.cleanup()
    assert models.relative_error(got, wanted) < 1e-5
