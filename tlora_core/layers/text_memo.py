"""Texts that recur at every step, so that a layer computes its output for each of them only once."""

import torch
from torch import Tensor

_TEXTS_KEPT = 4  # conditional and unconditional text, and as many again for areas


class Text:
    """A text as a model's layers receive it. They recognise `value` by its identity.

    outputs: the results that layers keep for it, by the object that keeps them. version: the value's version when it
        was added.
    """

    def __init__(self, value: Tensor):
        self.value, self.version, self.outputs = value, value._version, {}


class TextMemo:
    """Finds the one Text of all equal texts."""

    def __init__(self) -> None:
        self.texts: list[Text] = []

    def find(self, text: Tensor, device: torch.device, dtype: torch.dtype) -> Text:
        """The Text for `text` on device in dtype: a known one of equal value, or a new one."""
        self.texts = [known for known in self.texts if known.value._version == known.version]  # not written to since
        cast = text.to(device, dtype)
        for known in self.texts:
            if known.value is text or known.value.shape == cast.shape and torch.equal(known.value, cast):
                return known
        with torch.inference_mode(False):  # so that it counts changes in place, unlike tensors that nodes make
            new = Text(cast.clone())
        self.texts = [new, *self.texts[: _TEXTS_KEPT - 1]]
        return new
