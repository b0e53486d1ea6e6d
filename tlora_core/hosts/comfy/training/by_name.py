"""A training from values by the names of the Train node's inputs, for the node and for scripts alike."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ....errors import TLoRAError
from ....training.config import TrainConfig
from ....training.dataset import TrainingImage
from .found import train_or_find
from .keeping import Keeping
from .personalize import TrainRequest, filled_in
from .run import Outcome

PROMPTS = "validation_prompts"  # text with one prompt per line, where Keeping has a tuple
_NOT_PLAIN = ("config", "clip_vision", PROMPTS)
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def trained(
    images: Sequence[TrainingImage],
    *,
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    file_name: str,
    more_images: Sequence[TrainingImage] = (),
    options: tuple[Mapping[str, Any], Sequence[TrainingImage]] = ({}, ()),
    node_id: str | None = None,
    **inputs,
) -> Outcome:
    """Trains a T-LoRA, or finds an equal finished run; see `train_or_find`.

    options: as T-LoRA Training Options makes them: settings, and pictures of the class. inputs: the Train node's other
    inputs, where "auto" and 0 stand for the model's defaults. Raises TLoRAError.
    """
    settings, prior = options
    keeping = _keeping(inputs)
    request = filled_in(model, config={**settings, **_taken(inputs, TrainConfig)}, **inputs)
    return train_or_find(model, clip, vae, [*images, *more_images], request, keeping, file_name, node_id, prior)


def _keeping(inputs: dict[str, Any]) -> Keeping:
    """Takes its fields out of `inputs`."""
    prompts = tuple(line.strip() for line in inputs.pop(PROMPTS, "").splitlines() if line.strip())
    return Keeping(validation_prompts=prompts, **_taken(inputs, Keeping))


def check_without_model(inputs: Mapping[str, Any]) -> None:
    """Raises TLoRAError for settings that are wrong for every model, before one is loaded."""
    values = dict(inputs)
    _keeping(values)
    settings = _taken(values, TrainConfig)
    left_to_model = {"steps": 0, "learning_rate": 0, "optimizer": "auto"}
    TrainConfig(**{name: value for name, value in settings.items() if left_to_model.get(name, ...) != value})


def _taken(inputs: dict[str, Any], kind: type) -> dict[str, Any]:
    """Takes the inputs that are fields of the dataclass `kind` out of `inputs`."""
    return {field.name: inputs.pop(field.name) for field in fields(kind) if field.name in inputs}


def input_kinds() -> dict[str, type]:
    """The inputs with plain values of the Train and the options node, by name: int, float, bool or str."""
    every = [field for kind in (TrainRequest, TrainConfig, Keeping) for field in fields(kind)]
    kinds: dict[str, Any] = {field.name: field.type for field in every if field.name not in _NOT_PLAIN}
    return {**kinds, PROMPTS: str, "file_name": str, "captions": str}


def checked(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with each value in its own type; texts are read, as a command line has no other values. A number's
    type is part of what identifies a run. Raises TLoRAError for an unknown name or an unreadable value."""
    kinds = input_kinds()
    unknown = [name for name in inputs if name not in kinds]
    if unknown:
        raise TLoRAError(f'There is no input "{unknown[0]}"; the inputs are {", ".join(sorted(kinds))}.')
    return {name: _as(kinds[name], name, value) for name, value in inputs.items()}


def _as(kind: type, name: str, value: Any) -> Any:
    try:
        if kind is bool and isinstance(value, str):
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[value.strip().lower()]
        fitting = isinstance(value, kind) or (kind in (int, float) and isinstance(value, int | str))
        if fitting and (kind is bool or not isinstance(value, bool)):
            return kind(value)
    except (ValueError, KeyError):
        pass
    raise TLoRAError(f"{name} is {value!r}; give {_KINDS[kind]}.")
