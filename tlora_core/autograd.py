"""Backward passes of frozen layers and of the adapters on them, written out.

Left to itself, autograd keeps more than it needs: of a layer that casts its weight (fp8 and quantised models, and models
that the host streams from memory) the cast copy, of an adapter every factor it was made of. On some hosts that copy may even
have been overwritten by the time the backward pass comes to it. So here a frozen layer saves nothing and fetches its weight
anew for the backward pass, and an adapter saves its layer's input, which layers side by side share, and r numbers a token.
"""
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.grad
from torch import LongTensor, Tensor, nn

from .adapters import Adapter

_OUTPUTS_KEPT = 4  # captions whose turn comes again and again


class Frozen:
    """Stands in for the forward of a layer that is not trained and is called with one tensor.

    fetch: gives the layer's weight in the dtype and on the device of a tensor, for the length of a block; None for a layer
        whose weight may be kept from the forward pass to the backward pass, as autograd does.
    keeps_output: the layer's input comes back at every step, as the text does: what the layer makes of it is kept.
    """

    def __init__(self, layer: nn.Module, fetch: Callable[[nn.Module, Tensor], AbstractContextManager[Tensor]] | None = None,
                 keeps_output: bool = False):
        self.layer, self.fetch, self.keeps_output = layer, fetch, keeps_output
        self.run = layer.forward
        self._kept: list[tuple[Tensor, int, Tensor]] = []  # (input, its version, output)

    def __call__(self, x: Tensor) -> Tensor:
        if self.fetch is None or not (x.requires_grad and torch.is_grad_enabled()):
            return self.run(x)
        if isinstance(self.layer, nn.Linear) or _is_simple_convolution(self.layer):
            return _FrozenLayer.apply(x, self)
        return _Rerun.apply(x, self.run)

    def output(self, x: Tensor) -> Tensor:
        """A new tensor with what the layer makes of x, apart from autograd."""
        if not self.keeps_output or x.requires_grad:
            return self.run(x)
        known = next((kept for kept in self._kept if kept[0] is x and kept[1] == x._version), None)
        if known is None:
            known = x, x._version, self.run(x)
            self._kept = [known, *self._kept[:_OUTPUTS_KEPT - 1]]
        return known[2].clone()

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, from that of the layer's output."""
        with self.fetch(self.layer, gradient) if self.fetch is not None else nullcontext(self.layer.weight) as weight:
            if isinstance(self.layer, nn.Linear):
                return gradient @ weight
            back = _CONVOLUTIONS[weight.dim() - 2]
            return back(shape, weight, gradient, self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups)


_CONVOLUTIONS = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}


def _is_simple_convolution(layer: nn.Module) -> bool:
    return (isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str))


class _FrozenLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, frozen: Frozen) -> Tensor:
        ctx.frozen, ctx.shape = frozen, x.shape
        return frozen.run(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.frozen.input_gradient(gradient, ctx.shape), None


class _Rerun(torch.autograd.Function):
    """For layers without a backward pass of their own here, such as norms: runs them again."""

    @staticmethod
    def forward(ctx, x: Tensor, run) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(ctx.run(x), x, gradient)[0], None


class Part(NamedTuple):
    """A trainable adapter on the rows of a layer from `row` on, with its rank in this evaluation: one int, or int64 [B] for
    samples that differ."""

    adapter: Adapter
    active: int | LongTensor
    row: int

    @property
    def most(self) -> int:
        return self.active if isinstance(self.active, int) else int(self.active.max())

    def mask(self, hidden: Tensor, columns: int) -> None:
        """Zero what a sample's own rank leaves out of hidden [B * tokens, group * columns], in place."""
        if isinstance(self.active, Tensor):
            kept = torch.arange(columns, device=hidden.device) < self.active[:, None]
            hidden.view(len(self.active), -1, self.adapter.group, columns).mul_(kept[:, None, None].to(hidden.dtype))


class Trained:
    """The forward of a layer with adapters in training: forward(x) + up M_t down x for each part, as `masking.add_low_rank`
    gives it. `forward` is the layer's own, or whatever stands in for it."""

    def __init__(self, forward: Callable[[Tensor], Tensor], parts: Sequence[Part]):
        self.forward, self.parts = forward, parts
        self.parameters = [p for part in parts for p in part.adapter.parameters()]

    def __call__(self, x: Tensor) -> Tensor:
        frozen = self.forward if isinstance(self.forward, Frozen) else None
        return _AddAdapters.apply(x, None if frozen else self.forward(x), frozen, self.parts, *self.parameters)


class _AddAdapters(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor | None, frozen: Frozen | None, parts: Sequence[Part], *parameters: Tensor):
        output = frozen.output(x) if base is None else base.clone()
        tokens, rows = x.flatten(0, -2), output.view(-1, output.shape[-1])
        saved = []
        for part in parts:
            columns = part.most
            up, down = part.adapter.active_factors(columns, x.dtype)
            hidden = tokens @ down.t()
            part.mask(hidden, columns)
            own = rows[:, part.row:part.row + up.shape[0]]
            torch.addmm(own, hidden, up.t(), out=own)
            # Only the first of a component's columns counts for the gradient; a copy, or the others would stay too.
            saved.append(hidden if part.adapter.group == 1 else hidden[:, :columns].contiguous())
        ctx.frozen, ctx.parts = frozen, parts
        ctx.save_for_backward(x, *saved)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, *saved = ctx.saved_tensors
        tokens, rows = x.flatten(0, -2), gradient.flatten(0, -2)
        wants_input = ctx.needs_input_grad[0]
        of_input = None
        if wants_input:
            of_input = torch.zeros_like(tokens) if ctx.frozen is None else ctx.frozen.input_gradient(rows, tokens.shape)
        of_parameters = []
        for part, hidden in zip(ctx.parts, saved):
            adapter, columns = part.adapter, part.most
            up, down = adapter.active_factors(columns, x.dtype)
            own = rows[:, part.row:part.row + up.shape[0]]
            of_hidden = own @ up
            part.mask(of_hidden, columns)
            if wants_input:
                of_input.addmm_(of_hidden, down)
            if adapter.group == 2:
                of_hidden = of_hidden[:, :columns] + of_hidden[:, columns:]
            of_up, of_down = x.new_empty(up.shape[0], adapter.rank), x.new_empty(adapter.rank, tokens.shape[1])
            torch.mm(own.t(), hidden, out=of_up[:, :columns])
            torch.mm(of_hidden.t(), tokens, out=of_down[:columns])
            of_up[:, columns:] = of_down[columns:] = 0
            of_parameters += adapter.gradients(of_up, of_down)
        of_input = None if of_input is None else of_input.view(x.shape)
        return of_input, gradient if ctx.needs_input_grad[1] else None, None, None, *of_parameters
