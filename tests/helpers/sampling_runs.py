"""Whole samplings by the host, with the expected result of each evaluation. Import inside tests that use `comfy`."""

import math

import host_models
import torch

RANK, MIN_RANK = 16, 4  # of the fixture `tlora`


def texts():
    """Positive and negative CONDITIONING."""
    return host_models.conditioning(1), host_models.conditioning(2)


def apply(model, tlora, strength=1.0, **options):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    return apply_tlora(model, tlora, strength, **options)


def sample(
    model, positive, negative, sampler="euler", steps=3, *, latent=None, channels=16, scheduler="normal", **options
):
    """The latent that the host's sampler gives; `options` go to comfy.sample.sample."""
    import comfy.sample

    latent = torch.zeros(1, channels, 8, 8) if latent is None else latent
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, 3),
            steps,
            3.0,
            sampler,
            scheduler,
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=3,
            **options,
        )


def sample_sigmas(model, positive, negative, sigmas, sampler="euler", latent=None, **options):
    """As the host's SamplerCustom node: any sigmas in any order."""
    import comfy.sample
    import comfy.samplers

    latent = torch.zeros(1, 16, 8, 8) if latent is None else latent
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(latent, 3),
            3.0,
            comfy.samplers.sampler_object(sampler),
            torch.tensor(sigmas),
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=3,
            **options,
        )


class Ways:
    """The ways in which layers were put on: "weight", "output", "product"."""

    def __init__(self, monkeypatch):
        from tlora_core.layers import beside, folded_output, folded_weight

        self.used = set()
        for owner, name, label in (
            (folded_weight.FoldedWeight, "forward", "weight"),
            (folded_output.FoldedOutput, "forward", "output"),
            (beside.Beside, "forward", "product"),
        ):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), label))

    def _counting(self, function, label):
        def counted(*args, **kwargs):
            self.used.add(label)
            return function(*args, **kwargs)

        return counted


class Evaluations:
    """Records every evaluation of a sampling with `model`, a clone to which the test adds T-LoRAs and everything
    else."""

    def __init__(self, model):
        self.calls = []
        self.model = model.clone()
        self.sampling = model.get_model_object("model_sampling")
        self.model.add_wrapper_with_key("apply_model", "recorder", self._record)

    def _record(self, executor, x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs):
        text = None if c_crossattn is None else c_crossattn.clone()
        options = {k: v for k, v in transformer_options.items() if k != "wrappers"}
        # Copies, because the host removes them from their lists.
        hints = control and {name: list(parts) for name, parts in control.items()}
        output = executor(x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs)
        self.calls.append((x, sigma, (c_concat, text, hints, options), kwargs, output))
        return output

    @property
    def sigmas(self) -> list[float]:
        return [float(call[1][0]) for call in self.calls]

    def assert_merged(self, *applied, below: float = 1e-5) -> None:
        """Each output is that of weights merged in float64 with the updates of `applied`: pairs of T-LoRA and
        strength."""
        assert self.calls
        base = self.model.model
        modules = dict(base.diffusion_model.named_modules())
        for x, sigma, (c_concat, text, hints, options), kwargs, output in self.calls:
            assert len(set(sigma.tolist())) == 1
            merged = merged_weights(modules, timestep(self.sampling, float(sigma[0])), applied)
            originals = {path: modules[path].weight for path in merged}
            try:
                for path, weight in merged.items():
                    modules[path].weight = torch.nn.Parameter(weight, requires_grad=False)
                # What the model keeps of other evaluations belongs to other weights.
                getattr(base.diffusion_model, "clear_kv_cache", lambda: None)()
                with torch.inference_mode():
                    hints = hints and {name: list(parts) for name, parts in hints.items()}
                    expected = base.apply_model(x, sigma, c_concat, text, hints, options, **kwargs)
            finally:
                for path, weight in originals.items():
                    modules[path].weight = weight
                getattr(base.diffusion_model, "clear_kv_cache", lambda: None)()
            error = float((output.double() - expected.double()).norm() / expected.double().norm())
            assert error < below, (float(sigma[0]), error)


def merged_weights(modules, t: float, applied) -> dict[str, torch.Tensor]:
    """The weights of the layers in `applied`, with the updates that the rank leaves on at t, which runs from 0 to 1."""

    sums = {}
    for tlora, strength in applied:
        for name, layer in tlora.layers.items():
            path, row = name.path, name.row
            columns = layer.group * tlora.schedule_of(name).active_rank(t, 1)
            update = strength * layer.up[:, :columns].double() @ layer.down[:columns].double()
            sums.setdefault(path, modules[path].weight.double())
            sums[path] = sums[path].index_add(0, torch.arange(row, row + len(update)), update)
    return {path: weight.to(modules[path].weight.dtype) for path, weight in sums.items()}


def timestep(sampling, sigma: float) -> float:
    """t/T by the rules of the method, each read off a table or a formula of sigmas the other way round."""
    import comfy.model_sampling as host

    if isinstance(sampling, host.StableCascadeSampling):  # the model's own time: the host shifts its sigmas only
        times = torch.linspace(1e-5, 1 - 1e-5, 100000, dtype=torch.float64)
        clean = (cosine(times) / cosine(torch.zeros(1))).square()
        return float(times[((1 / clean - 1).log() / 2 - math.log(sigma)).abs().argmin()])
    if isinstance(sampling, host.ModelSamplingCosmosRFlow):
        return sigma / (sigma + 1)
    if isinstance(sampling, host.ModelSamplingContinuousEDM):
        low, high = math.log(sampling.sigma_min), math.log(sampling.sigma_max)
        return min(max((math.log(sigma) - low) / (high - low), 0), 1)
    if isinstance(sampling, host.ModelSamplingDiscrete):
        table = sampling.sigmas.double().log()
        assert len(table) == 1000
        return int((table - math.log(sigma)).abs().argmin()) / 1000
    return min(max(sigma, 0), 1)


def cosine(times: torch.Tensor) -> torch.Tensor:
    """Stable Cascade's: how much of the picture is left at times from 0 to 1, up to a factor."""
    return ((times.double() + 0.008) / 1.008 * torch.pi / 2).cos()
