"""Models of the host's own classes with random weights, at any size, for tests and benchmarks. Needs the host importable."""
import re

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch

from tlora_core import LowRank, RankSchedule, TLoRAFile

SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_spatial_transformer": True,
    "use_linear_in_transformer": True, "context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816,
    "use_temporal_attention": False, "use_temporal_resblock": False, "legacy": False,
}
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}
LAYERS = re.compile(r"(attn\d?|attn\.|attention)\S*\.(to_q|to_k|to_v|to_out\.0|qkv|proj)$|single_blocks\.\d+\.linear1$")


def sdxl(width: int = 320, **options):
    """SDXL's U-Net, `width` channels wide at its top: 320 is the real one, 64 has 158 million parameters."""
    config = supported.SDXL({**SDXL, "model_channels": width})
    config.unet_config.update(num_heads=-1, num_head_channels=64)
    return _filled(config, **options)


def flux(hidden: int = 3072, blocks: tuple[int, int] = (19, 38), context: int = 4096, vector: int = 768, **options):
    """FLUX.1's transformer with heads of 128; `blocks` of two streams and of one."""
    size = {"hidden_size": hidden, "num_heads": hidden // 128, "depth": blocks[0], "depth_single_blocks": blocks[1],
            "context_in_dim": context, "vec_in_dim": vector}
    return _filled(supported.Flux({**FLUX, **size}), **options)


def sd3(depth: int = 24, context: int = 4096, vector: int = 2048, **options):
    """SD3's transformer, 64 x depth wide."""
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": context, "out_features": 64 * depth}}
    return _filled(supported.SD3({
        "in_channels": 16, "input_size": None, "pos_embed_scaling_factor": None, "pos_embed_max_size": 192,
        "num_patches": 192**2, "patch_size": 2, "depth": depth, "adm_in_channels": vector,
        "context_embedder_config": embedder}), **options)


def _filled(config, dtype=torch.float32, storage=None, quantised=None, device=None, seed: int = 0):
    """A MODEL whose matrices keep the size of what goes through them, and with every gain and bias away from 0 and 1.

    dtype: what it computes in. storage: what its weights are stored in, where that differs. quantised: a state dict with
    layers quantised as the host's files have them, to be used instead of random weights.
    """
    device = device or comfy.model_management.get_torch_device()
    config.set_inference_dtype(storage or dtype, dtype if storage or quantised else None)
    config.quant_config = {"mixed_ops": True} if quantised else None
    base = config.get_model({}, device=device)
    if quantised:
        base.diffusion_model.load_state_dict(quantised, assign=True)
        return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in base.diffusion_model.named_parameters():
        parameter.requires_grad_(False)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        is_gain = parameter.ndim == 1 and name.endswith(("weight", "scale"))
        parameter.data.copy_(is_gain + torch.randn(parameter.shape, generator=generator, device=device) * fan_in**-0.5)
    for name, buffer in base.diffusion_model.named_buffers():
        if name.endswith("pos_embed"):  # SD3 reads it from the file: until then it is memory as it was found
            buffer.copy_(torch.randn(buffer.shape, generator=generator, device=device) * 0.1)
    return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=torch.device("cpu"))


def attention_layers(model) -> dict[str, torch.nn.Linear]:
    """The attention projections, by module path."""
    return {path: m for path, m in model.model.diffusion_model.named_modules()
            if hasattr(m, "in_features") and LAYERS.search(path)}


def random_tlora(model, rank: int = 64, min_rank: int | None = None, size: float = 0.05, seed: int = 0, split=()) -> TLoRAFile:
    """A T-LoRA on all attention layers, each update about `size` times its weight. Layers whose path ends in one of `split`
    get two, on the second and the last third of their rows, as a T-LoRA on k and v of a fused layer has."""
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
    discrete = hasattr(model.model.model_sampling, "num_timesteps") and not hasattr(model.model.model_sampling, "shift")
    schedule = RankSchedule(rank, rank // 2 if min_rank is None else min_rank)
    return TLoRAFile(layers, "tlora", schedule, 1000 if discrete else 1, "discrete" if discrete else "flow", "random")


def conditioning(model, tokens: int = 77, seed: int = 0) -> list:
    """CONDITIONING of the widths that the model takes."""
    config, generator = model.model.model_config.unet_config, torch.Generator().manual_seed(seed)
    embedder = config.get("context_embedder_config", {}).get("params", {}).get("in_features")
    context = config.get("context_dim") or config.get("context_in_dim") or embedder
    pooled = 1280 if "context_dim" in config else config.get("vec_in_dim") or config["adm_in_channels"]
    return [[torch.randn(1, tokens, context, generator=generator), {"pooled_output": torch.randn(1, pooled, generator=generator)}]]
