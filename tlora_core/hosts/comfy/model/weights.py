"""What becomes of a model with a T-LoRA on it where a node saves or combines weights: the node stops with a sentence.

A T-LoRA follows the noise level and is never in the weights. The host's nodes that save a checkpoint, merge, subtract,
add or multiply models, or extract a LoRA, see the weights alone, so that they would leave it out, or combine it at
another strength than the rest. They all go through methods of the model's patcher.
"""

from functools import cache
from typing import TYPE_CHECKING

from comfy.model_patcher import ModelPatcher

from ....errors import TLoRAError


def without_weights(model: ModelPatcher) -> ModelPatcher:
    """Makes `model`, which must be the caller's own clone, and all its clones, refuse what would go wrong; returns
    it."""
    if not isinstance(model, _WithoutWeights):
        model.__class__ = _refusing(type(model))
    return model


@cache
def _refusing(kind: type[ModelPatcher]) -> type[ModelPatcher]:
    return type(kind.__name__, (_WithoutWeights, kind), {})


# Mixed into a patcher's own class, whatever that is.
class _WithoutWeights(ModelPatcher if TYPE_CHECKING else object):
    """Comes before the class of a patcher. Whether T-LoRAs of strength 0 alone are on it, nobody asks: they leave no
    mark."""

    def clone(self, *args, **kwargs):
        # Here and not by a callback, as a patcher of a class of its own, such as one for GGUF files, sets the clone's
        # class last.
        return without_weights(super().clone(*args, **kwargs))

    def state_dict_for_saving(self, *args, **kwargs):
        raise TLoRAError(_SENTENCE)

    model_state_dict_for_saving = state_dict_for_saving

    def get_key_patches(self, filter_prefix=None):
        """Of the second model when two are combined; without a prefix of the host's own hooks while sampling."""
        if filter_prefix is not None:
            raise TLoRAError(_SENTENCE)
        return super().get_key_patches()

    def model_state_dict(self, filter_prefix=None):
        """With a prefix to extract a LoRA; without one to see which keys there are."""
        if filter_prefix is not None:
            raise TLoRAError(_SENTENCE)
        return super().model_state_dict()

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """A LoRA adds to the weights, and so does a whole model of strength 1; what scales them would not scale the
        T-LoRA."""
        if strength_model != 1:
            raise TLoRAError(_SENTENCE)
        return super().add_patches(patches, strength_patch, strength_model)


_SENTENCE = (
    "This node saves or combines a model's weights, in which a T-LoRA is not, as it follows the noise level; put the "
    "T-LoRA on "
    "after this node, or make a plain LoRA of it with Bake T-LoRA and load that in its place."
)
