"""Layers in training: explicit backward passes of frozen layers and of the adapters on them.

By default, autograd keeps more than it needs: the cast copy of a weight that the layer casts (in fp8 and quantised
models, and in models that the host streams from memory), and every factor that an adapter was made of. On some hosts
the copy may even be overwritten before the backward pass. Here a frozen layer saves nothing and fetches its weight
again for the backward pass. An adapter saves its layer's input, which neighbouring layers share, and r numbers per
token.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.grad
from torch import LongTensor, Tensor, nn

from ..method.bank import Bank, Branch, masked
from .text_memo import Text

_OF_BRANCH = len(Branch._fields)


class Frozen:
    """Replaces the forward of a layer that is not trained and is called with one tensor. A call with further arguments,
    for example of an embedding in another dtype, goes to the layer's own forward.

    fetch: a context manager that yields the layer's weight and bias in the dtype and on the device of a tensor; None
        for a layer whose weight autograd may keep from the forward to the backward pass.
    """

    def __init__(self, layer: nn.Module, fetch: Callable[[nn.Module, Tensor], AbstractContextManager] | None = None):
        self.layer, self.fetch, self._forward = layer, fetch, layer.forward
        # The layer's own forward; until its first call, what finds out whether it can be called as it is.
        self.run: Callable[..., Tensor] = self._first_run

    def _first_run(self, x: Tensor, **options) -> Tensor:
        """Some layers write to their input, such as the host's fp8 product, which clamps it in place. These get a copy,
        because autograd may have kept the input for another layer's backward pass. A call on a copy finds them out,
        before anything is recorded. The others get no copy, whose strides may differ from the input's, and with them
        the last bits of the output."""
        forward = self._forward
        with torch.inference_mode(False), torch.no_grad():
            given = x.detach().clone()
            before = given._version
            forward(given, **options)
        writes = given._version != before
        self.run = (lambda x, **options: forward(x.clone(), **options)) if writes else forward
        return self.run(x, **options)

    def forward(self, x: Tensor, **options) -> Tensor:
        if options or not (x.requires_grad and torch.is_grad_enabled()):
            return self.run(x, **options)
        # A linear layer takes this way even if it need not, so that it rounds alike wherever its weight is.
        if hasattr(self.layer, "out_features") or (self.fetch and _is_simple_convolution(self.layer)):
            return _FrozenLayer.apply(x, self)
        return _Rerun.apply(x, self) if self.fetch else self.run(x)

    def output(self, x: Tensor, text: Text | None) -> Tensor:
        """The layer's output without gradient, in a new tensor. For a text it is computed once."""
        if text is None:
            return _no_view(self.run(x))
        if self not in text.outputs:
            text.outputs[self] = self.run(x)
        return text.outputs[self].clone()

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, given the gradient of the layer's output."""
        own = nullcontext((self.layer.weight, None)) if self.fetch is None else self.fetch(self.layer, gradient)
        with own as (weight, _):
            if weight.dim() == 2:  # true of the host's quantised layers too, which are not torch.nn.Linear
                scale = getattr(self.layer, "pre_quant_scale", None)  # some of which scale their input first
                return gradient @ weight if scale is None else gradient @ weight * scale.to(gradient)
            back = _CONVOLUTIONS[weight.dim() - 2]
            layer = self.layer
            return back(shape, weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups)


_CONVOLUTIONS = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}


def _is_simple_convolution(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _no_view(output: Tensor) -> Tensor:
    """The same numbers in the same memory, in a tensor that autograd does not know as a view. FLUX and its like write a
    block's result onto its input in place, and that may be what this layer returns; onto a view out of a function with
    a backward pass of its own autograd would not let them."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


class _FrozenLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, frozen: Frozen) -> Tensor:
        ctx.frozen, ctx.shape = frozen, x.shape
        return _no_view(frozen.run(x))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.frozen.input_gradient(gradient, ctx.shape), None


class _Rerun(torch.autograd.Function):
    """Runs a layer again that has no backward pass of its own here, for example a norm."""

    @staticmethod
    def forward(ctx, x: Tensor, frozen: Frozen) -> Tensor:
        ctx.frozen = frozen
        ctx.save_for_backward(x)
        return frozen.run(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(ctx.frozen.run(x), x, gradient)[0], None


class Prepared:
    """The branches of one evaluation of a model, prepared for a whole bank when the first of its layers asks. Call
    `clear` at the end of the evaluation: autograd holds what the backward pass needs, and frees it during that pass."""

    def __init__(self) -> None:
        self._branches: dict[tuple, tuple[list[Branch], Tensor | None]] = {}
        self._masks: dict[tuple, tuple[Tensor, LongTensor]] = {}

    def branches(self, bank: Bank, active: int | LongTensor, x: Tensor, is_text: bool) -> list[Branch]:
        """The branches of all layers of the bank for inputs like x. is_text: all layers receive this same tensor x."""
        is_mixed = not isinstance(active, int)
        key = bank, id(active) if is_mixed else active, x.dtype, id(x) if is_text else None
        if key not in self._branches:
            columns, on = (int(active.max()), self._mask(active, x)) if is_mixed else (active, None)
            text = x if is_text else None  # held, since the key contains its identity
            with torch.enable_grad():  # a checkpointed block asks while gradients are off
                self._branches[key] = bank.branches(columns, x.dtype, on, text), text
        return self._branches[key][0]

    def _mask(self, active: LongTensor, like: Tensor) -> Tensor:
        """[B, 1, 1, c]: ones for the components that are on in each sample."""
        key = id(active), like.dtype
        if key not in self._masks:
            on = torch.arange(int(active.max()), device=active.device) < active[:, None]
            self._masks[key] = moved(on.to(like.dtype), like.device)[:, None, None], active
        return self._masks[key][0]

    def clear(self) -> None:
        self._branches.clear()
        self._masks.clear()


class Trained:
    """The forward of a layer with adapters in training: its output + up M_t down x for each overlay, as
    `beside.add_low_rank` gives it. `forward` is the layer's own, or its current replacement.

    text: the input that recurs at every step, or None. used: a list in which a gradient-checkpointed block records the
        branches of each call, and whether they are of a text; None outside such a block. given: these records, when the
        block runs again.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], overlays: Sequence, prepared: Prepared, text: Text | None = None
    ):
        owner = getattr(forward, "__self__", None)
        self.run, self.frozen, self.prepared = forward, owner if isinstance(owner, Frozen) else None, prepared
        self.overlays, self.text = overlays, text if self.frozen else None
        # A model may keep several projections in one layer: each overlay has rows of its own.
        self.rows = [slice(each.row, each.row + each.adapter.bank.B.shape[1]) for each in overlays]
        self.used: list[tuple[bool, list[Branch]]] | None = None
        self.given: deque[tuple[bool, list[Branch]]] = deque()

    def forward(self, x: Tensor) -> Tensor:
        text = self.text if self.text is not None and x is self.text.value else None
        if self.given:
            is_text, branches = self.given.popleft()
        else:
            is_text = text is not None
            branches = [
                self.prepared.branches(adapter.bank, active, x, is_text)[adapter.index]
                for _, adapter, active, _ in self.overlays
            ]
        if self.used is not None:
            self.used.append((is_text, branches))
        base = None if self.frozen else self.run(x)
        factors = [tensor for branch in branches for tensor in branch]
        return _AddBranches.apply(x, base, self, text, is_text, torch.is_grad_enabled(), *factors)


class _AddBranches(torch.autograd.Function):
    """The output of a layer with its branches. Saves the layer's input, which neighbouring layers share, and c numbers
    per token for each branch. The factors are views of their bank's prepared tensors."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        base: Tensor | None,
        layer: Trained,
        text: Text | None,
        is_text: bool,
        is_recorded: bool,
        *factors: Tensor | None,
    ):
        if base is None:
            assert layer.frozen is not None  # otherwise its forward has computed the base
            output = layer.frozen.output(x, text)
        else:
            output = base.clone()
        tokens, outputs, saved = x.flatten(0, -2), output.view(-1, output.shape[-1]), [x]
        for rows, (P, up, A, down, on) in zip(layer.rows, branches_of(factors)):
            columns = P.shape[1]
            hidden = down if is_text else masked(tokens @ down.t(), on, columns)
            outputs[:, rows].addmm_(hidden, up.t())
            if is_text:
                Ax = A
            elif is_recorded and hidden.shape[1] > columns:
                Ax = hidden[:, :columns] + hidden[:, columns:]  # down is [A - A0; A0], so its halves add up to A x
            else:
                Ax = hidden
            saved += [Ax, up, down if ctx.needs_input_grad[0] and not is_text else None, on]
        ctx.layer, ctx.is_text = layer, is_text
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        layer, (x, *saved) = ctx.layer, ctx.saved_tensors
        tokens, grads, grad_x, factors = x.flatten(0, -2), grad.flatten(0, -2), None, []
        if ctx.needs_input_grad[0]:
            grad_x = layer.frozen.input_gradient(grads, tokens.shape) if layer.frozen else torch.zeros_like(tokens)
        for i, rows in enumerate(layer.rows):
            Ax, up, down, on = saved[4 * i : 4 * i + 4]
            own, columns = grads[:, rows], Ax.shape[1]
            grad_hidden = masked(own @ up, on, columns)
            if grad_x is not None:
                grad_x.addmm_(grad_hidden, down)
            # up is [P, P - P0] and down [A - A0; A0]: the first half of grad_hidden is the gradient of A x.
            grad_Ax = grad_hidden[:, :columns]
            factors += [own.t() @ Ax, None, grad_Ax if ctx.is_text else grad_Ax.t() @ tokens, None, None]
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None, *factors


def branches_of(factors: Sequence[Tensor | None]) -> list[Branch]:
    """The branches whose tensors follow one another in `tensors`."""
    return [Branch(*factors[i : i + _OF_BRANCH]) for i in range(0, len(factors), _OF_BRANCH)]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy from the CPU does not wait for the GPU's pending work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
