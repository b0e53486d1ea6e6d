"""The host's model as `trainer.train` sees it."""
from collections.abc import Mapping

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..adapters import Adapter
from ..schedule import RankSchedule
from .noise import draw_sigmas, output_scale
from .sampling import TimestepAwarePatch


def normal(value):
    """`value` with inference tensors cloned, as conditioning from other nodes is made of them."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: normal(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(normal(v) for v in value)
    return value


class HostDenoiser:
    """`trainer.Denoiser` on the host's model. Make and use it inside `training_session`.

    latents [N, C, H, W] as VAE Encode gives them; conditioning: one CONDITIONING per latent, or one for all.
    """

    def __init__(self, model: ModelPatcher, adapters: Mapping[str, Adapter], schedule: RankSchedule, latents: Tensor,
                 conditioning: list):
        self.base, self.device = model.model, model.load_device
        self.sampling = self.base.model_sampling
        self.latents = self.base.process_latent_in(normal(latents).to(self.device, torch.float32))
        self.needs_loss_scaling = self.base.get_dtype_inference() == torch.float16
        patched = model.clone()
        patched.add_wrapper_with_key(
            WrappersMP.APPLY_MODEL, "tlora-training", TimestepAwarePatch(lambda device, dtype: adapters, schedule))
        self.options = {
            **patched.model_options.get("transformer_options", {}), "wrappers": patched.wrappers, "uuids": [],
            # The host may have chosen an attention kernel without a backward.
            "optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs),
        }
        self.conditions = [self._encode(c) for c in conditioning]

    def _encode(self, conditioning) -> dict:
        """The model's own inputs for one CONDITIONING, as the host's sampler would make them."""
        converted = comfy.sampler_helpers.convert_cond(normal(conditioning))[:1]
        noise = torch.zeros_like(self.latents[:1])
        encoded = comfy.samplers.encode_model_conds(
            self.base.extra_conds, converted, noise, self.device, "positive", latent_image=noise, denoise_mask=None,
            seed=0)
        return {name: cond.process_cond(batch_size=1, area=None) for name, cond in encoded[0]["model_conds"].items()}

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        return draw_sigmas(self.sampling, count, generator)

    def output_error(self, rows: list[int], noise: Tensor, sigmas: Tensor) -> Tensor:
        latents = self.latents[rows]
        noisy = self.sampling.noise_scaling(sigmas.view(-1, 1, 1, 1), noise, latents)
        conditions = [self.conditions[row if len(self.conditions) > 1 else 0] for row in rows]
        inputs = comfy.samplers.cond_cat(conditions)
        options = {**self.options, "sigmas": sigmas, "cond_or_uncond": [0] * len(rows)}
        denoised = self.base.apply_model(noisy, sigmas, **inputs, transformer_options=options)
        return (latents - denoised) / output_scale(self.sampling, sigmas).view(-1, 1, 1, 1)
