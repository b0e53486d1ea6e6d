"""Models of the host's own classes with random weights, at any size, for tests and benchmarks. Needs the host
importable."""

import json
import re

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch

from tlora_core import LowRank, RankSchedule, TLoRAFile
from tlora_core.hosts.comfy.model.noise import domain, num_timesteps

SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX2_KLEIN_9B = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "context_in_dim": 12288,
    "vec_in_dim": None,
    "hidden_size": 4096,
    "mlp_ratio": 3.0,
    "num_heads": 32,
    "depth": 8,
    "depth_single_blocks": 24,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "qkv_bias": False,
    "ops_bias": False,
    "guidance_embed": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "txt_ids_dims": [3],
}
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "qk_norm": True,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
KREA2 = {
    "image_model": "krea2",
    "features": 6144,
    "channels": 16,
    "patch": 2,
    "layers": 28,
    "heads": 48,
    "kvheads": 12,
    "txtlayers": 12,
    "txtdim": 2560,
}
QWEN_IMAGE = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 64,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
}
_STREAMS = {"hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "context_in_dim": 64}
_NEXT = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": 64,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 1,
    "n_kv_heads": 1,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 64, 64],
}
# Each family's class in the host and its config with few and narrow layers, else as the host detects it in the real
# files.
SMALL = {
    "sd15": ("SD15", {**_UNET, "use_linear_in_transformer": False, "num_heads": 8}),
    "sd2": ("SD20", {**_UNET, "num_head_channels": 64}),
    "sdxl-refiner": (
        "SDXLRefiner",
        {
            **_UNET,
            "num_head_channels": 64,
            "num_classes": "sequential",
            "adm_in_channels": 64 + 5 * 256,
            "transformer_depth": [0, 1],
            "transformer_depth_output": [0, 0, 1, 1],
        },
    ),
    "ssd-1b": (
        "SSD1B",
        {
            **_UNET,
            "num_head_channels": 64,
            "num_classes": "sequential",
            "adm_in_channels": 64 + 6 * 256,
            "transformer_depth": [0, 2],
            "transformer_depth_middle": -1,
            "transformer_depth_output": [0, 0, 1, 2],
        },
    ),
    "sd3": (
        "SD3",
        {
            "in_channels": 16,
            "input_size": None,
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 192,
            "num_patches": 192**2,
            "patch_size": 2,
            "depth": 2,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 64, "out_features": 128},
            },
        },
    ),
    "flux": ("Flux", {**FLUX, **_STREAMS, "vec_in_dim": 32}),
    "chroma": (
        "Chroma",
        {
            "image_model": "chroma",
            **_STREAMS,
            "vec_in_dim": None,
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": 2,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "in_dim": 64,
            "out_dim": 256,
            "hidden_dim": 64,
            "n_layers": 1,
            "txt_ids_dims": [],
        },
    ),
    "hunyuan-video": (
        "HunyuanVideo",
        {
            "image_model": "hunyuan_video",
            **_STREAMS,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": [1, 2, 2],
            "vec_in_dim": 32,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 256,
            "qkv_bias": True,
            "guidance_embed": True,
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
    ),
    "lumina2": ("Lumina2", {**_NEXT, "n_heads": 2, "dim": 192, "rope_theta": 10000.0}),
    "z-image": (
        "ZImage",
        {
            **_NEXT,
            "n_heads": 3,
            "n_kv_heads": 3,
            "dim": 288,
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
    ),
    "krea2": (
        "Krea2",
        {
            "image_model": "krea2",
            "features": 256,
            "channels": 16,
            "patch": 2,
            "layers": 2,
            "heads": 4,
            "kvheads": 1,
            "txtlayers": 2,
            "txtdim": 64,
            "txtheads": 2,
            "txtkvheads": 2,
        },
    ),
    "qwen-image": (
        "QwenImage",
        {"image_model": "qwen_image", "num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64},
    ),
    "wan": (
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 128,
            "out_dim": 16,
            "num_heads": 1,
            "ffn_dim": 256,
            "num_layers": 2,
            "patch_size": (1, 2, 2),
            "freq_dim": 256,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "in_dim": 16,
            "text_dim": 64,
            "text_len": 16,
        },
    ),
}
LAYERS = re.compile(
    r"^(?!txtfusion).*(attn|attention)\d?\S*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|qkv|proj|out|w?[qkvo])$|"
    r"single_blocks\.\d+\.linear1$"
)


def sdxl(width: int = 320, depths: tuple[int, int, int] = (0, 2, 10), context: int = 2048, **options):
    """SDXL's U-Net, `width` channels wide at its top: 320 is the real one, 64 has 158 million parameters, or 110
    million with a fifth of the context too. depths: transformer blocks in a row on each level."""
    config = supported.SDXL(
        {
            **SDXL,
            "model_channels": width,
            "context_dim": context,
            "transformer_depth_middle": depths[-1],
            "transformer_depth": [depth for depth in depths for _ in range(2)],
            "transformer_depth_output": [depth for depth in depths for _ in range(3)],
        }
    )
    config.unet_config.update(num_heads=-1, num_head_channels=64)
    return _filled(config, **options)


def flux(hidden: int = 3072, blocks: tuple[int, int] = (19, 38), context: int = 4096, vector: int = 768, **options):
    """FLUX.1's transformer with heads of 128; `blocks` of two streams and of one."""
    size = {
        "hidden_size": hidden,
        "num_heads": hidden // 128,
        "depth": blocks[0],
        "depth_single_blocks": blocks[1],
        "context_in_dim": context,
        "vec_in_dim": vector,
    }
    return _filled(supported.Flux({**FLUX, **size}), **options)


def klein(**options):
    """FLUX.2 Klein 9B's transformer."""
    return _filled(supported.Flux2(dict(FLUX2_KLEIN_9B)), **options)


def z_image(**options):
    """Z-Image's transformer, 6 billion parameters."""
    return _filled(supported.ZImage(dict(Z_IMAGE)), **options)


def krea2(**options):
    """Krea 2's transformer."""
    return _filled(supported.Krea2(dict(KREA2)), **options)


def qwen_image(**options):
    """Qwen-Image's transformer, 20 billion parameters."""
    return _filled(supported.QwenImage(dict(QWEN_IMAGE)), **options)


def small(family: str, **options):
    """The family's model at a size for tests."""
    name, size = SMALL[family]
    return _filled(getattr(supported, name)(dict(size)), **options)


def _filled(
    config, dtype=torch.float32, storage=None, quantised=None, device=None, seed: int = 0, ops=None, drawn_on=None
):
    """A MODEL whose matrices keep the size of what goes through them, and with every gain and bias away from 0 and 1;
    on the device "meta" without any numbers.

    dtype: what it computes in. storage: what its weights are stored in, where that differs. quantised: a state dict
    with layers quantised as the host's files have them, to be used instead of random weights. ops: classes of layers
    other than those that the host would choose. drawn_on: the device that draws the weights, where that is not
    `device`: a processor takes minutes for 12 billion.
    """
    config.custom_operations = ops
    device = device or comfy.model_management.get_torch_device()
    config.set_inference_dtype(storage or dtype, dtype if storage or quantised else None)
    config.quant_config = {"mixed_ops": True} if quantised and ops is None else None
    # SD2's files give away by this gain which of them predict v.
    base = config.get_model(
        {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([0.0, 1.0])}, device=device
    )
    if quantised:
        base.diffusion_model.load_state_dict(quantised, assign=True)
        return _model(base, device)
    base.diffusion_model.requires_grad_(False)
    if device.type == "meta":
        return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=device)
    drawn_on = drawn_on or device
    generator = torch.Generator(drawn_on).manual_seed(seed)
    for name, parameter in base.diffusion_model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        is_gain = parameter.ndim == 1 and name.endswith(("weight", "scale"))
        drawn = torch.randn(parameter.shape, generator=generator, device=drawn_on)
        parameter.data.copy_(is_gain + drawn * fan_in**-0.5)
    for name, buffer in base.diffusion_model.named_buffers():
        if name.endswith("pos_embed"):  # SD3 reads it from the file: until then it is memory as it was found
            buffer.copy_(torch.randn(buffer.shape, generator=generator, device=drawn_on) * 0.1)
    return _model(base, device)


def _model(base, device):
    """A MODEL of the kind that the host's loaders make, as its dynamic VRAM has one of its own."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    load_device = comfy.model_management.get_torch_device() if device.type == "cpu" else device
    return kind(base, load_device=load_device, offload_device=torch.device("cpu"))


def quantise(model) -> dict[str, torch.Tensor]:
    """The state dict of the diffusion model with its attention layers quantised to fp8, a scale each, as the host's
    files have them. The model's own weights are rounded to what these are worth."""
    weights = model.model.diffusion_model.state_dict()
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for path in attention_layers(model):
        weight = weights[f"{path}.weight"]
        scale = weight.abs().max() / 400
        eight = (weight / scale).to(torch.float8_e4m3fn)
        weight.copy_(eight.float() * scale)
        weights.update({f"{path}.weight": eight, f"{path}.weight_scale": scale, f"{path}.comfy_quant": note})
    return weights


def attention_layers(model) -> dict[str, torch.nn.Linear]:
    """The attention projections, by module path."""
    return {
        path: m
        for path, m in model.model.diffusion_model.named_modules()
        if hasattr(m, "in_features") and LAYERS.search(path)
    }


def random_tlora(
    model, rank: int = 64, min_rank: int | None = None, size: float = 0.05, seed: int = 0, split=()
) -> TLoRAFile:
    """A T-LoRA on all attention layers, each update about `size` times its weight. Layers whose path ends in one of
    `split` get two, on the second and the last third of their rows, as a T-LoRA on k and v of a fused layer has."""
    generator = torch.Generator().manual_seed(seed)

    def update(rows, columns):
        up, down = torch.randn(rows, 2 * rank, generator=generator), torch.randn(2 * rank, columns, generator=generator)
        return LowRank(up * size * (2 * rank) ** -0.5, down * columns**-0.5, 2)

    layers = {}
    for path, layer in attention_layers(model).items():
        rows, columns = layer.out_features, layer.in_features
        if split and path.endswith(tuple(split)):
            layers.update({f"{path}@{start}": update(rows // 3, columns) for start in (rows // 3, 2 * (rows // 3))})
        else:
            layers[path] = update(rows, columns)
    schedule = RankSchedule(rank, rank // 2 if min_rank is None else min_rank)
    sampling = model.model.model_sampling
    T = num_timesteps(sampling)
    return TLoRAFile(layers, "tlora", schedule, T, domain(sampling), type(model.model.model_config).__name__.lower())


def conditioning(model, tokens: int = 77, seed: int = 0) -> list:
    """CONDITIONING of the widths that the model takes."""
    config, generator = model.model.model_config.unet_config, torch.Generator().manual_seed(seed)
    if config.get("image_model") == "qwen_image":
        config = {"joint_attention_dim": 3584, **config}
    if config.get("image_model") == "krea2":  # which takes the text encoder's states of several layers in one
        config = {**config, "text_dim": config["txtlayers"] * config["txtdim"]}
    embedder = config.get("context_embedder_config", {}).get("params", {}).get("in_features")
    names = ("context_dim", "context_in_dim", "cap_feat_dim", "joint_attention_dim", "text_dim")
    context = next((config[name] for name in names if name in config), embedder)
    pooled = (
        config.get("vec_in_dim") or config.get("adm_in_channels") or 8
    )  # where no layer takes it, the host may still ask for it
    if "num_classes" in config:  # SDXL's numbers of the picture's size and place come behind the text's
        pooled -= 256 * (5 if isinstance(model.model, comfy.model_base.SDXLRefiner) else 6)
    text = torch.randn(1, tokens, context, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]


def latent(model, size: int = 8) -> torch.Tensor:
    """An empty latent of one picture, or of a video of one."""
    kind = model.model.latent_format
    return torch.zeros(1, kind.latent_channels, *[1] * (kind.latent_dimensions - 2), size, size)
