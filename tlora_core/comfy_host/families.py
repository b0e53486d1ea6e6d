"""Which layers of a model a T-LoRA is trained on."""
import re

import torch
from comfy.model_patcher import ModelPatcher

from ..errors import TLoRAError
from .sampling import diffusion_modules

# The attention projections of the transformer blocks of SD1, SD2 and SDXL U-Nets: the paper's choice (its section 5.1).
_ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$")


def target_layers(model: ModelPatcher) -> dict[str, torch.nn.Linear]:
    """The linear layers a T-LoRA is trained on, by module path. Raises TLoRAError for a model without them."""
    modules = diffusion_modules(model.model.diffusion_model)
    layers = {path: m for path, m in modules.items() if _ATTENTION.search(path) and isinstance(m, torch.nn.Linear)}
    if not layers:
        raise TLoRAError(
            f"model is a {type(model.model).__name__}, which T-LoRA training does not support yet; use a model of the "
            "SD1.5, SD2 or SDXL family.")
    return layers
