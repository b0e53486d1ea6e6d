"""Adapters folded into a layer's output for a text, which recurs at every step.

A layer that projects the text, for example the keys of cross-attention, gets the same input at every evaluation. Its
output without adapters, and each adapter's down x, are computed only once. This saves more time than the T-LoRA costs
elsewhere.
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
    """A layer's results for one text: its output without adapters, each adapter's down x, and the total with the
    overlays in `folded`."""

    alone: Tensor
    total: Tensor
    hidden: dict[LowRank, Tensor] = field(default_factory=dict)
    folded: list[Overlay] = field(default_factory=list)


class FoldedOutput(Folded):
    """Folds into the output for the evaluation's text. For any other input, the adapters go beside the layer."""

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
        return output.total.clone()  # the caller may change it in place

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
