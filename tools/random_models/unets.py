"""U-Nets with few and narrow layers, else as the host detects them in the real files."""

from .family import Family, text

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
_SD15 = {**_UNET, "use_linear_in_transformer": False, "num_heads": 8}
# SDXL's numbers of the picture's size and place, 6 of 256 columns each, come behind the pooled text; the refiner's are
# 5.
_SDXL = {
    **_UNET,
    "num_head_channels": 64,
    "num_classes": "sequential",
    "adm_in_channels": 64 + 6 * 256,
    "transformer_depth": [0, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 2, 2],
}


def _sdxl(host_class: str, **changes) -> Family:
    return Family(host_class, {**_SDXL, **changes}, text(64, 64))


UNETS = {
    "sd15": Family("SD15", _SD15, text(64)),
    "sd15-inpaint": Family("SD15", {**_SD15, "in_channels": 9}, text(64)),
    "sd15-ip2p": Family("SD15_instructpix2pix", {**_SD15, "in_channels": 8}, text(64)),
    "sd2": Family("SD20", {**_UNET, "num_head_channels": 64}, text(64)),
    "sd-x4-upscaler": Family(
        "SD_X4Upscaler",
        {**_UNET, "in_channels": 7, "num_heads": 8, "num_classes": 1000, "disable_self_attentions": [True, False]},
        text(64),
    ),
    "sdxl": _sdxl("SDXL"),
    "sdxl-inpaint": _sdxl("SDXL", in_channels=9),
    "sdxl-ip2p": _sdxl("SDXL_instructpix2pix", in_channels=8),
    "sdxl-refiner": _sdxl(
        "SDXLRefiner",
        adm_in_channels=64 + 5 * 256,
        transformer_depth=[0, 1],
        transformer_depth_middle=1,
        transformer_depth_output=[0, 0, 1, 1],
    ),
    # A depth of -1 leaves the attention in the middle out, and -2 the whole middle block.
    "ssd-1b": _sdxl("SSD1B", transformer_depth_middle=-1, transformer_depth_output=[0, 0, 1, 2]),
    "vega": _sdxl(
        "Segmind_Vega",
        transformer_depth=[0, 1],
        transformer_depth_middle=-1,
        transformer_depth_output=[0, 0, 1, 1],
    ),
    "koala-700m": _sdxl("KOALA_700M", transformer_depth_middle=-2),
    "koala-1b": _sdxl("KOALA_1B", transformer_depth_middle=6),
    "lotus-d": Family(
        "LotusD",
        {**_UNET, "num_head_channels": 64, "num_classes": "sequential", "adm_in_channels": 4},
        text(64),
    ),
    "svd": Family(
        "SVD_img2vid",
        {
            **_UNET,
            "in_channels": 8,
            "num_head_channels": 64,
            "num_classes": "sequential",
            "adm_in_channels": 3 * 256,
            "use_temporal_attention": True,
            "use_temporal_resblock": True,
            "video_kernel_size": [3, 1, 1],
            "use_spatial_context": True,
            "merge_strategy": "learned_with_images",
            "merge_factor": 0.0,
            "extra_ff_mix_layer": True,
        },
        text(64, tokens=1),
    ),
    "cascade-c": Family(
        "Stable_Cascade_C",
        {
            "stable_cascade_stage": "c",
            "c_cond": 64,
            "c_hidden": [64, 64],
            "nhead": [2, 2],
            "blocks": [[1, 1], [1, 1]],
            "c_clip_text": 64,
            "c_clip_text_pooled": 64,
        },
        text(64, 64),
    ),
    "cascade-b": Family(
        "Stable_Cascade_B",
        {
            "stable_cascade_stage": "b",
            "c_cond": 64,
            "c_hidden": [32, 64, 64, 64],
            "nhead": [-1, -1, 2, 2],
            "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "c_clip": 64,
        },
        text(64, pooled_output=(1, 64)),
        side=16,
    ),
}
