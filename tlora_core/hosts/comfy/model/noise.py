"""The host's noise parameterisations: sigma to t, and the scale of a model's output.

`model_sampling` is always that of the evaluated model, as nodes like ModelSamplingDiscrete replace it.
"""

import math

import comfy.model_sampling as host
import torch
from torch import Tensor

from ....errors import TLoRAError
from ....training.optimizers import flow_density

_UNSCALED_V = getattr(host, "V_PREDICTION_DDPM", ())  # CogVideoX's; not in older hosts
_LEAST_OF_PIXELS = 0.05


def noise_level(model_sampling, sigma: Tensor) -> tuple[Tensor, float]:
    """(t, T): the timestep of each sigma [B] in the unit of the model's parameterisation, and the largest timestep.

    Noise and v prediction on discrete timesteps: the host's timestep, T = 1000. Flow models: the shifted time of the
    sampler, T = 1. EDM: the position of log sigma in the model's range, T = 1. Stable Cascade, Cosmos and continuous v:
    the model's time from 0 to 1, T = 1.
    A NaN sigma gives a NaN t. Raises TLoRAError for any other parameterisation: t is never guessed.
    """
    m = model_sampling
    if isinstance(m, host.StableCascadeSampling | host.ModelSamplingCosmosRFlow | host.ModelSamplingContinuousV):
        t, T = m.timestep(sigma).clamp(0, 1), 1.0
    elif isinstance(m, host.ModelSamplingDiscrete):
        # Calls the base class, which returns the index in the table of sigmas; a subclass may return a log sigma.
        # A distilled model's table has, for example, every twentieth timestep, including the last one.
        index = host.ModelSamplingDiscrete.timestep(m, sigma)
        t, T = (index + 1) * (m.num_timesteps / len(m.sigmas)) - 1, float(m.num_timesteps)
    elif isinstance(m, host.ModelSamplingDiscreteFlow | host.ModelSamplingFlux):
        t, T = sigma.clamp(0, 1), 1.0
    elif isinstance(m, host.ModelSamplingContinuousEDM):
        low, high = m.sigma_min.log(), m.sigma_max.log()
        t, T = ((sigma.log() - low) / (high - low)).clamp(0, 1), 1.0
    else:
        raise TLoRAError(
            f"This model's noise schedule ({type(m).__mro__[1].__name__}) is not one T-LoRA knows, so the timestep of "
            "a sigma is unknown; use a model with noise, v, EDM or flow prediction."
        )
    return torch.where(sigma.isnan(), sigma, t), T  # the discrete ones would take it for their first timestep


def num_timesteps(model_sampling) -> float:
    """T of the model's parameterisation. Raises like `noise_level`."""
    return noise_level(model_sampling, model_sampling.sigma_max.reshape(1))[1]


def domain(model_sampling) -> str:
    """The name under which a file records what t means: "discrete", "flow" or "continuous"."""
    if isinstance(model_sampling, host.ModelSamplingDiscreteFlow | host.ModelSamplingFlux):
        return "flow"
    discrete = isinstance(model_sampling, host.ModelSamplingDiscrete)
    return "discrete" if discrete and not isinstance(model_sampling, host.StableCascadeSampling) else "continuous"


def output_scale(model_sampling, sigma: Tensor) -> Tensor:
    """-d(denoised) / d(model output). The error of a denoised latent divided by it is the error of the model's
    prediction (noise, v, flow or picture), which the paper's loss uses. Otherwise sigma^2 would weight the loss, which
    would come almost entirely from the noisiest timesteps, those that T-LoRA protects.

    sigma: [B, ...], any float dtype. Measured on the host's own formula, which is affine in the output: see
    `require_trainable`.
    """
    zero = torch.zeros_like(sigma)
    denoised = [model_sampling.calculate_denoised(sigma, output, zero) for output in (zero, torch.ones_like(sigma))]
    return denoised[0] - denoised[1]


def loss_scale(model_sampling, latent_format, sigma: Tensor) -> Tensor:
    """What the error of a denoised latent is divided by for the loss: `output_scale`, but in size at least 0.05 where
    the model draws pixels.

    Such models predict the picture, and their output for the host is its distance from the noisy picture divided by
    sigma. What they miss of the picture's finest details does not vanish with sigma as noise does, so at the lowest
    sigmas a single step's loss would be thousands of times that of others. Their training divides by sigma, but by no
    less than 0.05 (JiT, Li and He 2025, arXiv 2511.13720). A model that draws latents is left alone: it predicts its
    output itself.
    """
    scale = output_scale(model_sampling, sigma)
    if getattr(latent_format, "spacial_downscale_ratio", None) != 1:
        return scale
    return scale.sign() * scale.abs().clamp(min=_LEAST_OF_PIXELS)


def noised(model_sampling, sigma: Tensor, noise: Tensor, latents: Tensor) -> Tensor:
    """The latents [B, ...] with noise of the same shape, as the model takes them at sigma [B, 1, ...]."""
    noisy = model_sampling.noise_scaling(sigma, noise, latents)
    # CogVideoX gets latents unscaled, and its formula for the denoised latent is that of latents with the variance
    # kept at 1, as in its own training.
    return noisy / (sigma.square() + 1).sqrt() if isinstance(model_sampling, _UNSCALED_V) else noisy


def require_trainable(model_sampling) -> None:
    """Raises TLoRAError unless the model draws from noise, and its denoised latent is affine in its output, with a
    slope that depends on sigma alone and is nowhere 0 or infinite. Only then is there a loss on the output."""
    m, kind = model_sampling, type(model_sampling).__bases__[-1].__name__
    sigma = m.sigmas[:: max(1, len(m.sigmas) // 8)].double()
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    is_noised = not torch.equal(m.noise_scaling(sigma, one, zero), m.noise_scaling(sigma, zero, zero))
    if isinstance(m, host.IMG_TO_IMG) or not is_noised:
        raise TLoRAError(
            f"model makes one picture from another, such as its depth or a mask ({kind}), so it cannot learn to draw a "
            "subject; use a model that draws pictures from noise."
        )
    slope = output_scale(m, sigma)
    affine = all(
        torch.allclose(m.calculate_denoised(sigma, zero, x) - m.calculate_denoised(sigma, output, x), output * slope)
        for output, x in ((3 * one, zero), (one, one), (-2 * one, -one))
    )
    if not affine or not (slope.isfinite() & (slope != 0)).all():
        raise TLoRAError(
            f"model's prediction type ({kind}) gives no loss to train on, because its denoised latent is not "
            "proportional to an error of its output; use a model with noise, v, EDM or flow prediction."
        )


def draw_sigmas(
    model_sampling,
    count: int,
    generator: torch.Generator,
    density: str = "uniform",
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """`count` training sigmas, float32 on the CPU: t from the given density over the range low..high of the model's
    training timesteps, 0 clean and 1 pure noise. Raises TLoRAError for a density that does not suit the model."""
    m = model_sampling
    if isinstance(m, host.ModelSamplingDiscreteFlow | host.ModelSamplingFlux | host.ModelSamplingCosmosRFlow):
        level = (
            torch.rand(count, generator=generator) if density == "uniform" else flow_density(density, count, generator)
        )
        time = (low + (high - low) * level).clamp(min=1e-4)
        if isinstance(m, host.ModelSamplingCosmosRFlow):  # sigma is the ratio of noise to picture
            return (time / (1 - time)).clamp(m.sigma_min.cpu(), m.sigma_max.cpu())
        return time
    if density != "uniform":
        raise TLoRAError(f"timestep_density is {density}, which is for flow models (FLUX, SD3); set it to uniform.")
    first, last = math.floor(low * len(m.sigmas)), math.ceil(high * len(m.sigmas))
    indices = torch.randint(first, max(last, first + 1), (count,), generator=generator)
    return m.sigmas.cpu().float()[indices]


def min_snr_weight(model_sampling, sigma: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of the squared error of the model's prediction (Hang et al. 2023) at sigma [B].

    Raises TLoRAError for models that predict neither noise nor v.
    """
    m, snr = model_sampling, sigma.clamp(min=1e-6) ** -2
    predicts_v = isinstance(m, host.V_PREDICTION) or isinstance(m, _UNSCALED_V)
    if isinstance(m, host.X0) or not (predicts_v or isinstance(m, host.EPS)):
        raise TLoRAError("min_snr_gamma is for models that predict noise or v; set it to 0 for this one.")
    return snr.clamp(max=gamma) / (snr + 1 if predicts_v else snr)
