"""Texts that come back at every step: what a layer makes of one needs computing once."""

import torch
from torch import Tensor

_TEXTS_KEPT = 4  # conditional and unconditional text, and as many again for areas


class Text:
    """A text as a model's layers get it: `value` itself, which they recognise by its identity.

    outputs: what layers keep of it, by the object that keeps it. version: of the value, when it was taken up.
    """

    def __init__(self, value: Tensor):
        self.value, self.version, self.outputs = value, value._version, {}


class TextMemo:
    """Finds the one Text of all equal texts."""

    def __init__(self) -> None:
        self.texts: list[Text] = []

    def find(self, text: Tensor, device: torch.device, dtype: torch.dtype) -> Text:
        """Of `text` on device in dtype: that of an equal one, or a new one."""
        self.texts = [known for known in self.texts if known.value._version == known.version]  # not written to since
        cast = text.to(device, dtype)
        for known in self.texts:
            if known.value is text or known.value.shape == cast.shape and torch.equal(known.value, cast):
                return known
        with torch.inference_mode(False):  # so that it counts changes in place, which what nodes make does not
            new = Text(cast.clone())
        self.texts = [new, *self.texts[: _TEXTS_KEPT - 1]]
        return new
