"""Texts that come back at every step: what a layer makes of one needs computing once."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..method.adapters import LowRank

_TEXTS_KEPT = 4  # conditional and unconditional text, and as many again for areas


@dataclass
class Made:
    """What n layers make of one text: alone [n, B, tokens, out], and with each adapter's down [n, B * tokens,
    group * r], by the adapter of the first of them."""

    alone: Tensor
    hidden: dict[LowRank, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.alone, *self.hidden.values()]


class Text:
    """A text as a model's layers get it: `value` itself, which they recognise by its identity.

    outputs: what layers keep of it, by what keeps it; nothing unless is_kept. version: of the value, when it
    was taken up.
    """

    def __init__(self, value: Tensor, is_kept: bool = True):
        self.value, self.version, self.is_kept, self.outputs = value, value._version, is_kept, {}


class TextMemo:
    """Finds the one Text of all equal texts.

    bytes_per_token: what layers keep of a token of all texts of a batch. room: bytes that they may keep altogether.
    """

    def __init__(self, bytes_per_token: int = 0, room: float = float("inf")) -> None:
        self.texts: list[Text] = []
        self.bytes_per_token, self.room = bytes_per_token, room

    def find(self, text: Tensor, device: torch.device, dtype: torch.dtype) -> Text:
        """Of `text` on device in dtype: that of an equal one, or a new one."""
        self.texts = [known for known in self.texts if known.value._version == known.version]  # not written to since
        cast = text.to(device, dtype)
        for known in self.texts:
            if known.value is text or known.value.shape == cast.shape and torch.equal(known.value, cast):
                return known
        self.texts = self.texts[: _TEXTS_KEPT - 1]
        with torch.inference_mode(False):  # so that it counts changes in place, which what nodes make does not
            new = Text(cast.clone())
        kept = sum(self._bytes(known) for known in self.texts if known.is_kept)
        new.is_kept = kept + self._bytes(new) <= self.room
        self.texts = [new, *self.texts]
        return new

    def _bytes(self, text: Text) -> int:
        return text.value.shape[:-1].numel() * self.bytes_per_token
