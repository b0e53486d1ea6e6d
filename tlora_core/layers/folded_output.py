"""Adapters folded into a layer's output for a text, which comes back at every step.

A layer that projects the text, as cross-attention's keys and values, gets the same input at every evaluation. What the
weight alone makes of it, and `down`, need computing once. This saves more than the T-LoRA costs elsewhere. Where they
are not kept they are computed anew in the same way, so the output is the same.
"""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from ..method.adapters import LowRank
from .beside import add_up
from .overlay import StandIn


@dataclass
class Output:
    """What a layer makes of one text: alone [B, tokens, out], and each adapter's down x [B * tokens, group * r]."""

    alone: Tensor
    hidden: dict[LowRank, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.alone, *self.hidden.values()]


class FoldedOutput(StandIn):
    """Folds into the output for the evaluation's text.

    is_constant: False where something else has a hand in what the layer makes of its input, which might follow the
        timestep too; then nothing is kept.
    """

    def __init__(self, layer: nn.Linear, is_constant: bool = True):
        super().__init__(layer)
        self.is_constant = is_constant

    def forward(self, x: Tensor) -> Tensor:
        text, output = self.text, None
        if self.is_constant and text is not None and text.is_kept and x is text.value and x._version == text.version:
            output = text.outputs.get(self)
            if output is None:
                output = text.outputs[self] = Output(self._alone(x))
        return self._sum(Output(self._alone(x)) if output is None else output, x)

    def _alone(self, x: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, x)

    def _sum(self, output: Output, x: Tensor) -> Tensor:
        """A new tensor, since what gets it may change it in place."""
        known, output.hidden = output.hidden, {}
        hidden, ups = [], []
        for overlay in self.wanted:
            update = overlay.adapter
            assert isinstance(update, LowRank)  # adapters in training are never folded, since their factors change
            whole = known.get(update)
            if whole is None:
                whole = F.linear(x.flatten(0, -2), update.down.to(x.dtype))
            up, down = overlay.factors(x.dtype)
            ups.append(up)
            hidden.append(whole[:, : len(down)])
            output.hidden[update] = whole
        return add_up(output.alone, hidden, ups, [each.row for each in self.wanted])
