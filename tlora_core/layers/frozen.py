"""Backward passes of frozen layers and of the adapters on them, written out.

Left to itself, autograd keeps more than it needs: of a layer that casts its weight (fp8 and quantised models, and
models that the host streams from memory) the cast copy, of an adapter every factor it was made of. On some hosts that
copy may even have been overwritten by the time the backward pass comes to it. So here a frozen layer saves nothing and
fetches its weight anew for the backward pass, and an adapter saves its layer's input, which layers side by side share,
and r numbers a token.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.grad
from torch import LongTensor, Tensor, nn

from ..method.bank import BankAdapter, Branch, TextBranch, branches_of
from ..method.masking import components_on

_INPUTS_KEPT = 4  # captions whose turn comes again and again


class _Kept:
    """What a frozen layer makes of an input that comes back as it is, for as long as that lives."""

    def __init__(self, x: Tensor, output: Tensor):
        self._input, self._version, self.output = weakref.ref(x), x._version, output

    def is_of(self, x: Tensor) -> bool:
        return self._input() is x and self._version == x._version

    @property
    def is_alive(self) -> bool:
        return self._input() is not None


class Frozen:
    """Stands in for the forward of a layer that is not trained and is called with one tensor; a call with more, as of
    an embedding in another dtype, is the layer's own.

    fetch: gives the layer's weight and bias in the dtype and on the device of a tensor, for the length of a block; None
        for a layer whose weight may be kept from the forward pass to the backward pass, as autograd does.
    keeps_output: the layer's input comes back at every step, as the text does: what the layer makes of it is kept.
    """

    def __init__(
        self,
        layer: nn.Module,
        fetch: Callable[[nn.Module, Tensor], AbstractContextManager] | None = None,
        keeps_output: bool = False,
    ):
        self.layer, self.fetch, self.keeps_output = layer, fetch, keeps_output
        self.run = layer.forward
        self._kept: list[_Kept] = []

    def __call__(self, x: Tensor, **options) -> Tensor:
        if options or self.fetch is None or not (x.requires_grad and torch.is_grad_enabled()):
            return self.run(x, **options)
        if isinstance(self.layer, nn.Linear) or _is_simple_convolution(self.layer):
            return _FrozenLayer.apply(x, self)
        return _Rerun.apply(x, self.run)

    def kept(self, x: Tensor) -> _Kept | None:
        """What is kept of this input; None where nothing is."""
        if not self.keeps_output or x.requires_grad:
            return None
        known = next((kept for kept in self._kept if kept.is_of(x)), None)
        if known is None:
            known = _Kept(x, self.run(x))
            self._kept = [known, *(kept for kept in self._kept[: _INPUTS_KEPT - 1] if kept.is_alive)]
        return known

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, from that of the layer's output."""
        with (
            self.fetch(self.layer, gradient) if self.fetch is not None else nullcontext((self.layer.weight, None)) as (
                weight,
                _,
            )
        ):
            if weight.dim() == 2:  # also of the host's quantised layers, which are no torch.nn.Linear
                scale = getattr(self.layer, "pre_quant_scale", None)  # some of which scale their input first
                return gradient @ weight if scale is None else gradient @ weight * scale.to(gradient)
            back = _CONVOLUTIONS[weight.dim() - 2]
            return back(
                shape, weight, gradient, self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups
            )


_CONVOLUTIONS = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}


def _is_simple_convolution(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


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
    """An adapter on the rows of a layer from `row` on, with its rank in this evaluation: one int, or int64 [B], best on
    the CPU, for samples that differ."""

    adapter: BankAdapter
    active: int | LongTensor
    row: int


class Evaluation:
    """The branches of one evaluation of a model, prepared for a whole bank when the first of its layers asks. Each is
    handed out
    once: what is still needed of it afterwards, autograd has, and gives up as it goes back."""

    def __init__(self):
        self._prepared: dict[tuple, list] = {}
        self._masks: dict[tuple, Tensor] = {}
        self._seen: list[Tensor] = []  # held, as they are told apart by their identity

    def branch(self, part: Part, x: Tensor, is_text: bool) -> Branch | TextBranch:
        """Of a part of a layer with the input x. is_text: x is the same tensor for all layers of the bank."""
        bank, index, active = part.adapter.bank, part.adapter.index, part.active
        columns, on = (active, None) if isinstance(active, int) else (int(active.max()), self._mask(active, x))
        key = bank, active if on is None else id(active), x.dtype
        up = self._take((*key, "up"), index, lambda: bank.ups(columns, x.dtype))
        if is_text:
            self._seen.append(x)
            return TextBranch(*up, *self._take((*key, id(x)), index, lambda: bank.on_text(columns, x, on)), on)
        return Branch(*up, *self._take((*key, "down"), index, lambda: bank.downs(columns, x.dtype)), on)

    def _take(self, key: tuple, index: int, make: Callable[[], list]):
        prepared = self._prepared.get(key)
        if prepared is None or prepared[index] is None:  # a layer that is called twice
            with torch.enable_grad():  # a checkpointed block asks before it records anything
                prepared = self._prepared[key] = make()
        found, prepared[index] = prepared[index], None
        return found

    def _mask(self, active: LongTensor, like: Tensor) -> Tensor:
        key = id(active), like.dtype
        if key not in self._masks:
            self._seen.append(active)
            self._masks[key] = components_on(active, int(active.max()), like.dtype, like.device)[:, None, None]
        return self._masks[key]


class Trained:
    """The forward of a layer with adapters in training: forward(x) + up M_t down x for each part, as
    `masking.add_low_rank` gives it. `forward` is the layer's own, or whatever stands in for it.

    branches: None, or what a checkpointed block uses again when it is run again: the branches by what the inputs are.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], parts: Sequence[Part], evaluation: Evaluation):
        self.forward, self.parts, self.evaluation = forward, parts, evaluation
        self.frozen = forward if isinstance(forward, Frozen) else None
        self.branches: dict[tuple, list[Branch | TextBranch]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        kept = self.frozen and self.frozen.kept(x)
        branches = self._branches(x, is_text=kept is not None)
        base = None if self.frozen else self.forward(x)
        factors = [tensor for branch in branches for tensor in branch]
        return _AddBranches.apply(x, base, self, kept, type(branches[0]), torch.is_grad_enabled(), *factors)

    def _branches(self, x: Tensor, is_text: bool) -> list[Branch | TextBranch]:
        key = x.dtype, is_text
        if self.branches is not None and key in self.branches:
            return self.branches[key]
        made = [self.evaluation.branch(part, x, is_text) for part in self.parts]
        if self.branches is not None:
            self.branches[key] = made
        return made

    def base_output(self, x: Tensor, base: Tensor | None, kept: _Kept | None) -> Tensor:
        """What the layer gives without its adapters, to write on. base: the same where the layer is not frozen."""
        if base is not None:
            return base.clone()
        return self.frozen.run(x) if kept is None else kept.output.clone()

    def own_rows(self, of_layer: Tensor) -> list[Tensor]:
        """The columns of [tokens, n] that belong to each part: a model may keep several projections in one layer."""
        return [of_layer[:, part.row : part.row + part.adapter.bank.B.shape[1]] for part in self.parts]


class _AddBranches(torch.autograd.Function):
    """The output of a layer with its branches. Keeps the layer's input, which layers side by side share, and c numbers
    a token for each branch; the factors are views of what their bank has prepared."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        base: Tensor | None,
        layer: Trained,
        kept: _Kept | None,
        kind: type,
        is_recorded: bool,
        *factors: Tensor | None,
    ) -> Tensor:
        output = layer.base_output(x, base, kept)
        tokens, rows = x.flatten(0, -2), layer.own_rows(output.view(-1, output.shape[-1]))
        for_backward = [
            branch.add(own, tokens, is_recorded, ctx.needs_input_grad[0])
            for branch, own in zip(branches_of(kind, factors), rows)
        ]
        ctx.layer, ctx.kind = layer, kind
        ctx.save_for_backward(x, *chain.from_iterable(for_backward))
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        layer, (x, *saved) = ctx.layer, ctx.saved_tensors
        tokens, rows = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = layer.frozen.input_gradient(rows, tokens.shape) if layer.frozen else torch.zeros_like(tokens)
        grads = []
        for i, own in enumerate(layer.own_rows(rows)):
            grad_P, grad_A = ctx.kind.backward(saved[4 * i : 4 * i + 4], own, tokens, grad_x)
            grads += [grad_P, None, grad_A, None, None]
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None, *grads
