"""Gradient checkpointing: a block's intermediate results are recomputed in the backward pass instead of being kept.

PyTorch's own implementation would silently give wrong gradients here. Some of the host's blocks write to their inputs
in place, so the recomputation would start from overwritten values. Such a block gets copies. The backward pass of a
block is an ordinary one, in which autograd raises an error for any other tensor that was overwritten.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..method.bank import Branch
from .containers import tensors_in, with_tensors
from .overlay import replaced_forward
from .trained import Trained, branches_of


class Checkpointed:
    """Replaces the forward of a block. Adapters on its layers come off before the backward pass, so they are put on
    again with the same ranks."""

    def __init__(self, block: nn.Module):
        self.run = block.forward
        self.layers = list(block.modules())[1:]
        self.overwritten: set[int] | None = None  # indices of its inputs; known after the first call

    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        forwards = [(layer, layer.__dict__["forward"]) for layer in self.layers if "forward" in layer.__dict__]
        call = _Call(self, (args, kwargs), forwards)
        tensors = tensors_in(call.arguments)
        if not call.trained and not any(t.requires_grad for t in tensors):
            return self.run(*args, **kwargs)
        with torch.no_grad():
            output, factors = call.noted()
        return with_tensors(output, _Checkpoint.apply(call, tensors_in(output), *tensors, *factors))


class _Call:
    """One call of a block, which can be repeated."""

    def __init__(self, block: Checkpointed, arguments, forwards: Iterable[tuple[nn.Module, Callable]]):
        self.block, self.forwards = block, forwards
        # In new containers, since the host changes its dictionaries later.
        self.arguments = with_tensors(arguments, tensors_in(arguments))
        self.count = len(tensors_in(arguments))
        owners = (getattr(forward, "__self__", None) for _, forward in forwards)
        self.trained = [owner for owner in owners if isinstance(owner, Trained)]

    def noted(self) -> tuple[Any, list[Tensor | None]]:
        """Makes the call without gradients. Returns its output, and the tensors of all branches that its layers used;
        these are inputs of the block like any other."""
        calls: list[tuple[Trained, list[tuple[bool, list[Branch]]]]] = [(layer, []) for layer in self.trained]
        try:
            for layer, used in calls:
                layer.used = used
            output = self(tensors_in(self.arguments))
            self.used = [(layer, is_text, len(each)) for layer, used in calls for is_text, each in used]
            branches = [each for _, used in calls for _, each in used]
        finally:
            for layer in self.trained:
                layer.used = None
        return output, [tensor for each in branches for branch in each for tensor in branch]

    @contextmanager
    def given(self, factors: Sequence[Tensor | None]):
        """Within the block, the layers use the branches of these tensors, each call the same ones as before."""
        following = iter(branches_of(factors))
        try:
            for layer, is_text, count in self.used:
                layer.given.append((is_text, list(islice(following, count))))
            yield
        finally:
            for layer in self.trained:
                layer.given.clear()

    def __call__(self, tensors: Sequence[Tensor]):
        overwritten = self.block.overwritten
        given = [t.clone() if overwritten is None or i in overwritten else t for i, t in enumerate(tensors)]
        before = [t._version for t in given]
        args, kwargs = with_tensors(self.arguments, given)
        with replaced_forward() as replace:
            for layer, forward in self.forwards:
                replace(layer, forward)
            output = self.block.run(*args, **kwargs)
        if overwritten is None:
            self.block.overwritten = {i for i, t in enumerate(given) if t._version != before[i]}
        return output


class _Checkpoint(torch.autograd.Function):
    """A block as autograd sees it: its inputs, which include the factors of adapters, and its outputs."""

    @staticmethod
    def forward(ctx, call: _Call, outputs: Sequence[Tensor], *inputs: Tensor | None):
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        wanted, count = ctx.needs_input_grad[2:], ctx.call.count
        inputs = [t.detach().requires_grad_() if needs else t for t, needs in zip(ctx.saved_tensors, wanted)]
        with ctx.call.given(inputs[count:]), torch.enable_grad():
            outputs = tensors_in(ctx.call(inputs[:count]))
        pairs = [(o, g) for o, g in zip(outputs, gradients) if o.requires_grad and g is not None]
        leaves = [t for t, needs in zip(inputs, wanted) if needs]
        found = iter(_gradients(pairs, leaves))
        return None, None, *(next(found) if needs else None for needs in wanted)


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of the leaves. pairs: outputs and their gradients."""
    if not pairs:
        return [None] * len(leaves)
    outputs, gradients = zip(*pairs)
    return torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
