"""Backward passes of frozen layers and of the adapters on them, written out.

Left to itself, autograd keeps more than it needs: of a layer that casts its weight (fp8 and quantised models, and models
that the host streams from memory) the cast copy, of an adapter every factor it was made of. On some hosts that copy may even
have been overwritten by the time the backward pass comes to it. So here a frozen layer saves nothing and fetches its weight
anew for the backward pass, and an adapter saves its layer's input, which layers side by side share, and r numbers a token.
"""
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.grad
from torch import LongTensor, Tensor, nn

from .adapters import Adapter, LoRAAdapter, OrthoAdapter

_INPUTS_KEPT = 4  # captions whose turn comes again and again


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
        self._kept: list[Kept] = []

    def __call__(self, x: Tensor) -> Tensor:
        if self.fetch is None or not (x.requires_grad and torch.is_grad_enabled()):
            return self.run(x)
        if isinstance(self.layer, nn.Linear) or _is_simple_convolution(self.layer):
            return _FrozenLayer.apply(x, self)
        return _Rerun.apply(x, self.run)

    def output(self, x: Tensor) -> Tensor:
        """A new tensor with what the layer makes of x, apart from autograd."""
        kept = self.kept(x)
        return self.run(x) if kept is None else kept.output.clone()

    def kept(self, x: Tensor) -> "Kept | None":
        """What is kept of this input; None where nothing is."""
        if not self.keeps_output or x.requires_grad:
            return None
        known = next((kept for kept in self._kept if kept.input is x and kept.version == x._version), None)
        if known is None:
            known = Kept(x, x._version, self.run(x))
            self._kept = [known, *self._kept[:_INPUTS_KEPT - 1]]
        return known

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, from that of the layer's output."""
        with self.fetch(self.layer, gradient) if self.fetch is not None else nullcontext(self.layer.weight) as weight:
            if isinstance(self.layer, nn.Linear):
                return gradient @ weight
            back = _CONVOLUTIONS[weight.dim() - 2]
            return back(shape, weight, gradient, self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups)


class Kept:
    """An input that comes back, as it was in `version`, and what a layer and the starts of its adapters make of it."""

    def __init__(self, x: Tensor, version: int, output: Tensor):
        self.input, self.version, self.output = x, version, output
        self.tokens = x.flatten(0, -2).float() if x.dtype in (torch.float16, torch.bfloat16) else x.flatten(0, -2)
        self._starts: WeakKeyDictionary[Adapter, Tensor] = WeakKeyDictionary()

    def start(self, adapter: OrthoAdapter) -> Tensor:
        """A0 x [tokens, r]."""
        if adapter not in self._starts:
            self._starts[adapter] = self.tokens @ adapter.A0.t()
        return self._starts[adapter]


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
    def columns(self) -> int:
        return self.active if isinstance(self.active, int) else int(self.active.max())

    def mask(self, hidden: Tensor) -> Tensor:
        """Zeroes what a sample's own rank leaves out of hidden [B * tokens, columns], in place."""
        if isinstance(self.active, Tensor):
            on = torch.arange(hidden.shape[1], device=hidden.device) < self.active[:, None]
            hidden.view(len(self.active), -1, hidden.shape[1]).mul_(on[:, None].to(hidden.dtype))
        return hidden


class Evaluation:
    """The adapters of one evaluation of a model. What their products are made of is computed for all of them at once, by a few
    operations instead of some for each of hundreds of layers, when the first layer asks for it."""

    def __init__(self):
        self.parts: list[Part] = []
        self._products: dict[torch.dtype, dict[Adapter, _Plain | _Orthogonal]] = {}

    def product(self, adapter: Adapter, dtype: torch.dtype) -> "_Plain | _Orthogonal":
        if dtype not in self._products:
            self._products[dtype] = {}
            for kind, product in ((LoRAAdapter, _Plain), (OrthoAdapter, _Orthogonal)):
                self._products[dtype] |= product.all([part for part in self.parts if isinstance(part.adapter, kind)], dtype)
        return self._products[dtype][adapter]


class _Plain:
    """y = B A x, of the active components."""

    def __init__(self, part: Part, dtype: torch.dtype):
        self.adapter, self.mask, k = part.adapter, part.mask, part.columns
        self.A, self.B = self.adapter.A.detach()[:k].to(dtype), self.adapter.B.detach()[:, :k].to(dtype)

    @classmethod
    def all(cls, parts: Sequence[Part], dtype: torch.dtype) -> dict[Adapter, "_Plain"]:
        return {part.adapter: cls(part, dtype) for part in parts}

    def add(self, output: Tensor, x: Tensor, kept: Kept | None) -> Tensor:
        """Adds y to output in place, for x [tokens, in], which is the one of `kept`; gives A x."""
        hidden = self.mask(x @ self.A.t())
        output.addmm_(hidden, self.B.t())
        return hidden

    def back(self, gradient: Tensor, x: Tensor, hidden: Tensor, of_input: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of A and B, given that of y and what `add` gave; adds that of x to of_input, unless it is None."""
        of_hidden = self.mask(gradient @ self.B)
        if of_input is not None:
            of_input.addmm_(of_hidden, self.A)
        return _gradient(self.adapter.A, of_hidden.t(), x), _gradient(self.adapter.B, gradient.t(), hidden)


class _Orthogonal:
    """y = B S A x - B0 S0 A0 x, of the active components, as (B - B0) S h + B0 ((S - S0) h + S0 (A - A0) x) with h = A x:
    a sum of what training has moved, which no half precision loses."""

    def __init__(self, part: Part, dtype: torch.dtype, moved_S: Tensor, moved_B: Tensor):
        self.adapter, self.mask, k = part.adapter, part.mask, part.columns
        adapter = self.adapter
        self.full_A = adapter.A.detach()[:k]
        self.A, self.A0, self.B0 = self.full_A.to(dtype), adapter.A0[:k].to(dtype), adapter.B0[:, :k].to(dtype)
        self.S, self.S0, self.moved_S = adapter.S.detach()[:k].to(dtype), adapter.S0[:k].to(dtype), moved_S.to(dtype)
        self.moved_B = moved_B.to(dtype)

    @classmethod
    @torch.no_grad()
    def all(cls, parts: Sequence[Part], dtype: torch.dtype) -> dict[Adapter, "_Orthogonal"]:
        if not parts:
            return {}
        pairs = [(part.adapter, part.columns) for part in parts]
        moved_S = torch._foreach_sub([a.S[:k] for a, k in pairs], [a.S0[:k] for a, k in pairs])
        moved_B = torch._foreach_sub([a.B[:, :k] for a, k in pairs], [a.B0[:, :k] for a, k in pairs])
        return {part.adapter: cls(part, dtype, *moved) for part, *moved in zip(parts, moved_S, moved_B)}

    def add(self, output: Tensor, x: Tensor, kept: Kept | None) -> Tensor:
        """As _Plain.add."""
        if kept is None:
            hidden = x @ self.A.t()
            moved = x @ (self.full_A - self.adapter.A0[:len(self.A)]).to(x.dtype).t()
        else:
            # A difference of two products, but in full precision.
            full = kept.tokens @ self.full_A.t()
            hidden, moved = full.to(x.dtype), (full - kept.start(self.adapter)[:, :len(self.A)]).to(x.dtype)
        self.mask(hidden)
        self.mask(moved)
        output.addmm_(hidden * self.S, self.moved_B.t())
        output.addmm_(torch.addcmul(hidden * self.moved_S, moved, self.S0), self.B0.t())
        return hidden

    def back(self, gradient: Tensor, x: Tensor, hidden: Tensor, of_input: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As _Plain.back, for A, S and B."""
        of_start = self.mask(gradient @ self.B0)
        of_both = self.mask(gradient @ self.moved_B).add_(of_start)
        of_S = torch.zeros_like(self.adapter.S)
        of_S[:len(self.A)] = (hidden * of_both).sum(0)
        of_both *= self.S
        if of_input is not None:
            of_input.addmm_(of_both, self.A)
            of_input.addmm_(of_start.mul_(self.S0), self.A0, alpha=-1)
        return _gradient(self.adapter.A, of_both.t(), x), of_S, _gradient(self.adapter.B, gradient.t(), hidden * self.S)


def _gradient(parameter: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ right, the gradient of the active rows or columns, with zeros for the others."""
    whole = torch.empty_like(parameter)
    active = whole[:left.shape[0], :right.shape[1]]
    if left.dtype == whole.dtype:
        torch.mm(left, right, out=active)
    else:
        active.copy_(left @ right)
    if active.shape != whole.shape:
        whole[left.shape[0]:] = 0
        whole[:, right.shape[1]:] = 0
    return whole


class Trained:
    """The forward of a layer with adapters in training: forward(x) + up M_t down x for each part, as `masking.add_low_rank`
    gives it. `forward` is the layer's own, or whatever stands in for it."""

    def __init__(self, forward: Callable[[Tensor], Tensor], parts: Sequence[Part], evaluation: Evaluation):
        self.forward, self.parts, self.evaluation = forward, parts, evaluation
        self.frozen = forward if isinstance(forward, Frozen) else None
        self.parameters = [p for part in parts for p in part.adapter.parameters()]
        evaluation.parts += parts

    def __call__(self, x: Tensor) -> Tensor:
        return _AddAdapters.apply(x, None if self.frozen else self.forward(x), self, *self.parameters)


class _AddAdapters(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor | None, layer: Trained, *parameters: Tensor) -> Tensor:
        output = layer.frozen.output(x) if base is None else base.clone()
        tokens, rows = x.flatten(0, -2), output.view(-1, output.shape[-1])
        kept = layer.frozen and layer.frozen.kept(x)
        saved = []
        for part in layer.parts:
            own = rows[:, part.row:part.row + part.adapter.B.shape[0]]
            saved.append(layer.evaluation.product(part.adapter, x.dtype).add(own, tokens, kept))
        ctx.layer = layer
        ctx.save_for_backward(x, *saved)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, *saved = ctx.saved_tensors
        layer, tokens, rows = ctx.layer, x.flatten(0, -2), gradient.flatten(0, -2)
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = layer.frozen.input_gradient(rows, tokens.shape) if layer.frozen else torch.zeros_like(tokens)
        of_parameters = []
        for part, hidden in zip(layer.parts, saved):
            own = rows[:, part.row:part.row + part.adapter.B.shape[0]]
            of_parameters += layer.evaluation.product(part.adapter, x.dtype).back(own, tokens, hidden, of_input)
        of_input = None if of_input is None else of_input.view(x.shape)
        return of_input, gradient if ctx.needs_input_grad[1] else None, None, *of_parameters

