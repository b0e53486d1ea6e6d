"""Checks that the layers of a file fit a model."""

from collections.abc import Mapping

from ..errors import TLoRAError
from ..method.layer_name import LayerName
from .tlora_file import TLoRAFile

_ADVICE = "use the kind of model it was trained on"


def check_fit(tlora: TLoRAFile, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises TLoRAError when a layer of the T-LoRA is missing in the model or has another shape there.

    shapes: path of each of the model's linear modules -> (out_features, in_features).
    """
    made = f"This T-LoRA was made for another model ({tlora.base_model})"
    missing = [name for name in tlora.layers if name.path not in shapes]
    if missing:
        raise TLoRAError(
            f"{made}: {len(missing)} of its {len(tlora.layers)} layers are not in this one, the first being "
            f"{missing[0]}; {_ADVICE}."
        )
    for name, layer in tlora.layers.items():
        check_shape(name, layer.shape, shapes[name.path], made)


def check_shape(
    name: LayerName, have: tuple[int, int], want: tuple[int, int], made: str = "it was made for another model"
) -> None:
    """Raises TLoRAError, beginning with `made`, when the layer's update of shape `have` does not fit a module of shape
    `want`."""
    fits = have == want if not name.is_part else have[1] == want[1] and name.row + have[0] <= want[0]
    if not fits:
        raise TLoRAError(
            f"{made}: its layer {name} is {have[0]}x{have[1]} and the model's {want[0]}x{want[1]}; {_ADVICE}."
        )
