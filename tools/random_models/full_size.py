"""Models at their real sizes, or at any other."""

from .family import Family, text
from .making import model_of

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
    "num_heads": -1,
    "num_head_channels": 64,
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


def sdxl(width: int = 320, depths: tuple[int, int, int] = (0, 2, 10), context: int = 2048, **options):
    """SDXL's U-Net, `width` channels wide at its top: 320 is the real one, 64 has 158 million parameters, or 110
    million with a fifth of the context too. depths: transformer blocks in a row on each level."""
    config = {
        **SDXL,
        "model_channels": width,
        "context_dim": context,
        "transformer_depth_middle": depths[-1],
        "transformer_depth": [depth for depth in depths for _ in range(2)],
        "transformer_depth_output": [depth for depth in depths for _ in range(3)],
    }
    return model_of(Family("SDXL", config, text(context, 1280)), **options)


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
    return model_of(Family("Flux", {**FLUX, **size}, text(context, vector)), **options)


def klein(**options):
    """FLUX.2 Klein 9B's transformer."""
    return model_of(Family("Flux2", FLUX2_KLEIN_9B, text(12288)), **options)


def z_image(**options):
    """Z-Image's transformer, 6 billion parameters."""
    return model_of(Family("ZImage", Z_IMAGE, text(2560)), **options)


def krea2(**options):
    """Krea 2's transformer, whose text is its encoder's states of several layers in one."""
    return model_of(Family("Krea2", KREA2, text(KREA2["txtlayers"] * KREA2["txtdim"])), **options)


def qwen_image(**options):
    """Qwen-Image's transformer, 20 billion parameters."""
    return model_of(Family("QwenImage", QWEN_IMAGE, text(3584)), **options)
