"""Transformers that make videos, of which a picture is one of one frame, with few and narrow layers, else as the host
detects them in the real files."""

from .family import Family, anima_text, text

_HUNYUAN = {
    "image_model": "hunyuan_video",
    "hidden_size": 256,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "context_in_dim": 64,
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
}
_HUNYUAN15 = {
    **_HUNYUAN,
    "out_channels": 32,
    "patch_size": [1, 1, 1],
    "vec_in_dim": None,
    "guidance_embed": False,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 64,
    "meanflow_sum": True,
}
_WAN = {
    "image_model": "wan2.1",
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
}
_COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 64,
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "num_blocks": 2,
    "num_heads": 1,
}
_COSMOS1 = {
    **_COSMOS,
    "image_model": "cosmos",
    "block_config": "FA-CA-MLP",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "pos_emb_learnable": False,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
    "rope_h_extrapolation_ratio": 1.0,
    "rope_w_extrapolation_ratio": 1.0,
    "rope_t_extrapolation_ratio": 2.0,
}
_PREDICT2 = {
    **_COSMOS,
    "image_model": "cosmos_predict2",
    "pos_emb_learnable": True,
    "min_fps": 1,
    "max_fps": 30,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
_COGVIDEOX = {
    "image_model": "cogvideox",
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "time_embed_dim": 64,
    "num_layers": 2,
    "in_channels": 16,
    "patch_size": 2,
    "text_embed_dim": 64,
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": False,
}
_LTX = {
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "cross_attention_dim": 128,
    "caption_channels": 64,
}


def _wan(host_class: str, model_type: str, **changes) -> Family:
    return Family(host_class, {**_WAN, "model_type": model_type, **changes}, text(64))


def _hunyuan(host_class: str, config: dict, **changes) -> Family:
    return Family(host_class, {**config, **changes}, text(64, config["vec_in_dim"] or 8))


def _cosmos(host_class: str, config: dict, **changes) -> Family:
    return Family(host_class, {**config, **changes}, text(64))


VIDEOS = {
    "mochi": Family(
        "GenmoMochi",
        {
            "image_model": "mochi_preview",
            "depth": 2,
            "patch_size": 2,
            "num_heads": 2,
            "hidden_size_x": 256,
            "hidden_size_y": 128,
            "mlp_ratio_x": 48.0,  # the host takes one width alone behind it, that of the real size
            "mlp_ratio_y": 4.0,
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "patch_embed_bias": True,
            "posenc_preserve_area": True,
            "timestep_mlp_bias": True,
            "attend_to_padding": False,
            "timestep_scale": 1000.0,
            "use_t5": True,
            "t5_feat_dim": 64,
            "t5_token_length": 16,
            "rope_theta": 10000.0,
        },
        text(64, tokens=16, mask=True),
    ),
    "ltxv": Family("LTXV", {**_LTX, "image_model": "ltxv", "num_layers": 2}, text(64, mask=True)),
    "ltxav": Family(
        "LTXAV",
        {
            **_LTX,
            "image_model": "ltxav",
            "num_layers": 1,
            "audio_attention_head_dim": 32,
            "audio_num_attention_heads": 2,
            "audio_cross_attention_dim": 64,
            "connector_attention_head_dim": 32,
            "connector_num_attention_heads": 2,
            "connector_num_layers": 1,
        },
        text(64),
        latents=((128, 1, 8, 8), (8, 5, 16)),
    ),
    "minimax-h3": Family(
        "MiniMaxH3",
        {
            "image_model": "minimax_h3",
            "num_layers": 2,
            "token_refiner_num_layers": 1,
            "hidden_size": 96,
            "latents_dim": 24,
            "audio_latents_dim": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 1,
            "ffn_hidden_size": 128,
            "text_dim": 64,
            "timestep_input_dim": 256,
            "time_embed_hidden_size": 64,
            "time_embed_dim": 32,
            "rope_inv_freq_len": 16,
        },
        text(64),
        latents=((24, 2, 8, 8), (32, 2, 5)),
    ),
    "hunyuan-video": _hunyuan("HunyuanVideo", _HUNYUAN),
    "hunyuan-video-i2v": _hunyuan("HunyuanVideoI2V", _HUNYUAN, in_channels=33),
    "skyreels-i2v": _hunyuan("HunyuanVideoSkyreelsI2V", _HUNYUAN, in_channels=32, guidance_embed=False),
    "hunyuan-video15": _hunyuan("HunyuanVideo15", _HUNYUAN15, in_channels=65),
    "hunyuan-video15-sr": _hunyuan("HunyuanVideo15_SR_Distilled", _HUNYUAN15, in_channels=98, meanflow=True),
    "hunyuan-image21-refiner": _hunyuan(
        "HunyuanImage21Refiner",
        {**_HUNYUAN, "vec_in_dim": None},
        in_channels=128,
        out_channels=64,
        patch_size=[1, 1, 1],
        meanflow=True,
    ),
    "cosmos-t2v": _cosmos("CosmosT2V", _COSMOS1),
    "cosmos-i2v": _cosmos("CosmosI2V", _COSMOS1, in_channels=17),
    "cosmos-predict2": _cosmos("CosmosT2IPredict2", _PREDICT2),
    "cosmos-predict2-i2v": _cosmos("CosmosI2VPredict2", _PREDICT2, in_channels=17),
    "anima": Family("Anima", {**_PREDICT2, "image_model": "anima", "crossattn_emb_channels": 1024}, anima_text),
    "wan": _wan("WAN21_T2V", "t2v"),
    "wan21-i2v": _wan("WAN21_I2V", "i2v", in_dim=36),
    "wan21-fun": _wan("WAN21_FunControl2V", "i2v", in_dim=48),
    "wan21-vace": _wan("WAN21_Vace", "vace", vace_in_dim=96, vace_layers=1),
    "wan21-camera": _wan("WAN21_Camera", "camera", in_dim=32),
    "wan21-humo": _wan("WAN21_HuMo", "humo", in_dim=36),
    "wan21-scail": _wan("WAN21_SCAIL", "scail", in_dim=20),
    "wan21-scail2": _wan("WAN21_SCAIL2", "scail2", in_dim=20),
    "wan21-causal": _wan("WAN21_CausalAR_T2V", "t2v", causal_ar=True),
    "wan21-flowrvs": _wan("WAN21_FlowRVS", "flow_rvs"),
    "wan22-5b": _wan("WAN22_T2V", "t2v", in_dim=48, out_dim=48),
    "wan22-14b-i2v": _wan("WAN21_T2V", "t2v", in_dim=36),
    "wan22-camera": _wan("WAN22_Camera", "camera_2.2", in_dim=36),
    "wan22-s2v": _wan("WAN22_S2V", "s2v", audio_dim=32, audio_inject_layers=[0]),
    "wan22-animate": _wan("WAN22_Animate", "animate", in_dim=36, num_layers=5),
    "wandancer": _wan(
        "WAN22_WanDancer", "wandancer", in_dim=36, audio_inject_layers=[0], music_dim=64, music_latent_dim=64
    ),
    "kandinsky5": Family(
        "Kandinsky5",
        {
            "image_model": "kandinsky5",
            "model_dim": 128,
            "axes_dims": (16, 24, 24),
            "time_dim": 64,
            "ff_dim": 128,
            "visual_embed_dim": 132,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "in_text_dim": 64,
            "in_text_dim2": 32,
        },
        text(64, 32),
    ),
    "cogvideox-2b": Family("CogVideoX_T2V", _COGVIDEOX, text(64)),
    "cogvideox-i2v": Family(
        "CogVideoX_I2V", {**_COGVIDEOX, "in_channels": 32, "use_rotary_positional_embeddings": True}, text(64)
    ),
    "cogvideox-inpaint": Family(
        "CogVideoX_Inpaint", {**_COGVIDEOX, "in_channels": 48, "use_rotary_positional_embeddings": True}, text(64)
    ),
    "seedvr2": Family(
        "SeedVR2",
        {
            "image_model": "seedvr2",
            "vid_dim": 256,
            "heads": 2,
            "num_layers": 2,
            "norm_eps": 1e-5,
            "mlp_type": "swiglu",
            "vid_out_norm": True,
            "mm_layers": 1,
            "txt_in_dim": 64,
        },
        text(64, condition=(17, 1, 8, 8)),
    ),
}
