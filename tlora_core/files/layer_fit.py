"""Whether the layers of a file fit a model."""

from collections.abc import Mapping

from ..errors import TLoRAError
from .layer_names import fits, split_name
from .tlora_file import TLoRAFile

_ADVICE = "use the kind of model it was trained on"


def check_fit(tlora: TLoRAFile, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises TLoRAError when one of the T-LoRA's layers is missing in the model or has another shape there.

    shapes: path of each of the model's linear modules -> (out_features, in_features).
    """
    made = f"This T-LoRA was made for another model ({tlora.base_model})"
    missing = [name for name in tlora.layers if split_name(name)[0] not in shapes]
    if missing:
        raise TLoRAError(
            f"{made}: {len(missing)} of its {len(tlora.layers)} layers are not in this one, the first being "
            f"{missing[0]}; {_ADVICE}."
        )
    for name, layer in tlora.layers.items():
        check_shape(name, layer.shape, shapes[split_name(name)[0]], made)


def check_shape(
    name: str, have: tuple[int, int], want: tuple[int, int], made: str = "it was made for another model"
) -> None:
    """Raises TLoRAError, which begins with `made`, when an update of shape `have` does not go onto a module of shape
    `want`, by the name of its layer."""
    if not fits(name, have, want):
        raise TLoRAError(
            f"{made}: its layer {name} is {have[0]}x{have[1]} and the model's {want[0]}x{want[1]}; {_ADVICE}."
        )
