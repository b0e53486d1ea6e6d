"""Stops nodes that save or combine the weights of a model with a T-LoRA, with an error.

A T-LoRA follows the noise level and is never part of the weights. The host's nodes that save a model file, merge,
subtract, add or multiply models, or extract a LoRA only see the weights. They would lose the T-LoRA, or combine it at a
different strength. They all call methods of the model's patcher.
"""

from functools import cache
from typing import TYPE_CHECKING

from comfy.model_patcher import ModelPatcher

from ....errors import TLoRAError

_Patcher = ModelPatcher if TYPE_CHECKING else object  # what it is mixed into has these methods


def without_weights(model: ModelPatcher) -> ModelPatcher:
    """Makes `model`, which must be the caller's own clone, and its clones refuse such nodes; returns it."""
    if not isinstance(model, _WithoutWeights):
        model.__class__ = _refusing(type(model))
    return model


@cache
def _refusing(kind: type[ModelPatcher]) -> type[ModelPatcher]:
    return type(kind.__name__, (_WithoutWeights, kind), {})


class _WithoutWeights(_Patcher):
    """A mixin before the class of a patcher. It stays unused if all T-LoRAs have strength 0, which have no effect."""

    def clone(self, *args, **kwargs):
        # Here and not in a callback, as a patcher of another class, for example for GGUF files, sets the clone's class
        # last.
        return without_weights(super().clone(*args, **kwargs))

    def state_dict_for_saving(self, *args, **kwargs):
        raise TLoRAError(_SENTENCE)

    model_state_dict_for_saving = state_dict_for_saving

    def get_key_patches(self, filter_prefix=None):
        """Called with a prefix for the second model of a merge; without one by the host's hooks while sampling."""
        if filter_prefix is not None:
            raise TLoRAError(_SENTENCE)
        return super().get_key_patches()

    def model_state_dict(self, filter_prefix=None):
        """Called with a prefix to extract a LoRA; without one to list the keys."""
        if filter_prefix is not None:
            raise TLoRAError(_SENTENCE)
        return super().model_state_dict()

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """Refuses to scale the weights, which would not scale the T-LoRA; a LoRA, or a model of strength 1, only
        adds."""
        if strength_model != 1:
            raise TLoRAError(_SENTENCE)
        return super().add_patches(patches, strength_patch, strength_model)


_SENTENCE = (
    "This node saves or combines a model's weights, which do not include the T-LoRA, as it follows the noise level; "
    "apply the T-LoRA after this node, or convert it to a plain LoRA with Bake T-LoRA and load that instead."
)
