"""The timestep-aware patch on the host's own samplers."""

import math

import host_models as models
import pytest
import torch

RANK, MIN_RANK = 64, 32


@pytest.fixture(scope="module")
def model(comfy):
    return models.random_unet()


@pytest.fixture(scope="module")
def tlora(model):
    return models.random_tlora(model, RANK, MIN_RANK)


def formula(sigma: float, table: torch.Tensor) -> int:
    """r(t) in whole numbers, with t the nearest of the model's timesteps in log sigma."""
    t = 0 if sigma == 0 else int((table.double().log() - math.log(sigma)).abs().argmin())
    return (RANK - MIN_RANK) * (1000 - t) // 1000 + MIN_RANK


class Recorder:
    """The ranks that each layer applied, and the sigmas of the evaluation as a second, innermost wrapper sees them."""

    def __init__(self, model, monkeypatch):
        from tlora_core.layers.beside import Beside
        from tlora_core.layers.folded_output import FoldedOutput
        from tlora_core.layers.folded_weight import FoldedWeight

        self.evaluations = []

        def recording(forward):
            def recorded(way, x):
                output = forward(way, x)
                on = way.overlays if isinstance(way, Beside) else way.wanted
                for active in (overlay.active for overlay in on):
                    self.evaluations[-1][1].add(tuple(active.tolist()) if isinstance(active, torch.Tensor) else active)
                return output

            return recorded

        for kind in (Beside, FoldedWeight, FoldedOutput):
            monkeypatch.setattr(kind, "forward", recording(kind.forward))
        self.model = model.clone()
        self.model.add_wrapper_with_key("apply_model", "recorder", self._evaluation)

    def _evaluation(self, executor, x, sigma, *args, **kwargs):
        self.evaluations.append((sigma.clone(), set()))
        return executor(x, sigma, *args, **kwargs)


def sample(model, sampler="euler", scheduler="normal", steps=4, denoise=1.0, positive=None, size=8, batch=1):
    import comfy.sample

    latent = torch.zeros(batch, 16, size, size)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 3)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            3.0,
            sampler,
            scheduler,
            positive or models.conditioning(1),
            models.conditioning(2),
            latent,
            denoise=denoise,
            disable_pbar=True,
            seed=3,
        )


def assert_ranks_follow(recorder, table, what):
    assert recorder.evaluations, what
    for sigmas, applied in recorder.evaluations:
        wanted = [formula(float(s), table) for s in sigmas]
        assert applied == {wanted[0]} if len(set(wanted)) == 1 else applied == {tuple(wanted)}, (what, sigmas)


def test_every_sampler_and_scheduler_applies_the_rank_of_each_evaluation(model, tlora, monkeypatch):
    import comfy.samplers

    from tlora_core.hosts.comfy.sampling import apply_tlora

    table = model.model.model_sampling.sigmas
    pairs = [(s, "karras" if i % 2 else "normal") for i, s in enumerate(comfy.samplers.KSampler.SAMPLERS)]
    pairs += [("euler_ancestral", scheduler) for scheduler in comfy.samplers.KSampler.SCHEDULERS]
    for sampler, scheduler in pairs:
        with monkeypatch.context() as patch:
            recorder = Recorder(model, patch)
            sample(apply_tlora(recorder.model, tlora), sampler, scheduler, steps=3)
            assert_ranks_follow(recorder, table, (sampler, scheduler))
    assert len(pairs) > 40


def test_ranks_follow_when_sampling_starts_late_and_with_areas(model, tlora, monkeypatch):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    recorder = Recorder(model, monkeypatch)
    left, right = models.conditioning(1), models.conditioning(4)
    left[0][1]["area"], right[0][1]["area"] = (8, 8, 0, 0), (8, 16, 0, 0)
    sample(apply_tlora(recorder.model, tlora), "dpmpp_2s_ancestral", denoise=0.5, positive=left + right, size=16)
    assert_ranks_follow(recorder, model.model.model_sampling.sigmas, "denoise 0.5 with areas")
    assert max(float(s.max()) for s, _ in recorder.evaluations) < float(model.model.model_sampling.sigma_max) / 2


def test_rows_of_a_batch_have_each_the_rank_of_their_own_timestep(model, tlora, monkeypatch):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    recorder = Recorder(model, monkeypatch)
    sigmas = model.model.model_sampling.sigmas[[999, 500, 20]]
    models.evaluate(apply_tlora(recorder.model, tlora), sigmas)
    assert [ranks for _, ranks in recorder.evaluations] == [{(32, 48, 63)}]


@pytest.mark.parametrize("timestep", [0, 250, 500, 999])
def test_output_is_that_of_weights_merged_with_the_masked_update(comfy, model, tlora, timestep):
    from tlora_core.hosts.comfy.model.families import target_layers
    from tlora_core.hosts.comfy.sampling import apply_tlora

    sigma = float(model.model.model_sampling.sigmas[timestep])
    columns = 2 * ((RANK - MIN_RANK) * (1000 - timestep) // 1000 + MIN_RANK)
    merged = models.random_unet()
    for path, layer in target_layers(merged).items():
        low = tlora.layers[path]
        delta = low.up[:, :columns].double() @ low.down[:columns].double()
        layer.module.weight.data = (layer.weight.double() + 0.8 * delta).float()
    ours = models.evaluate(apply_tlora(model, tlora, 0.8), [sigma])
    assert models.relative_error(ours, models.evaluate(merged, [sigma])) < 1e-5
    assert models.relative_error(ours, models.evaluate(model, [sigma])) > 1e-3


def test_batch_with_mixed_timesteps_equals_its_rows_alone(model, tlora):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    patched = apply_tlora(model, tlora)
    sigmas = model.model.model_sampling.sigmas[[999, 400, 5]]
    together = models.evaluate(patched, sigmas)
    for i in range(len(sigmas)):
        assert models.relative_error(together[i : i + 1], _row(patched, sigmas, i)) < 1e-5


def _row(model, sigmas, i):
    """Row `i` of `models.evaluate(model, sigmas)`, evaluated alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(sigmas), 16, 8, 8, generator=generator) * sigmas.view(-1, 1, 1, 1).clamp(min=1)
    y = torch.randn(len(sigmas), 1664, generator=generator)
    context = torch.randn(len(sigmas), 24, 128, generator=generator)
    with torch.inference_mode():
        return model.model.apply_model(
            x[i : i + 1],
            sigmas[i : i + 1],
            c_crossattn=context[i : i + 1],
            y=y[i : i + 1],
            transformer_options={"wrappers": model.wrappers},
        )


def test_stock_loader_gives_the_full_rank_update_of_the_same_file(model, tlora, tmp_path):
    import comfy.sd
    import comfy.utils

    from tlora_core.hosts.comfy.sampling import apply_tlora

    tlora.save(tmp_path / "x.safetensors")
    stock, _ = comfy.sd.load_lora_for_models(
        model, None, comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), 1.0, 0
    )
    sigma = [float(model.model.model_sampling.sigmas[0])]
    full = models.evaluate(stock, sigma)
    models.evaluate(model, sigma)  # takes the stock patches off the shared weights again
    assert models.relative_error(models.evaluate(apply_tlora(model, tlora), sigma), full) < 1e-5


def test_two_tloras_add_up_in_either_order_and_opposite_strengths_cancel(model, tlora):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    other = models.random_tlora(model, rank=8, min_rank=2, seed=5)
    sigma = [2.0]
    ab = models.evaluate(apply_tlora(apply_tlora(model, tlora), other, 0.5), sigma)
    ba = models.evaluate(apply_tlora(apply_tlora(model, other, 0.5), tlora), sigma)
    assert models.relative_error(ab, ba) < 1e-5
    assert models.relative_error(ab, models.evaluate(apply_tlora(model, tlora), sigma)) > 1e-4
    none = models.evaluate(apply_tlora(apply_tlora(model, tlora, 1.5), tlora, -1.5), sigma)
    assert models.relative_error(none, models.evaluate(model, sigma)) < 1e-5


def test_branch_without_the_tlora_is_bit_identical_in_between(model, tlora):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    before = sample(model)
    one = sample(apply_tlora(model, tlora))
    assert torch.equal(sample(model), before)
    assert torch.equal(sample(apply_tlora(model, tlora)), one) and not torch.equal(one, before)
    assert model.wrappers == {} and models.is_untouched(model)


def test_strength_zero_is_the_bare_model(model, tlora):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    assert torch.equal(sample(apply_tlora(model, tlora, 0.0)), sample(model))


def test_error_in_any_layer_leaves_the_model_as_it_was(model, tlora):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    patched, before = apply_tlora(model, tlora), sample(model)
    layers = [m for m in model.model.diffusion_model.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers[::25]:
        handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("injected")))
        try:
            with pytest.raises(MemoryError):
                sample(patched)
        finally:
            handle.remove()
        assert models.is_untouched(model)
    assert torch.equal(sample(model), before)


def test_model_without_the_layers_is_refused_in_a_sentence(model, tlora):
    from tlora_core import LowRank, TLoRAError, TLoRAFile
    from tlora_core.hosts.comfy.sampling import apply_tlora

    def file(layers):
        return TLoRAFile(layers, "tlora", tlora.schedule, 1000, "discrete", "flux")

    path, layer = next(iter(tlora.layers.items()))
    with pytest.raises(TLoRAError, match=r"1 of its 2 layers are not in this one, the first being no\.such\.layer"):
        apply_tlora(model, file({path: layer, "no.such.layer": layer}))
    with pytest.raises(TLoRAError, match=r"is 3x128 and the model's"):
        apply_tlora(model, file({path: LowRank(torch.zeros(3, 128), torch.zeros(128, 128), 2)}))


def test_noise_level_of_each_parameterisation_of_the_host(comfy):
    import comfy.model_sampling as ms

    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.model.noise import noise_level

    def level(schedule, prediction, sigma):
        sampling = type("ModelSampling", (schedule, prediction), {})()
        t, T = noise_level(sampling, torch.tensor([sigma]))
        return round(float(t[0]) / T, 3)

    assert (
        level(ms.ModelSamplingDiscrete, ms.EPS, 14.6146)
        == 0.999
        == level(ms.ModelSamplingDiscrete, ms.V_PREDICTION, 99.0)
    )
    assert level(ms.ModelSamplingDiscrete, ms.EPS, 0.0) == 0.0
    assert level(ms.ModelSamplingDiscreteFlow, ms.CONST, 0.25) == 0.25 == level(ms.ModelSamplingFlux, ms.CONST, 0.25)
    assert (
        level(ms.ModelSamplingContinuousEDM, ms.EDM, 120.0) == 1.0
        and level(ms.ModelSamplingContinuousEDM, ms.EDM, 0.002) == 0.0
    )
    assert level(ms.ModelSamplingCosmosRFlow, ms.COSMOS_RFLOW, 1.0) == 0.5
    with pytest.raises(TLoRAError, match="never|unknown"):
        noise_level(torch.nn.Identity(), torch.tensor([1.0]))
