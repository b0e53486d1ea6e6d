"""The tiny base model built from the host's classes: SDXL's U-Net, text encoder and wrappers in a reduced config."""

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from .autoencoder import DECODED_BY, ENCODED_BY, LATENT_CHANNELS, TinyAutoencoder
from .tokenizer import END, MAX_TOKENS, PAD, START, VOCABULARY_SIZE, WordTokenizer

TEXT_WIDTH = 128
NORM_GROUPS = 8
UNET_CONFIG = {
    "image_size": 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 96,
    "channel_mult": [1, 1],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [1, 1, 2, 2],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": TEXT_WIDTH,
    "num_classes": "sequential",
    "adm_in_channels": TEXT_WIDTH + 6 * 256,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
}
TEXT_CONFIG = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "max_position_embeddings": MAX_TOKENS,
    "eos_token_id": END,
}


class TinyLatent(comfy.latent_formats.LatentFormat):
    """Halves latents of unit variance before noising, so that at the last timestep noise hides even their mean."""

    scale_factor = 0.5
    latent_channels = LATENT_CHANNELS


class TinySDXL(comfy.supported_models.SDXL):
    """SDXL with this file's U-Net config; noise prediction, 1000 timesteps."""

    unet_config = UNET_CONFIG
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    latent_format = TinyLatent

    def inpaint_model(self):
        return False  # the host treats more than four input channels as an inpainting model

    def clip_target(self, state_dict={}):
        return comfy.supported_models_base.ClipTarget(TinyTokenizer, TinyTextModel)


class _TextTransformer(comfy.clip_model.CLIPTextModel):
    """The host's CLIP text model with a vocabulary of a few hundred words instead of 49408."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        self.set_input_embeddings(operations.Embedding(VOCABULARY_SIZE, TEXT_WIDTH, dtype=dtype, device=device))


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options,
            max_length=MAX_TOKENS,
            textmodel_json_config=dict(TEXT_CONFIG),
            model_class=_TextTransformer,
            special_tokens={"start": START, "end": END, "pad": PAD},
        )


class TinyTextModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=_TextEncoder)


class _WordsTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(
            max_length=MAX_TOKENS,
            pad_with_end=False,
            embedding_directory=embedding_directory,
            embedding_size=TEXT_WIDTH,
            tokenizer_class=WordTokenizer,
            tokenizer_data=tokenizer_data,
        )


class TinyTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data, tokenizer=_WordsTokenizer
        )


def set_norm_groups(unet: torch.nn.Module) -> torch.nn.Module:
    """Lowers the number of groups, which the host's U-Net hard-codes as 32. In such narrow layers, normalisation would
    erase the mean of a group of a few channels, the picture's overall colour."""
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = NORM_GROUPS
    return unet


def unet_config(dtype=torch.float32) -> TinySDXL:
    config = TinySDXL(dict(UNET_CONFIG))
    config.set_inference_dtype(dtype, None)
    return config


def new_modules() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Untrained base (host's SDXL BaseModel) and text transformer in float32 on the CPU, for training from scratch.

    The host's layers skip initialisation, as they expect loaded weights. Here they use torch's initialisation, and the
    last convolution of each block starts at zero, as usual in diffusion U-Nets.
    """
    base = comfy.model_base.SDXL(unet_config())
    set_norm_groups(base.diffusion_model)
    text = _TextTransformer(dict(TEXT_CONFIG), torch.float32, "cpu", comfy.ops.disable_weight_init)
    for model in (base.diffusion_model, text):
        model.requires_grad_(True)
        for module in model.modules():
            for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
                if isinstance(module, kind):
                    kind.reset_parameters(module)
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=0.02 if module.num_embeddings == MAX_TOKENS else 0.3)
    for name, module in base.diffusion_model.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return base, text


def load(path, disable_dynamic: bool = False) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the tiny base from its safetensors file, for the stock nodes. disable_dynamic: turns off
    the host's on-demand loading of weights, which only the CLIP uses here."""
    weights = {k: v.float() for k, v in comfy.utils.load_torch_file(path, safe_load=True).items()}
    part = lambda prefix: {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}  # noqa: E731
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    config = unet_config()
    base = config.get_model({}, device=offload)
    set_norm_groups(base.diffusion_model)
    base.diffusion_model.load_state_dict(part("model.diffusion_model."), strict=True)
    model = comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=offload)
    text = {f"clip_l.{k}": v for k, v in part("conditioner.embedders.0.").items()}
    clip = comfy.sd.CLIP(
        config.clip_target(),
        tokenizer_data={},
        parameters=sum(v.numel() for v in text.values()),
        disable_dynamic=disable_dynamic,
    )
    clip.cond_stage_model.load_state_dict(text, strict=False)
    vae = _load_vae(part("first_stage_model."))
    for number, patcher in enumerate((model, clip.patcher, vae.patcher)):
        patcher.cached_patcher_init = _reloaded, (path, number)
    return model, clip, vae


def _reloaded(path, number: int, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A copy with its own weights; the host requests it for its Train LoRA node, hooks on a CLIP, and a second GPU."""
    model, clip, vae = load(path, disable_dynamic)
    return (model, clip.patcher, vae.patcher)[number]


def _load_vae(weights) -> comfy.sd.VAE:
    """The host's VAE object with our autoencoder. Its constructor only builds architectures that it knows, so it first
    builds the smallest of them, which our module then replaces."""
    smallest = {
        "ch": 32,
        "ch_mult": [1],
        "num_res_blocks": 0,
        "attn_resolutions": [],
        "in_channels": 3,
        "out_ch": 3,
        "z_channels": LATENT_CHANNELS,
        "resolution": 64,
        "double_z": True,
        "dropout": 0.0,
    }
    params = {"ddconfig": smallest, "embed_dim": LATENT_CHANNELS}
    vae = comfy.sd.VAE(sd=AutoencoderKL(**params).state_dict(), config={"params": params}, dtype=torch.float32)
    vae.first_stage_model = TinyAutoencoder().eval()
    vae.first_stage_model.load_state_dict(weights, strict=True)
    vae.first_stage_model.requires_grad_(False)
    comfy.model_management.archive_model_dtypes(vae.first_stage_model)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = LATENT_CHANNELS, ENCODED_BY, DECODED_BY
    return vae
