"""Adapters folded into a layer's output for a text, which comes back at every step.

A layer that projects the text, as cross-attention's keys and values, gets the same input at every evaluation. What the
weight alone makes of it, and `down`, need computing once. This saves more than the T-LoRA costs elsewhere.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method.adapters import LowRank
from .beside import Beside
from .overlay import Folded, Overlay


@dataclass
class _Output:
    """What a layer makes of one text: alone, each adapter's down x, and the sum with the overlays in `folded`."""

    alone: Tensor
    total: Tensor
    hidden: dict[LowRank, Tensor] = field(default_factory=dict)
    folded: list[Overlay] = field(default_factory=list)


class FoldedOutput(Folded):
    """Folds into the output for the evaluation's text. Any other input gets the adapters beside the layer."""

    def forward(self, x: Tensor) -> Tensor:
        text = self.text
        if text is None or x is not text.value or x._version != text.version:
            return Beside(self._alone, self.wanted).forward(x)
        output = text.outputs.get(self)
        if output is None:
            alone = self._alone(x)
            output = text.outputs[self] = _Output(alone, total=alone)
        if output.folded != self.wanted:
            self._fold(output, x)
        return output.total.clone()  # what gets it may change it in place

    def _alone(self, x: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, x)

    def _fold(self, output: _Output, x: Tensor) -> None:
        total = output.alone.clone()
        known, output.hidden = output.hidden, {}
        for overlay in self.wanted:
            update, row = overlay.update, overlay.row
            up = update.up
            hidden = known[update] if update in known else F.linear(x, update.down)
            output.hidden[update], columns = hidden, overlay.active * update.group
            part = total[..., row : row + up.shape[0]]
            product = torch.addmm(part.flatten(0, -2), hidden[..., :columns].flatten(0, -2), up[:, :columns].t())
            part.copy_(product.view(part.shape))
        output.total, output.folded = total, list(self.wanted)
