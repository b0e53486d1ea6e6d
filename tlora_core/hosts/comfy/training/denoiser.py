"""The host's model as `trainer.Trainer` sees it."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ....method.adapters import Adapters
from ....method.masking import moved
from ....method.schedule import RankSchedule
from ....training.config import TrainConfig
from ..model.noise import draw_sigmas, min_snr_weight, noise_level, output_scale
from ..sampling import TimestepAwarePatch
from .encode import Sample, buckets


def normal(value):
    """`value` with inference tensors cloned, as conditioning from other nodes is made of them."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: normal(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(normal(v) for v in value)
    if isinstance(value, Sample):
        return Sample(**{field.name: normal(getattr(value, field.name)) for field in fields(value)})
    return value


_CACHES = (
    "easycache",
)  # of the host, also for its LazyCache: they skip steps of a sampling, and would give one picture's result for another
_IN_TRAINING = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)  # a sampler calls the others


def training_options(model: ModelPatcher) -> dict:
    """The model's transformer_options, with the wrappers that nodes have put on it, as far as training has to do with
    them."""
    options = {
        key: value for key, value in model.model_options.get("transformer_options", {}).items() if key not in _CACHES
    }
    wrappers = {
        kind: {key: list(each) for key, each in keyed.items() if key not in _CACHES}
        for kind, keyed in model.wrappers.items()
        if kind in _IN_TRAINING
    }
    return {**options, "wrappers": wrappers}


class TrainingPatch(TimestepAwarePatch):
    """With the timesteps, [B] on the CPU, and T of the evaluation to come in `level`."""

    level: tuple[Tensor, float]

    def noise_level(self, base, sigma):
        return self.level


class HostDenoiser:
    """`trainer.Denoiser` on the host's model. Make and use it inside `training_session`.

    samples: the subject's pictures. prior: pictures of its class, for prior preservation, or none.
    config: its timesteps, Min-SNR, fresh latents and prior weight are this class's part.
    """

    def __init__(
        self,
        model: ModelPatcher,
        adapters: Adapters,
        schedule: RankSchedule,
        samples: Sequence[Sample],
        config: TrainConfig,
        prior: Sequence[Sample] = (),
    ):
        self.model, self.base, self.device, self.config = model, model.model, model.load_device, config
        self.sampling = self.base.model_sampling
        self.needs_loss_scaling = self.base.get_dtype_inference() == torch.float16
        self.adapter_bytes = sum(p.nbytes for p in adapters.parameters())
        self.samples, self.prior = normal(list(samples)), normal(list(prior))
        self.buckets, self.prior_buckets = buckets(self.samples), buckets(self.prior)
        # Tables of noise levels on the CPU, where steps are drawn: a GPU would be waited for to tell a step's rank.
        self.levels = copy.deepcopy(self.sampling).cpu()
        self.patch = TrainingPatch(lambda device, dtype: adapters, schedule)
        self.options = {
            **training_options(model),
            "uuids": [],
            # The host may have chosen an attention kernel without a backward.
            "optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs),
        }
        # Not on a clone: as that ends, the host takes out of the model what nodes have injected into it.
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tlora-training", self.patch, self.options)
        # By sample and size of the latent, which some models' inputs have too, such as those for inpainting.
        self._conditions: dict[tuple, dict] = {}
        self._alone: dict[tuple, dict] = {}
        self._texts: list[Tensor] = []

    def losses(self, rows: list[int], generator: torch.Generator) -> Iterator[Tensor]:
        yield self._loss([self.samples[row] for row in rows], generator)
        if self.prior:
            row = int(
                torch.randint(len(self.prior), (1,), generator=generator)
            )  # so that each picture has the same chance
            bucket = next(bucket for bucket in self.prior_buckets if row in bucket)
            chosen = torch.randint(len(bucket), (len(rows),), generator=generator).tolist()
            yield self.config.prior_weight * self._loss([self.prior[bucket[i]] for i in chosen], generator)

    def _loss(self, samples: list[Sample], generator: torch.Generator) -> Tensor:
        config = self.config
        latents = moved(torch.stack([self._latent(sample, generator) for sample in samples]), self.device)
        noise = moved(torch.randn(latents.shape, generator=generator), self.device)
        sigmas = draw_sigmas(
            self.levels, len(samples), generator, config.timestep_density, config.noise_from, config.noise_to
        )
        error = self.output_error(samples, latents, noise, sigmas).float().square()
        error = error * self._weights(samples, error)
        per_sample = error.flatten(1).mean(1)
        if config.min_snr_gamma:
            per_sample = per_sample * moved(min_snr_weight(self.levels, sigmas, config.min_snr_gamma), self.device)
        return per_sample.mean()

    @staticmethod
    def _weights(samples: Sequence[Sample], error: Tensor) -> Tensor:
        cells = error.shape[-2:]
        weights = [torch.ones(cells) if sample.weights is None else sample.weights for sample in samples]
        return moved(torch.stack(weights), error.device).view(-1, *[1] * (error.ndim - 3), *cells)

    def _latent(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """In the model's own scale; a fresh sample of the posterior where the settings ask for one."""
        latent = sample.mean
        if self.config.fresh_latents and sample.deviation is not None:
            latent = latent + sample.deviation * torch.randn(latent.shape, generator=generator)
        return self.base.process_latent_in(latent[None])[0]

    def output_error(self, samples: Sequence[Sample], latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """What the model predicts (noise, v or flow) minus what it should, [B, C, ...], for latents and noise of that
        shape in the model's scale, and sigmas [B] on the CPU. Each sample has the ranks of its own timestep."""
        self.patch.level = noise_level(self.levels, sigmas)
        sigmas = moved(sigmas, self.device)
        each = sigmas.view(-1, *[1] * (latents.ndim - 1))
        noisy = self.sampling.noise_scaling(each, noise, latents)
        inputs = self._inputs(samples, noise[:1])
        options = {**self.options, "sigmas": sigmas, "cond_or_uncond": [0] * len(samples)}
        denoised = self.base.apply_model(noisy, sigmas, **inputs, transformer_options=options)
        return (latents - denoised) / output_scale(self.sampling, each)

    def _inputs(self, samples: Sequence[Sample], like: Tensor) -> dict:
        """What the model is given beside latents and timesteps. A text alone in its batch is the same tensor at every
        step and
        in every sample it belongs to: what U-Nets make of it is then computed once (`frozen.Frozen`)."""
        if len(samples) > 1:
            return comfy.samplers.cond_cat([self._condition(sample, like) for sample in samples])
        key = id(samples[0]), like.shape
        if key not in self._alone:
            inputs = comfy.samplers.cond_cat([self._condition(samples[0], like)])
            if "c_crossattn" in inputs:
                inputs["c_crossattn"] = self._text(
                    inputs["c_crossattn"].to(self.device, self.base.get_dtype_inference())
                )
            self._alone[key] = inputs
        return self._alone[key]

    def _text(self, text: Tensor) -> Tensor:
        known = next((t for t in self._texts if t.shape == text.shape and torch.equal(t, text)), None)
        if known is None:
            self._texts.append(text)
        return text if known is None else known

    def _condition(self, sample: Sample, like: Tensor) -> dict:
        """The model's own inputs for a sample's CONDITIONING, as the host's sampler would make them; made once."""
        key = id(sample), like.shape
        if key not in self._conditions:
            converted = comfy.sampler_helpers.convert_cond(sample.conditioning)[:1]
            noise = torch.zeros_like(like)
            encoded = comfy.samplers.encode_model_conds(
                self.base.extra_conds,
                converted,
                noise,
                self.device,
                "positive",
                latent_image=noise,
                denoise_mask=None,
                seed=0,
            )
            self._conditions[key] = {
                name: cond.process_cond(batch_size=1, area=None) for name, cond in encoded[0]["model_conds"].items()
            }
        return self._conditions[key]
