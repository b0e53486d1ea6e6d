"""Blocks that overwrite what autograd has saved.

Many of the host's blocks write a result onto their input, or onto what they computed before, after a norm or another
function has kept that for its backward pass. A trial of each block finds out where: what was saved, and then written
to. From then on autograd keeps copies in these places, and only there.
"""

import itertools
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from .containers import tensors_in, with_tensors
from .overlay import replaced_forward
from .saving import saving
from .trained import Trained

# A module, and which of the tensors that autograd saves while it runs itself, and none of its parts.
Places = dict[nn.Module, set[int]]


class Protected:
    """Replaces the forward of a block. The first call that is recorded for a backward pass runs the block once more,
    on copies of its inputs: the trial."""

    def __init__(self, block: nn.Module):
        self.block, self.run = block, block.forward
        self.places: Places | None = None  # known after the trial

    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        if self.places is None and self._is_recorded(args, kwargs):
            self.places = self._overwritten(args, kwargs)
        places = self.places
        if not places:
            return self.run(*args, **kwargs)
        watch = _Watch(saving, places, lambda t, module, i: t.clone() if i in places.get(module, ()) else t)
        with self._watched(watch, {each for module in places for each in module.modules()}) as run:
            return run(*args, **kwargs)

    def _trained(self) -> list[Trained]:
        owners = (getattr(module.__dict__.get("forward"), "__self__", None) for module in self.block.modules())
        return [owner for owner in owners if isinstance(owner, Trained)]

    def _is_recorded(self, args, kwargs) -> bool:
        return any(tensor.requires_grad for tensor in tensors_in((args, kwargs))) or bool(self._trained())

    def _overwritten(self, args, kwargs) -> Places:
        """Makes the trial."""
        args, kwargs = with_tensors((args, kwargs), [tensor.clone() for tensor in tensors_in((args, kwargs))])
        seen: list[tuple[Tensor, int, nn.Module, int]] = []

        def note(tensor: Tensor, module: nn.Module, number: int) -> Tensor:
            tensor = tensor.detach()  # with its history it would hold the graph that holds it, for good
            seen.append((tensor, tensor._version, module, number))
            return tensor

        # Not `saving`: whoever counts what is kept must not count the trial.
        watch = _Watch(lambda pack: torch.autograd.graph.saved_tensors_hooks(pack, _as_it_is), {self.block}, note)
        # A checkpointed block that runs again is told what its layers are to use, for one run.
        given = [(layer, list(layer.given)) for layer in self._trained()]
        with self._watched(watch, set(self.block.modules())) as run:
            run(*args, **kwargs)
        for layer, each in given:
            layer.given.clear()
            layer.given.extend(each)
        places = Places()
        for tensor, version, module, number in seen:
            if tensor._version != version:
                places.setdefault(module, set()).add(number)
        return places

    @contextmanager
    def _watched(self, watch: "_Watch", modules: set[nn.Module]):
        """Gives the block's forward while `modules`, of the block, are watched."""
        with replaced_forward() as replace:
            for module in modules - {self.block}:
                replace(module, watch.over(module, module.forward))
            yield watch.over(self.block, self.run)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Watch:
    """Which module runs, in one call of a block, and how many tensors autograd has saved in it.

    hooks: gives the context in which autograd asks a function about each tensor that it saves. within: the modules
    whose call is such a context. note: says what is kept of a tensor, given the module and the tensor's number there.
    """

    def __init__(
        self,
        hooks: Callable[[Callable[[Tensor], Tensor]], AbstractContextManager],
        within: Container[nn.Module],
        note: Callable[[Tensor, nn.Module, int], Tensor],
    ):
        self.hooks, self.within, self.note, self.is_on = hooks, within, note, False
        self.running: list[tuple[nn.Module, itertools.count]] = []

    def over(self, module: nn.Module, forward: Callable) -> Callable:
        def watched(*args, **kwargs):
            self.running.append((module, itertools.count()))
            try:
                if self.is_on or module not in self.within:
                    return forward(*args, **kwargs)
                self.is_on = True
                try:
                    with self.hooks(self._pack):
                        return forward(*args, **kwargs)
                finally:
                    self.is_on = False
            finally:
                self.running.pop()

        return watched

    def _pack(self, tensor: Tensor) -> Tensor:
        module, numbers = self.running[-1]
        return self.note(tensor, module, next(numbers))
