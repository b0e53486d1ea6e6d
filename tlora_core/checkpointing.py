"""Gradient checkpointing: a block's insides are computed again in the backward pass instead of being kept.

PyTorch's own would give wrong gradients here without a word. Some of the host's blocks write to their inputs in place, and
what is computed again would start from what was written. So a block that does gets copies. The backward pass of a block is
an ordinary one, in which autograd notices any other tensor that was overwritten and raises an error.
"""
import dataclasses
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from .attach import replaced_forward
from .autograd import Trained


class Checkpointed:
    """Stands in for the forward of a block. Its layers may have adapters on that come off before the backward pass: they are
    put on again, with the ranks they had."""

    def __init__(self, block: nn.Module):
        self.run = block.forward
        self.layers = list(block.modules())[1:]
        self.overwritten: set[int] | None = None  # which of the tensors it is called with; known after the first call

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        forwards = [(layer, layer.__dict__["forward"]) for layer in self.layers if "forward" in layer.__dict__]
        call = _Call(self, (args, kwargs), forwards)
        tensors = _tensors(call.arguments)
        if not call.evaluations and not any(t.requires_grad for t in tensors):
            return self.run(*args, **kwargs)
        outputs = _Checkpoint.apply(call, torch.cat([torch.zeros(0), *(e.token for e in call.evaluations)]), *tensors)
        output, call.output = call.output, None  # else the backward pass, which holds the call, would hold its own output
        return _replaced(output, outputs)


class _Call:
    """One call of a block, which can be made again."""

    def __init__(self, block: Checkpointed, arguments, forwards: Iterable[tuple[nn.Module, Callable]]):
        self.block, self.forwards = block, forwards
        self.arguments = _replaced(arguments, iter(_tensors(arguments)))  # the host changes its dictionaries as it goes on
        self.evaluations = list({id(f.evaluation): f.evaluation for _, f in forwards if isinstance(f, Trained)}.values())
        self.output = None

    def __call__(self, tensors: Iterable[Tensor]):
        overwritten = self.block.overwritten
        given = [t.clone() if overwritten is None or i in overwritten else t for i, t in enumerate(tensors)]
        before = [t._version for t in given]
        args, kwargs = _replaced(self.arguments, given)
        with replaced_forward() as replace:
            for layer, forward in self.forwards:
                replace(layer, forward)
            output = self.block.run(*args, **kwargs)
        if overwritten is None:
            self.block.overwritten = {i for i, t in enumerate(given) if t._version != before[i]}
        return output


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, token: Tensor, *tensors: Tensor):
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        call.output = call(tensors)
        return tuple(_tensors(call.output))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        wanted = ctx.needs_input_grad[2:]
        tensors = [t.detach().requires_grad_() if needs else t for t, needs in zip(ctx.saved_tensors, wanted)]
        with ExitStack() as stack:
            for evaluation in ctx.call.evaluations:
                stack.enter_context(evaluation.without_gradients())
            with torch.enable_grad():
                outputs = _tensors(ctx.call(tensors))
            pairs = [(o, g) for o, g in zip(outputs, gradients) if o.requires_grad and g is not None]
            torch.autograd.backward(*zip(*pairs))
        return None, None, *(t.grad if needs else None for t, needs in zip(tensors, wanted))


def _tensors(value) -> list[Tensor]:
    """The tensors in nested containers, in order."""
    found = []
    _walk(value, found.append)
    return found


def _replaced(value, tensors: Iterable[Tensor]):
    """`value` with other tensors in their places, in new containers."""
    following = iter(tensors)
    return _walk(value, lambda _: next(following))


def _walk(value, change: Callable):
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _walk(v, change) for key, v in value.items()}
    if isinstance(value, tuple | list):
        new = [_walk(v, change) for v in value]
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _walk(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value
