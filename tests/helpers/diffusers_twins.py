"""diffusers' pipelines around the host's own random models: the same weights in diffusers' classes, and the same
sampling in both.

Text encoders and VAE are left out: pipelines take embeddings and give latents without them.
"""

from dataclasses import replace

import torch
from foreign_files import generator

# A layer of each model: diffusers' name, ComfyUI's layer and its module, the layer's first row in that.
LAYERS = {
    "sdxl": (
        "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k",
        "input_blocks.8.1.transformer_blocks.1.attn2.to_k",
        0,
    ),
    "flux": ("single_transformer_blocks.1.attn.to_v", "single_blocks.1.linear1", 512),
}


def sdxl_twins(seed: int = 0):
    """(MODEL, StableDiffusionXLPipeline) of one small random U-Net."""
    import comfy.utils
    import random_models
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    model = random_models.sdxl(32, (0, 1, 2), 64, seed=seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        transformer_layers_per_block=(0, 1, 2),
        attention_head_dim=(1, 1, 2),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    weights = model.model.diffusion_model.state_dict()
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    unet.load_state_dict({name: weights[table[name]] for name in unet.state_dict()})
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return model, StableDiffusionXLPipeline(**dict.fromkeys(parts), unet=unet, scheduler=scheduler)


def flux_twins(seed: int = 0):
    """(MODEL, FluxPipeline) of one small random transformer."""
    import comfy.utils
    import random_models
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    model = random_models.flux(256, (2, 2), 64, 32, seed=seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    weights = model.model.diffusion_model.state_dict()
    state = {}
    for name, place in comfy.utils.flux_to_diffusers(model.model.model_config.unet_config).items():
        key, rows, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        if key in weights and name in transformer.state_dict():
            weight = weights[key] if rows is None else weights[key].narrow(*rows)
            state[name] = weight if change is None else change(weight)
    transformer.load_state_dict(state)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return model, FluxPipeline(**dict.fromkeys(parts), transformer=transformer, scheduler=scheduler)


STEPS, SIZE = 6, 8  # latents of 8x8, for pictures of 64x64


def picture_in_comfyui(model, pipe, guidance=4.0):
    """Latents [1, C, 8, 8], on the host's scale, of a sampling with Euler on the pipeline's sigmas."""
    import comfy.sample
    import comfy.samplers
    import random_models

    sigmas = pipe.scheduler.sigmas.clone()
    positive, negative = (random_models.conditioning(model, seed=seed) for seed in (1, 2))
    is_flux = hasattr(pipe, "transformer")
    if is_flux:  # guidance is one of its inputs
        positive[0][1]["guidance"] = guidance
    noise = start(is_flux)
    sampled = comfy.sample.sample_custom(
        model,
        noise,
        1.0 if is_flux else guidance,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
    )
    return model.model.process_latent_in(sampled)


def picture_in_diffusers(model, pipe, guidance=4.0):
    """The same by the pipeline."""
    import random_models

    positive, negative = (random_models.conditioning(model, seed=seed)[0] for seed in (1, 2))
    is_flux = hasattr(pipe, "transformer")
    options = dict(
        height=8 * SIZE, width=8 * SIZE, num_inference_steps=STEPS, guidance_scale=guidance, output_type="latent"
    )
    options |= dict(prompt_embeds=positive[0], pooled_prompt_embeds=positive[1]["pooled_output"])
    pipe.set_progress_bar_config(disable=True)
    if is_flux:
        packed = pipe._pack_latents(start(is_flux), 1, 16, SIZE, SIZE)
        latents = pipe(**options, latents=packed).images
        return pipe._unpack_latents(latents, 8 * SIZE, 8 * SIZE, pipe.vae_scale_factor)
    first = start(is_flux)
    if type(pipe.scheduler).__name__ == "EulerDiscreteScheduler":
        # The host scales noise by the first sigma, this scheduler by init_noise_sigma.
        pipe.scheduler.set_timesteps(STEPS)
        first *= pipe.scheduler.sigmas[0] / pipe.scheduler.init_noise_sigma
    options |= dict(negative_prompt_embeds=negative[0], negative_pooled_prompt_embeds=negative[1]["pooled_output"])
    return pipe(**options, latents=first).images


def start(is_flux):
    return torch.randn(1, 16 if is_flux else 4, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def evaluate(twins, timesteps):
    """One evaluation of the denoiser, on a batch with these timesteps or one for all of a batch of two."""
    g, size, dtype = (
        generator(),
        len(timesteps) if isinstance(timesteps, list) else 2,
        next(twins.denoiser.parameters()).dtype,
    )
    timestep = torch.tensor(timesteps)

    def random(*shape):
        return torch.randn(size, *shape, generator=g).to(dtype)

    with torch.no_grad():
        if twins.kind == "sdxl":
            added = {"text_embeds": random(1280), "time_ids": torch.full((size, 6), 64.0)}
            return twins.denoiser(random(4, 8, 8), timestep, random(7, 64), added_cond_kwargs=added).sample
        return twins.denoiser(
            hidden_states=random(16, 64),
            encoder_hidden_states=random(7, 64),
            pooled_projections=random(32),
            timestep=timestep.expand(size),
            guidance=torch.full((size,), 3.5),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(7, 3),
        ).sample


def with_layers(tlora, layers):
    return replace(tlora, layers=layers)
