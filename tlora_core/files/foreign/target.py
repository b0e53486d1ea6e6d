"""What a foreign file is read for: the model it shall fit, or, without one, what its own names tell."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...method.adapters import LowRank
from ...method.layer_name import LayerName
from ..layer_fit import check_shape
from ..layer_names import Place, diffusers_name, family_of, is_text_encoder, layer_of, plain_name

# Width of the text that cross-attention reads -> the family of U-Nets that reads it, by ComfyUI's names.
_TEXT_WIDTHS = {768: "sd15", 1024: "sd20", 2048: "sdxl"}


# The reference gives FLUX's single blocks the adapters of double blocks too, and saves them, but uses those of to_q,
# to_k, to_v alone.
_UNUSED = re.compile(r"(?:^|\.)single_transformer_blocks\.\d+\.attn\.processor\.to_(?:out|[qkv]_proj)$")


@dataclass(frozen=True)
class Target:
    """A model as the readers of foreign files need it.

    names: plain name (`layer_names.plain_name`) of every layer a file may speak of -> layer name, "path" or "path@row".
    shapes: path of a linear module -> (out_features, in_features).
    weight: layer name and number of rows -> that part of the weight, float32 [rows, in]. It raises TLoRAError where the
        weight cannot be had in full precision.
    base_model, num_timesteps, noise_domain: as in TLoRAFile.
    device: where to compute with the weights; one that has float64.
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
    """Which of a file's layers were found, and why the rest was not."""

    target: Target | None
    layers: dict[str, LowRank] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)

    def reject(self, keys: Iterable[str], reason: str) -> None:
        self.unmatched.update(dict.fromkeys(keys, reason))

    def find(self, module: str, keys: Iterable[str], shape: tuple[int, int]) -> LayerName | None:
        """The layer of a foreign module whose update is `shape` = (out, in); None, with a reason noted, if there is
        none.

        Raises TLoRAError when the model has the layer in another shape: the file was then made for another model.
        """
        name, reason = self._look_up(module, shape[1])
        if name in self.layers:
            name, reason = None, f"its layer {name} has an update already"
        if name is None:
            self.reject(keys, reason)
        elif self.target is not None:
            check_shape(name, shape, self.target.shapes[name.path])
        return name

    def _look_up(self, module: str, in_features: int) -> tuple[LayerName | None, str]:
        if is_text_encoder(module):
            return None, "it belongs to a text encoder, which a T-LoRA leaves as it is"
        if _UNUSED.search(module):
            return (
                None,
                "the T-LoRA authors' code saves it with every single block and never uses it, so it was left out",
            )
        plain = plain_name(module)
        if self.target is None:
            place = layer_of(plain) or _path_itself(module)
            return (
                place and place.layer(in_features)
            ), "its name is not one of SD1.5, SD2, SDXL or FLUX; connect the model"
        name = self.target.names.get(plain)
        if name is None:
            return None, "the model has no such layer"
        if name.path not in self.target.shapes:
            return None, "it is not a linear layer of the model"
        return name, ""

    def is_linear(self, module: str) -> bool:
        """Whether the model is known to have a linear layer there."""
        if self.target is None:
            return False
        name = self.target.names.get(plain_name(module))
        return name is not None and name.path in self.target.shapes


def names_of(shapes: Mapping[str, tuple[int, int]]) -> dict[str, LayerName]:
    """Target.names of a model of SD1.5, SD2, SDXL or FLUX, from the shapes of its linear modules by ComfyUI's path."""
    names = {plain_name(path): LayerName(path) for path in shapes}
    for path, (_, in_features) in shapes.items():
        for part in (None, 0, 1, 2, 3):
            if named := diffusers_name(path, part):
                names[plain_name(named)] = Place(path, part).layer(in_features)
    return names


def model_of(layers: Mapping[str, LowRank]) -> tuple[str, float, str]:
    """(base_model, num_timesteps, noise_domain), as far as layers tell by their names and shapes."""
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
    """ComfyUI's own names carry the path as it is."""
    prefix = "diffusion_model."
    return Place(module.removeprefix(prefix)) if module.startswith(prefix) else None
