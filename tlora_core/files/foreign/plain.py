"""Plain LoRAs: a pair of matrices for each layer, named as in kohya's scripts, PEFT, diffusers or ComfyUI."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import TLoRAError
from ...method.adapters import LowRank
from ..untrusted import Contents
from .model_description import Matches
from .modules import Parts, is_convolution, matrix, require, scale_of

MAX_CONFIG = 1_000_000  # bytes


def read_plain(contents: Contents, modules: Mapping[str, Parts], matches: Matches, path: Path) -> None:
    """Adds each pair as a LowRank, with alpha / rank or PEFT's scale in up. Raises TLoRAError for damaged pairs."""
    tensors = contents.tensors
    config = _peft_config(contents.metadata, path)
    for module, parts in modules.items():
        if set(parts) == {"alpha"} or set(parts) - {"up", "down", "alpha"}:
            matches.reject(parts.values(), "it is not half of a pair of matrices")
            continue
        require(module, parts, ("up", "down"))
        if is_convolution(tensors, parts) and not matches.is_linear(module):
            matches.reject(parts.values(), "it belongs to a convolution; a T-LoRA changes linear layers")
            continue
        up, down = matrix(tensors, parts["up"]), matrix(tensors, parts["down"])
        if up.shape[1] != down.shape[0]:
            raise TLoRAError(
                f'the halves of its layer "{module}" do not fit: up is {list(up.shape)}, down {list(down.shape)}; '
                "get it again."
            )
        name = matches.find(module, parts.values(), (up.shape[0], down.shape[1]))
        if name is not None:
            scale = scale_of(tensors, parts, down.shape[0], _peft_scale(config, down.shape[0]))
            matches.layers[name] = LowRank(up * scale, down)


def _peft_config(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """PEFT's settings, from the metadata that diffusers writes or from PEFT's own file beside the weights."""
    text = metadata.get("lora_adapter_metadata", "{}")
    beside = path.with_name("adapter_config.json")
    if path.stem.startswith("adapter_model") and beside.is_file() and beside.stat().st_size <= MAX_CONFIG:
        text = beside.read_bytes()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TLoRAError("its PEFT settings are damaged, so its scale is unknown; get it again.") from error
    if not isinstance(config, dict):
        raise TLoRAError("its PEFT settings are not a table, so its scale is unknown; get it again.")
    # diffusers puts the name of the model's part before each setting.
    return {key.removeprefix("unet.").removeprefix("transformer."): value for key, value in config.items()}


def _peft_scale(config: Mapping[str, Any], rank: int) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r). Raises TLoRAError when layers have an alpha of their own."""
    alpha = config.get("lora_alpha")
    if alpha is None:
        return 1.0
    # Compared, as Python reads integers of any size and a float cannot represent them all.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        raise TLoRAError(f"lora_alpha in its PEFT settings is {repr(alpha)[:50]}, which is not a number; get it again.")
    if config.get("alpha_pattern"):
        raise TLoRAError(
            "its PEFT settings set alpha layer by layer, which is not supported; merge or convert it first."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
