"""Makes a model of the host from a family's configuration. Needs the host importable."""

import json

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch

from .family import Family
from .tloras import attention_layers

_FAMILY = "random_models.family"  # the key by which a MODEL and its clones keep their family


def family_of(model) -> Family:
    """The family that a MODEL, or what it was cloned from, was made of."""
    return model.get_attachment(_FAMILY)


def config_of(family: Family):
    """The host's config of the family, as it detects it in a file."""
    config = getattr(supported, family.host_class)(dict(family.config))
    # The class has values of its own for some entries, and they come before the config's.
    config.unet_config.update({key: value for key, value in family.config.items() if key in config.unet_extra_config})
    return config


def model_of(family: Family, **options):
    """A MODEL of the family; `options` are those of `_filled`."""
    model = _filled(config_of(family), **options)
    model.set_attachments(_FAMILY, family)
    return model


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
    _fill(base.diffusion_model, drawn_on or device, seed)
    return _model(base, device)


def _fill(network: torch.nn.Module, device: torch.device, seed: int) -> None:
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        is_gain = parameter.ndim == 1 and name.endswith(("weight", "scale"))
        drawn = torch.randn(parameter.shape, generator=generator, device=device)
        parameter.data.copy_(is_gain + drawn * fan_in**-0.5)
    # Buffers that come with a model's file: until then they are memory as it was found.
    for name, buffer in network.named_buffers():
        if name.endswith(("pos_embed", "_conditioning")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, device=device) * 0.1)
        elif name.endswith("rope.inv_freq"):
            buffer.copy_(100.0 ** -(torch.arange(len(buffer)) / len(buffer)))


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
