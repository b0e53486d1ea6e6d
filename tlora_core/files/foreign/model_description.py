"""The model that a foreign file must fit, or the model family that its names imply."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...method.adapters import LowRank
from ...method.layer_name import LayerName
from ..layer_fit import check_shape
from ..layer_names import Place, diffusers_name, family_of, is_text_encoder, layer_of, plain_name

# Width of the text embedding in cross-attention -> the family of U-Nets, by ComfyUI's names.
_TEXT_WIDTHS = {768: "sd15", 1024: "sd20", 2048: "sdxl"}


# The reference adds the adapters of double blocks to FLUX's single blocks too and saves them, but only uses those of
# to_q, to_k and to_v.
_UNUSED = re.compile(r"(?:^|\.)single_transformer_blocks\.\d+\.attn\.processor\.to_(?:out|[qkv]_proj)$")


@dataclass(frozen=True)
class ModelDescription:
    """A model, described for the readers of foreign files.

    names: plain name (`layer_names.plain_name`) of every layer a file may name -> layer name, "path" or "path@row".
    shapes: path of a linear module -> (out_features, in_features).
    weight: layer name and number of rows -> that part of the weight, float32 [rows, in]. It raises TLoRAError when the
        weight is not available in full precision.
    base_model, num_timesteps, noise_domain: as in TLoRAFile.
    device: the device for computations with the weights; it must support float64.
    """

    names: Mapping[str, LayerName]
    shapes: Mapping[str, tuple[int, int]]
    weight: Callable[[LayerName, int], Tensor]
    base_model: str
    num_timesteps: float
    noise_domain: str
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", {plain: LayerName(name) for plain, name in self.names.items()})


@dataclass
class Matches:
    """A file's layers found in the model, and the unmatched keys with the reason."""

    model: ModelDescription | None
    layers: dict[LayerName, LowRank] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)

    def reject(self, keys: Iterable[str], reason: str) -> None:
        self.unmatched.update(dict.fromkeys(keys, reason))

    def find(self, module: str, keys: Iterable[str], shape: tuple[int, int]) -> LayerName | None:
        """The layer of a foreign module with an update of `shape` = (out, in); without one None, and a reason is noted.

        Raises TLoRAError when the model's layer has another shape: the file was made for another model.
        """
        name, reason = self._look_up(module, shape[1])
        if name in self.layers:
            name, reason = None, f"its layer {name} already has an update"
        if name is None:
            self.reject(keys, reason)
        elif self.model is not None:
            check_shape(name, shape, self.model.shapes[name.path])
        return name

    def _look_up(self, module: str, in_features: int) -> tuple[LayerName | None, str]:
        if is_text_encoder(module):
            return None, "it belongs to a text encoder, which a T-LoRA does not change"
        if _UNUSED.search(module):
            return (
                None,
                "the T-LoRA authors' code saves it for every single block but never uses it, so it was left out",
            )
        plain = plain_name(module)
        if self.model is None:
            place = layer_of(plain) or _path_itself(module)
            name = place and place.layer(in_features)
            return name, "its name does not belong to SD1.5, SD2, SDXL or FLUX; connect the model"
        name = self.model.names.get(plain)
        if name is None:
            return None, "the model has no such layer"
        if name.path not in self.model.shapes:
            return None, "it is not a linear layer of the model"
        return name, ""

    def is_linear(self, module: str) -> bool:
        """Whether the model is known and has a linear layer for this module."""
        if self.model is None:
            return False
        name = self.model.names.get(plain_name(module))
        return name is not None and name.path in self.model.shapes


def names_of(shapes: Mapping[str, tuple[int, int]]) -> dict[str, LayerName]:
    """ModelDescription.names of SD1.5, SD2, SDXL or FLUX. shapes: of the linear modules, by ComfyUI's path."""
    names = {plain_name(path): LayerName(path) for path in shapes}
    for path, (_, in_features) in shapes.items():
        for part in (None, 0, 1, 2, 3):
            if named := diffusers_name(path, part):
                names[plain_name(named)] = Place(path, part).layer(in_features)
    return names


def model_of(layers: Mapping[LayerName, LowRank]) -> tuple[str, float, str]:
    """(base_model, num_timesteps, noise_domain), inferred from the names and shapes of layers."""
    return model_of_shapes({name: layer.shape for name, layer in layers.items()})


def model_of_shapes(shapes: Mapping[str, tuple[int, int]]) -> tuple[str, float, str]:
    """The same from (out_features, in_features) by layer name."""
    families = {family_of(name) for name in shapes}
    if families == {"flux"}:
        return "flux", 1.0, "flow"
    if families != {"unet"}:
        return "unknown", 1.0, "unknown"
    widths = {shape[1] for name, shape in shapes.items() if re.search(r"attn2\.to_[kv]$", name)}
    base_model = _TEXT_WIDTHS.get(widths.pop(), "unknown") if len(widths) == 1 else "unknown"
    return base_model, 1000.0, "discrete"


def _path_itself(module: str) -> Place | None:
    """The place of a module in ComfyUI's own naming, which holds the path unchanged."""
    prefix = "diffusion_model."
    return Place(module.removeprefix(prefix)) if module.startswith(prefix) else None
