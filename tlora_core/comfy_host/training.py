"""Training on the MODEL that the host has loaded, without a second copy of its weights."""
import re
from collections.abc import Mapping
from contextlib import contextmanager

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..adapters import Adapter
from ..errors import TLoRAError
from ..schedule import RankSchedule
from .noise import draw_sigmas, output_scale
from .sampling import TimestepAwarePatch, diffusion_modules

# The attention projections of the transformer blocks of SD1, SD2 and SDXL U-Nets: the paper's choice (its section 5.1).
_ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$")


def target_layers(model: ModelPatcher) -> dict[str, torch.nn.Linear]:
    """The linear layers a T-LoRA is trained on, by module path. Raises TLoRAError for a model without them."""
    modules = diffusion_modules(model.model.diffusion_model)
    layers = {path: m for path, m in modules.items() if _ATTENTION.search(path) and isinstance(m, torch.nn.Linear)}
    if not layers:
        raise TLoRAError(
            f"model is a {type(model.model).__name__}, which T-LoRA training does not support yet; use a model of the "
            "SD1.5, SD2 or SDXL family.")
    return layers


@contextmanager
def training_session(model: ModelPatcher):
    """The model loaded in full and fit for autograd; leaves its weights bit-identical, whatever happens inside.

    Nodes run in inference mode, whose tensors autograd refuses. The weights are wrapped anew around the same
    storage: no copy, and they stay valid for later sampling.
    """
    was_training = comfy.model_management.in_training
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.load_models_gpu([model], memory_required=1e20, force_full_load=True)
        for module in model.model.diffusion_model.modules():
            _leave_inference_mode(module)
        try:
            comfy.model_management.in_training = True  # lets the host take differentiable paths where it has faster ones
            yield
        finally:
            comfy.model_management.in_training = was_training
            comfy.model_management.soft_empty_cache()


def _leave_inference_mode(module: torch.nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_inference():
            module._parameters[name] = torch.nn.Parameter(_same_storage(parameter), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_inference():
            module._buffers[name] = _same_storage(buffer)


def _same_storage(tensor: Tensor) -> Tensor:
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _normal(value):
    """`value` with inference tensors cloned, as conditioning from other nodes is made of them."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: _normal(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_normal(v) for v in value)
    return value


class HostDenoiser:
    """`trainer.Denoiser` on the host's model. Make and use it inside `training_session`.

    latents [N, C, H, W] as VAE Encode gives them; conditioning: one CONDITIONING per latent, or one for all.
    """

    def __init__(self, model: ModelPatcher, adapters: Mapping[str, Adapter], schedule: RankSchedule, latents: Tensor,
                 conditioning: list):
        self.base, self.device = model.model, model.load_device
        self.sampling = self.base.model_sampling
        self.latents = self.base.process_latent_in(_normal(latents).to(self.device, torch.float32))
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
        converted = comfy.sampler_helpers.convert_cond(_normal(conditioning))[:1]
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
