"""T-LoRAs in the layouts of other programs.

"kohya", "diffusers" and "comfyui" are plain LoRAs with different key names. They apply all ranks at every timestep,
unlike the T-LoRA in training. "reference" is the layout of the paper's own code (`reference_layout`), which applies the
mask.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TLoRAError, require_choice
from ..method.adapters import LowRank
from ..method.layer_name import LayerName
from .atomic import stem_of, write_tensors
from .dtypes import require_dtype
from .fused_modules import joined
from .layer_names import diffusers_name, family_of, is_flux_family, named_parts, part_number
from .reference_layout import reference_tensors, write_reference
from .tlora_file import TLoRAFile, plain_metadata

Tensors = dict[str, Tensor]

# FLUX's fused modules: the heights of the parts they join, in widths of the input, from the first row on.
_FUSED = {"qkv": (1, 1, 1), "linear1": (1, 1, 1, 4)}


def export(tlora: TLoRAFile, path: str | Path, layout: str, dtype: torch.dtype = torch.float16) -> Path:
    """Writes tlora in a layout of LAYOUTS and a dtype of DTYPES; returns the path of the weights.

    "reference" makes the folder of the reference's trainer, named like path without ".safetensors":
    checkpoint-<steps>/ with the weights, and logs/hparams.yml with the schedule. The other layouts write the file path.
    Raises TLoRAError for an unknown layout or dtype, a layer that has no name in the layout, values that dtype cannot
    represent, and when the file cannot be written.
    """
    path = Path(path)
    require_choice("layout", layout, LAYOUTS)
    require_dtype(dtype)
    tensors = {
        key: tensor.detach().to("cpu", dtype, copy=True).contiguous() for key, tensor in LAYOUTS[layout](tlora).items()
    }
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise TLoRAError(f"{key} has values that {dtype} cannot hold; store it in float32.")
    if layout == "reference":
        return write_reference(tlora, path.with_name(stem_of(path)), tensors)
    rank = max(
        tensor.shape[0] for key, tensor in tensors.items() if key.endswith(("lora_down.weight", "lora_A.weight"))
    )
    write_tensors(path, tensors, plain_metadata(tlora, rank))
    return path


def _kohya(tlora: TLoRAFile) -> Tensors:
    return _pairs(fused(tlora), lambda path: "lora_unet_" + path.replace(".", "_"))


def _comfyui(tlora: TLoRAFile) -> Tensors:
    """Updates of whole modules. Where the file does not say how many rows a module has, as those of earlier versions,
    its parts keep the host's names for them, if it has one for each."""
    named = named_parts(tlora.layers, tlora.base_model)
    whole = {name.path for name in tlora.layers if name not in named} | tlora.heights.keys()
    parts = {key: tlora.layers[name] for name, key in named.items() if name.path not in whole}
    rest = {name: layer for name, layer in tlora.layers.items() if name.path in whole}
    modules = joined(rest, tlora.base_model, tlora.heights)
    return _pairs(parts, lambda key: key) | _pairs(modules, lambda path: f"diffusion_model.{path}")


def _pairs(layers: Mapping[str, LowRank], key_of: Callable[[str], str]) -> Tensors:
    tensors = {}
    for path, layer in layers.items():
        key = key_of(path)
        tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"] = layer.up, layer.down
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.up.shape[1]))
    return tensors


def _diffusers(tlora: TLoRAFile) -> Tensors:
    tensors = {}
    for name, layer in _split(tlora).items():
        key = f"{_model_part(name)}.{_named(tlora.base_model, name, layer)}"
        # Without an alpha, diffusers uses the rank, so the scale is 1.
        tensors[f"{key}.lora_B.weight"], tensors[f"{key}.lora_A.weight"] = layer.up, layer.down
    return tensors


def _reference(tlora: TLoRAFile) -> Tensors:
    return reference_tensors(
        tlora, {_named(tlora.base_model, name, layer): layer for name, layer in _split(tlora).items()}
    )


LAYOUTS: dict[str, Callable[[TLoRAFile], Tensors]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "comfyui": _comfyui,
    "reference": _reference,
}


def _named(base_model: str, name: LayerName, layer: LowRank) -> str:
    part = part_number(name.row, layer.shape) if name.is_part else None
    # Modules of HunyuanVideo are called like FLUX's, and those of its LoRAs are not.
    unknown = (part is None and name.is_part) or (family_of(name) == "flux" and not is_flux_family(base_model))
    named = None if unknown else diffusers_name(name.path, part)
    if named is None:
        raise TLoRAError(f'diffusers\' name of the layer "{name}" is not known; choose the layout kohya or comfyui.')
    return named


def _model_part(name: str) -> str:
    return "transformer" if family_of(name) == "flux" else "unet"


def fused(tlora: TLoRAFile) -> dict[str, LowRank]:
    """Layers by module path; the parts of a fused module are joined into one update of the whole module. Raises
    TLoRAError for a module of unknown size."""
    return joined(tlora.layers, tlora.base_model, tlora.heights)


def _split(tlora: TLoRAFile) -> dict[LayerName, LowRank]:
    """Layers by name; an update of a whole fused module of FLUX is split into its parts."""
    split = {}
    for name, layer in tlora.layers.items():
        widths = _FUSED.get(name.rpartition(".")[2]) if family_of(name) == "flux" else None
        if widths is None:
            split[name] = layer
            continue
        rows, width = 0, layer.down.shape[1]
        if layer.up.shape[0] != sum(widths) * width:
            raise TLoRAError(
                f'The parts of the layer "{name}" differ from FLUX.1\'s; choose the layout kohya or comfyui.'
            )
        for count in widths:
            split[LayerName.of_rows(name, rows)] = LowRank(
                layer.up[rows : rows + count * width], layer.down, layer.group
            )
            rows += count * width
    return split
