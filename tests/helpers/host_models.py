"""Small random models in the host's own classes. Import inside tests that use the `comfy` fixture."""

from pathlib import Path

import torch


def random_unet(seed: int = 0, dtype=torch.float32):
    """The tiny base's architecture with random weights everywhere, so that every layer matters."""
    import comfy.model_management
    import comfy.model_patcher

    from tlora_core.tiny import comfy as tiny_base

    torch.manual_seed(seed)
    base, _ = tiny_base.new_modules()
    for name, parameter in base.diffusion_model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("weight") and parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    base.diffusion_model.to(dtype)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=torch.device("cpu"))


def tiny_base(quantised=None):
    """The tiny base as (MODEL, CLIP, VAE), made anew. quantised: a state dict for its U-Net as random_models.quantise
    makes it."""
    import comfy.model_patcher

    from tlora_core.tiny import comfy as tiny_base
    from tlora_core.tiny import world

    with torch.inference_mode():  # as in the host
        model, clip, vae = tiny_base.load(str(Path(world.__file__).parent / "weights" / "tiny_base.safetensors"))
        if quantised:
            config = tiny_base.unet_config()
            config.set_inference_dtype(torch.float32, torch.float32)
            config.quant_config = {"mixed_ops": True}
            base = config.get_model({}, device=model.offload_device)
            tiny_base.set_norm_groups(base.diffusion_model).load_state_dict(quantised, assign=True)
            model = comfy.model_patcher.ModelPatcher(
                base, load_device=model.load_device, offload_device=model.offload_device
            )
    return model, clip, vae


def random_tlora(model, rank: int = 64, min_rank: int = 32, scale: float = 0.1, seed: int = 0, alpha: float = 1.0):
    """A T-LoRA for `model` whose factors have moved by about `scale` from their start."""
    from tlora_core import RankSchedule, TLoRAFile, make_adapters
    from tlora_core.hosts.comfy.model.families import target_layers

    torch.manual_seed(seed)
    shapes = {path: layer.shape for path, layer in target_layers(model).items()}
    adapters = make_adapters("tlora", "last_random", shapes, rank, seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            is_scale = parameter.shape[1] == 1
            parameter.add_(torch.randn_like(parameter) * scale * (1 if is_scale else 0.3))
    layers = {path: adapter.detach() for path, adapter in adapters.items()}
    return TLoRAFile(
        layers, "tlora", RankSchedule(rank, min_rank, alpha), 1000, "discrete", "tinysdxl", "sks", "flower"
    )


def conditioning(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 24, 128, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, 128, generator=generator)}]]


def evaluate(model, sigma, seed: int = 0, size: int = 8):
    """One evaluation of a MODEL as a sampler makes it, on a batch with the given sigmas."""
    import comfy.model_management

    generator = torch.Generator().manual_seed(seed)
    sigma = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1)
    x = torch.randn(len(sigma), 16, size, size, generator=generator) * sigma.view(-1, 1, 1, 1).clamp(min=1)
    y = torch.randn(len(sigma), 1664, generator=generator)
    context = torch.randn(len(sigma), 24, 128, generator=generator)
    comfy.model_management.load_models_gpu([model])
    options = {"wrappers": model.wrappers}
    with torch.inference_mode():
        return model.model.apply_model(x, sigma, c_crossattn=context, y=y, transformer_options=options)


def relative_error(value, reference) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def is_untouched(model) -> bool:
    """No layer has a replaced forward."""
    return not any("forward" in module.__dict__ for module in model.model.diffusion_model.modules())


def random_controlnet(seed: int = 0):
    """A ControlNet of the host's own class for `random_unet`, which hints at full strength from its first step on."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management

    from tlora_core.tiny import comfy as tiny_base

    torch.manual_seed(seed)
    config = {k: v for k, v in tiny_base.UNET_CONFIG.items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, num_head_channels=32).requires_grad_(False)
    tiny_base.set_norm_groups(network)
    for parameter in network.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())
