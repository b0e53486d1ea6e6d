"""The host's model as a `trainer.Denoiser`."""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ....errors import TLoRAError
from ....layers.text_memo import Text
from ....layers.trained import moved
from ....method.adapters import Adapters
from ....method.schedule import RankSchedule
from ....training.config import TrainConfig
from ..model.families import ATTENTION
from ..model.noise import draw_sigmas, loss_scale, min_snr_weight, noise_level, noised
from ..reach import Reach, naming
from ..sampling import Placed, TimestepAwarePatch, place
from ..whole_sampling import preparing
from .encode import Sample, buckets


def normal(value: Any, made: dict[int, Tensor]) -> Any:
    """`value` with its inference tensors cloned; conditioning from other nodes consists of them. Each is cloned once:
    `made` holds the clones by the identity of the originals."""
    if isinstance(value, Tensor):
        return made.setdefault(id(value), value.clone()) if value.is_inference() else value
    if isinstance(value, dict):
        return {k: normal(v, made) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(normal(v, made) for v in value)
    if isinstance(value, Sample):
        return Sample(**{field.name: normal(getattr(value, field.name), made) for field in fields(value)})
    return value


_BATCHES_KEPT = 4  # for each, SDXL's layers keep 24 MB for the text
_IN_TRAINING = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)  # only a sampler calls other kinds


def training_options(model: ModelPatcher) -> dict:
    """The model's transformer_options, with those of its wrappers that matter in training. Without caches: the host's
    EasyCache and LazyCache, for example, skip steps of a sampling, and would return one picture's result for
    another."""
    options = {k: v for k, v in model.model_options.get("transformer_options", {}).items() if not _is_cache(k)}
    wrappers = {
        kind: {key: list(each) for key, each in keyed.items() if not _is_cache(key)}
        for kind, keyed in model.wrappers.items()
        if kind in _IN_TRAINING
    }
    return {**options, "wrappers": wrappers}


def _is_cache(key: str | None) -> bool:
    return "cache" in str(key)


class TrainingPatch(TimestepAwarePatch):
    """The patch for training. `level`: the timesteps [B], on the CPU, and T of the next evaluation; None for one
    without the adapters. `text`: its text."""

    level: tuple[Tensor, float] | None
    text: Text | None

    def __init__(self, adapters: Adapters, schedule: RankSchedule):
        super().__init__(schedule)
        self.adapters, self._placed = adapters, None
        self.reach = _TrainedReach()

    def evaluation(self, base, x, sigma, text):
        overlays = [] if self.level is None else self.overlays(self._place(base), *self.level)
        return overlays, None, self.text

    def watched(self, base, x):
        return self.reach.evaluating(self._place(base).layers)

    def _place(self, base) -> Placed:
        if self._placed is None:  # layers are not replaced within a training session
            self._placed = place(base, self.adapters)
        return self._placed


class _TrainedReach(Reach):
    """Raises TLoRAError where no layer can learn, as the model calls none."""

    def judge(self, layers):
        if self.unreached:
            sentence = (
                f"layers has {naming(self.unreached)} that this model does not call in its evaluations with these "
                "inputs, for example as they work on the text before; they learn nothing"
            )
            if len(self.unreached) == len(layers):
                raise TLoRAError(f'{sentence}, so choose others or "{ATTENTION}".')
            logging.warning("[T-LoRA] %s.", sentence)


# The host's models whose latent is a video and its sound in one, by class: a picture is not enough for them.
_WITH_SOUND = ("MiniMaxH3",)


def require_picture(base) -> None:
    """Raises TLoRAError unless the host's model `base` can be trained on latents of pictures alone."""
    if any(each.__name__ in _WITH_SOUND for each in type(base).__mro__):
        raise TLoRAError(
            f"model draws a video together with its sound ({type(base).__name__}), so it cannot be trained on "
            "pictures; use a model that draws pictures, or videos alone."
        )


class Drawn(NamedTuple):
    """What a step draws for a batch: latents and noise [B, C, ...], in the model's scale; sigmas [B], on the CPU."""

    latents: Tensor
    noise: Tensor
    sigmas: Tensor


class HostDenoiser:
    """A `trainer.Denoiser` on the host's model. Make and use it inside `training_session`.

    samples: the subject's pictures; for output preservation with `of_class`. prior: pictures of its class for prior
        preservation, or none.
    config: this class uses its timesteps, Min-SNR, fresh latents, and the weights of the prior and of preservation.
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
        made: dict[int, Tensor] = {}
        self.samples: list[Sample] = normal(list(samples), made)
        self.prior: list[Sample] = normal(list(prior), made)
        self.buckets, self.prior_buckets = buckets(self.samples), buckets(self.prior)
        # The loss that keeps the class covers the whole picture, so these have no weights.
        self.of_class = {
            sample: replace(sample, conditioning=sample.of_class, weights=None)
            for sample in self.samples
            if sample.of_class is not None
        }
        # On the CPU, where steps are drawn: reading a step's rank from a GPU would wait for it.
        self.levels = copy.deepcopy(self.sampling).cpu()
        self.patch = TrainingPatch(adapters, schedule)
        self.options = {
            **training_options(model),
            "uuids": [],
            # The host may have chosen an attention kernel without a backward pass.
            "optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs),
        }
        # Not on a clone: when a clone is deleted, the host removes from the model what nodes have injected into it.
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tlora-training", self.patch, self.options)
        # By sample and size of the latent: the inputs of some models, for example inpainting models, have that size.
        self._conditions: dict[tuple, dict] = {}
        self._batches: dict[tuple, tuple[dict, Text | None]] = {}
        self._texts: WeakValueDictionary[tuple, Text] = WeakValueDictionary()  # by the captions of the samples

    def losses(self, indices: list[int], generator: torch.Generator) -> Iterator[Tensor]:
        samples = [self.samples[i] for i in indices]
        drawn = self._drawn(samples, generator)
        yield self._loss(samples, drawn)
        if self.config.preservation_weight:
            yield self.config.preservation_weight * self._change_of_class(samples, drawn)
        if self.prior:
            # A bucket is chosen by one of its pictures, so that each picture has the same chance.
            picture = int(torch.randint(len(self.prior), (1,), generator=generator))
            bucket = next(bucket for bucket in self.prior_buckets if picture in bucket)
            chosen = torch.randint(len(bucket), (len(indices),), generator=generator).tolist()
            samples = [self.prior[bucket[i]] for i in chosen]
            yield self.config.prior_weight * self._loss(samples, self._drawn(samples, generator))

    def _drawn(self, samples: list[Sample], generator: torch.Generator) -> "Drawn":
        config = self.config
        latents = moved(torch.stack([self._latent(sample, generator) for sample in samples]), self.device)
        noise = moved(torch.randn(latents.shape, generator=generator), self.device)
        sigmas = draw_sigmas(
            self.levels, len(samples), generator, config.timestep_density, config.noise_from, config.noise_to
        )
        return Drawn(latents, noise, sigmas)

    def _loss(self, samples: list[Sample], drawn: "Drawn") -> Tensor:
        error = self.output_error(samples, *drawn).float().square()
        if any(sample.weights is not None for sample in samples):
            error = error * self._weights(samples, error)
        return self._mean(error, drawn.sigmas)

    def _change_of_class(self, samples: list[Sample], drawn: "Drawn") -> Tensor:
        """How far the adapters move the prediction for the class on the subject's own noised latents: the mean square,
        which is 0 at the start."""
        of_class = [self.of_class[sample] for sample in samples]
        with torch.no_grad():
            own = self.output_error(of_class, *drawn, is_bare=True)
        # Of errors with one target, the difference is that of the predictions.
        return self._mean((self.output_error(of_class, *drawn) - own).float().square(), drawn.sigmas)

    def _mean(self, squares: Tensor, sigmas: Tensor) -> Tensor:
        """The mean of squares [B, C, ...], each sample with the weight of its noise level."""
        per_sample, gamma = squares.flatten(1).mean(1), self.config.min_snr_gamma
        if gamma:
            per_sample = per_sample * moved(min_snr_weight(self.levels, sigmas, gamma), self.device)
        return per_sample.mean()

    @staticmethod
    def _weights(samples: Sequence[Sample], error: Tensor) -> Tensor:
        cells = error.shape[-2:]
        weights = [torch.ones(cells) if sample.weights is None else sample.weights for sample in samples]
        return moved(torch.stack(weights), error.device).view(-1, *[1] * (error.ndim - 3), *cells)

    def _latent(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """The latent in the model's own scale; a new sample of the posterior if the settings ask for it."""
        latent = sample.mean
        if self.config.fresh_latents and sample.deviation is not None:
            latent = latent + sample.deviation * torch.randn(latent.shape, generator=generator)
        return self.base.process_latent_in(latent[None])[0]

    def output_error(
        self, samples: Sequence[Sample], latents: Tensor, noise: Tensor, sigmas: Tensor, is_bare: bool = False
    ) -> Tensor:
        """The model's prediction (noise, v or flow) minus its target, [B, C, ...]. latents, noise: of that shape, in
        the model's scale. sigmas: [B] on the CPU. Each sample has the ranks of its own timestep; is_bare: no adapter
        is on."""
        if len(samples) > 1 and self._is_of_one_sigma:
            each = zip(samples, *(tensor.split(1) for tensor in (latents, noise, sigmas)))
            return torch.cat([self.output_error([sample], *rest, is_bare=is_bare) for sample, *rest in each])
        self.patch.level = None if is_bare else noise_level(self.levels, sigmas)
        sigmas = moved(sigmas, self.device)
        each = sigmas.view(-1, *[1] * (latents.ndim - 1))
        noisy = noised(self.sampling, each, noise, latents)
        inputs = self.inputs(samples, noise[:1])
        # A mean-flow model is told the next sigma, too. To the same sigma, its mean flow is the flow itself.
        steps = {"sigmas": sigmas, "sample_sigmas": sigmas[:1].repeat(2)}
        options = {**self.options, **steps, "cond_or_uncond": [0] * len(samples)}
        denoised = self.base.apply_model(noisy, sigmas, **inputs, transformer_options=options)
        return (latents - denoised) / loss_scale(self.sampling, self.base.latent_format, each)

    @property
    def _is_of_one_sigma(self) -> bool:
        """Whether the host's model looks up one next sigma for the whole batch."""
        return getattr(self.base.diffusion_model, "time_r_in", None) is not None

    def inputs(self, samples: Sequence[Sample], like: Tensor) -> dict:
        """The model's inputs besides latents and timesteps. Samples with the same captions share one text, so that
        layers compute its output once; see `layers.text_memo`."""
        key = *map(id, samples), like.shape
        if key not in self._batches:
            inputs = normal(comfy.samplers.cond_cat([self._condition(sample, like) for sample in samples]), {})
            text = None
            if "c_crossattn" in inputs:
                captions = tuple(id(sample.conditioning[0][0]) for sample in samples)
                text = self._texts.get(captions)
                if text is None:
                    text = Text(inputs["c_crossattn"].to(self.device, self.base.get_dtype_inference()))
                    self._texts[captions] = text
            if len(self._batches) == _BATCHES_KEPT:
                del self._batches[next(iter(self._batches))]
            self._batches[key] = inputs, text
        inputs, self.patch.text = self._batches[key]
        return inputs

    def _condition(self, sample: Sample, like: Tensor) -> dict:
        """The model's own inputs for a sample's CONDITIONING, as the host's sampler makes them; made once."""
        key = id(sample), like.shape
        if key not in self._conditions:
            converted = comfy.sampler_helpers.convert_cond(sample.conditioning)[:1]
            noise = torch.zeros_like(like)
            # In inference mode as in a sampling: by that, some models decide to run their text adapter here.
            with torch.inference_mode(), preparing(self.model):
                encoded = comfy.samplers.encode_model_conds(
                    self.base.extra_conds,
                    converted,
                    noise,
                    self.device,
                    "positive",
                    latent_image=noise,
                    denoise_mask=None,
                    seed=0,
                    latent_shapes=[like.shape],  # for models that can take several kinds of latents at once
                )
            self._conditions[key] = {
                name: cond.process_cond(batch_size=1, area=None) for name, cond in encoded[0]["model_conds"].items()
            }
        return self._conditions[key]
