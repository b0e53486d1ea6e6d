"""What trainable adapters add to their layers, and the gradients of it, written out.

There are hundreds of adapters, each with a few small products. Those of one kind, shape and rank make a group: what can be done
before the first product or after the last one is done for all of them at once.
"""
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import LongTensor, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .adapters import Adapter, OrthoAdapter


class Kept:
    """What a layer and the starts of its adapters made of an input that comes back as it is, for as long as that lives."""

    def __init__(self, x: Tensor, output: Tensor):
        self._input, self._version, self.output = weakref.ref(x), x._version, output
        self._starts: WeakKeyDictionary[Adapter, Tensor] = WeakKeyDictionary()

    def is_of(self, x: Tensor) -> bool:
        return self._input() is x and self._version == x._version

    @property
    def is_alive(self) -> bool:
        return self._input() is not None

    @property
    def tokens(self) -> Tensor:
        """The input [tokens, in] in full precision."""
        return _in_full_precision(self._input())

    def start(self, adapter: OrthoAdapter) -> Tensor:
        """A0 x [tokens, r]."""
        if adapter not in self._starts:
            self._starts[adapter] = self.tokens @ adapter.A0.t()
        return self._starts[adapter]


_FULL = WeakTensorKeyDictionary()  # input in half precision: (its version, the same in full), for all layers that it goes to


def _in_full_precision(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x.flatten(0, -2)
    if x not in _FULL or _FULL[x][0] != x._version:
        _FULL[x] = x._version, x.flatten(0, -2).float()
    return _FULL[x][1]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from a CPU without waiting for what a GPU has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


_ON = WeakTensorKeyDictionary()  # ranks of the samples: what _components_on makes of them, for all layers


def _components_on(active: LongTensor, columns: int, like: Tensor) -> Tensor:
    """Ones for the first `active` [B] of `columns` components, zeros for the others: [B, columns], dtype and device of `like`."""
    known, key = _ON.setdefault(active, {}), (columns, like.dtype, like.device)
    if key not in known:
        known[key] = moved((torch.arange(columns, device=active.device) < active[:, None]).to(like.dtype), like.device)
    return known[key]


class Part(NamedTuple):
    """A trainable adapter on the rows of a layer from `row` on, with its rank in this evaluation: one int, or int64 [B], best
    on the CPU, for samples that differ."""

    adapter: Adapter
    active: int | LongTensor
    row: int

    @property
    def columns(self) -> int:
        return self.active if isinstance(self.active, int) else int(self.active.max())

    def mask(self, hidden: Tensor) -> Tensor:
        """Zeroes what a sample's own rank leaves out of hidden [B * tokens, columns or twice as many], in
        place."""
        if isinstance(self.active, Tensor):
            on = _components_on(self.active, self.columns, hidden)
            hidden.view(len(self.active), -1, hidden.shape[1] // self.columns, self.columns).mul_(on[:, None, None])
        return hidden


Mask = Callable[[Tensor], Tensor]  # Part.mask


class Group:
    """Adapters of one kind and shape, with their first `columns` components on, on inputs of one dtype.

    This class is for plain ones; the others say what they do instead.
    """

    def __init__(self, adapters: Sequence[Adapter], columns: int, dtype: torch.dtype):
        self.adapters, self.columns, self.dtype = adapters, columns, dtype
        self.out = adapters[0].B.shape[0]
        self.of_B = self.of_A = None  # gradients, once there are any
        self.done: set[int] = set()

    def stacked(self, name: str) -> Tensor:
        """The parameters or buffers of that name, of all adapters and components [count, ...], in full precision."""
        return stack([getattr(adapter, name) for adapter in self.adapters])

    def rows_of(self, output: Tensor, row: int) -> Tensor:
        """An adapter's own part of a layer's output [tokens, at least out], from `row` on."""
        return output if output.shape[1] == self.out else output[:, row:row + self.out]

    @cached_property
    def down(self) -> Sequence[Tensor]:
        """[columns, in] of each adapter, or twice as many rows."""
        return self.stacked("A")[:, :self.columns].to(self.dtype).unbind()

    @cached_property
    def up(self) -> Sequence[Tensor]:
        """[out, columns] of each adapter, or twice as many columns."""
        return self.stacked("B")[..., :self.columns].to(self.dtype).unbind()

    def add(self, i: int, output: Tensor, x: Tensor, kept: Kept | None, mask: Mask) -> Tensor:
        """Adds to output [tokens, out] what adapter i makes of x [tokens, in], the input of `kept`. Returns what `back` needs
        of it, [tokens, columns]."""
        hidden = mask(x @ self.down[i].t())
        output.addmm_(hidden, self.up[i].t())
        return hidden

    def back(self, i: int, gradient: Tensor, x: Tensor, hidden: Tensor, mask: Mask, of_input: Tensor | None) -> None:
        """Takes note of the gradients of an adapter's factors, given that of its output [tokens, out] and what `add` returned;
        adds that of x to of_input, unless it is None."""
        of_hidden = mask(gradient @ self.up[i])
        if of_input is not None:
            of_input.addmm_(of_hidden, self.down[i])
        self._note(i, gradient, hidden, of_hidden, x)

    def _note(self, i: int, gradient: Tensor, hidden: Tensor, of_hidden: Tensor, x: Tensor) -> None:
        """Notes the gradients of B and A, given the products' inputs and the gradients of their outputs."""
        if self.of_B is None:
            self.of_B, self.of_A = (torch.empty_like(self.stacked(name), dtype=self.dtype) for name in ("B", "A"))
            self._active = list(zip(self.of_B[..., :self.columns].unbind(), self.of_A[:, :self.columns].unbind()))
        of_B, of_A = self._active[i]
        fresh = 0 if i not in self.done else 1  # a layer may be called more than once
        self.done.add(i)
        torch.addmm(of_B, gradient.t(), hidden, beta=fresh, out=of_B)
        torch.addmm(of_A, of_hidden.t(), x, beta=fresh, out=of_A)
        if len(self.done) == len(self.adapters):
            self._forget_factors()  # most likely done with; else they are made anew

    def gradients(self) -> dict[Adapter, tuple[Tensor, ...]]:
        """Of the parameters, in the adapters' order of them. Ends the group: it gives up its memory as the gradients take theirs."""
        if not self.done:
            return {}
        self.of_B[..., self.columns:] = self.of_A[:, self.columns:] = 0
        for i in set(range(len(self.adapters))) - self.done:
            self.of_B[i] = self.of_A[i] = 0
        self._forget_factors()
        self._active = None
        of_A = self.of_A = self.of_A.to(self.adapters[0].A.dtype)
        of_B = self.of_B = self.of_B.to(self.adapters[0].B.dtype)
        return dict(zip(self.adapters, zip(*(each.unbind() for each in self._of_parameters(of_A, of_B)))))

    def _forget_factors(self) -> None:
        for name in ("down", "up", "rows", "factors"):
            self.__dict__.pop(name, None)

    def _of_parameters(self, of_A: Tensor, of_B: Tensor) -> Sequence[Tensor]:
        return of_A, of_B


class OrthogonalGroup(Group):
    """B S M A x - B0 S0 M A0 x as it stands there: full precision has the digits for a difference of products, and nothing but the
    parameters themselves has to be read or kept."""

    @cached_property
    def factors(self) -> Sequence[tuple[Tensor, ...]]:
        """A, S, B, A0, S0, B0 of each adapter's active components."""
        on = slice(self.columns)
        return list(zip(*(self.stacked(name)[index].unbind() for name, index in (
            ("A", (slice(None), on)), ("S", (slice(None), on)), ("B", (..., on)),
            ("A0", (slice(None), on)), ("S0", (slice(None), on)), ("B0", (..., on))))))

    def add(self, i: int, output: Tensor, x: Tensor, kept: Kept | None, mask: Mask) -> Tensor:
        A, S, B, A0, S0, B0 = self.factors[i]
        hidden = mask(x @ A.t())
        start = x @ A0.t() if kept is None else kept.start(self.adapters[i])[:, :self.columns]
        output.addmm_(hidden * S, B.t()).addmm_(mask(start * S0), B0.t(), alpha=-1)
        return hidden

    def back(self, i: int, gradient: Tensor, x: Tensor, hidden: Tensor, mask: Mask, of_input: Tensor | None) -> None:
        A, S, B, A0, S0, B0 = self.factors[i]
        of_hidden = mask(gradient @ B).mul_(S)
        if of_input is not None:
            of_input.addmm_(of_hidden, A).addmm_(mask(gradient @ B0).mul_(S0), A0, alpha=-1)
        self._note(i, gradient, hidden, of_hidden, x)

    def _of_parameters(self, of_A: Tensor, of_B: Tensor) -> Sequence[Tensor]:
        # So far of_B is that of B S.
        of_S = torch.linalg.vecdot(of_B, self.stacked("B"), dim=1)
        of_B *= self.stacked("S")[:, None]
        return of_A, of_S, of_B


class DifferenceGroup(OrthogonalGroup):
    """The same for half precision, which would lose all digits in that difference: products of small differences instead, as in
    OrthoAdapter.factors. Of up and down, the first columns of all components come first, then the second ones."""

    @cached_property
    def down(self) -> Sequence[Tensor]:
        A, A0 = (self.stacked(name)[:, :self.columns] for name in ("A", "A0"))
        return torch.cat((A, A - A0), 1).to(self.dtype).unbind()

    @cached_property
    def up(self) -> Sequence[Tensor]:
        B, B0 = (self.stacked(name)[..., :self.columns] for name in ("B", "B0"))
        S, S0 = (self.stacked(name)[:, None, :self.columns] for name in ("S", "S0"))
        both = torch.empty(*B.shape[:2], 2 * self.columns, dtype=B.dtype, device=B.device)
        moved = torch.sub(B, B0, out=both[..., :self.columns])
        moved.mul_(S).addcmul_(B0, S - S0)
        torch.mul(B0, S0, out=both[..., self.columns:])
        return both.to(self.dtype).unbind()

    @cached_property
    def rows(self) -> Sequence[Tensor]:
        """A, transposed, of the active components, in full precision."""
        return self.stacked("A")[:, :self.columns].mT.unbind()

    def add(self, i: int, output: Tensor, x: Tensor, kept: Kept | None, mask: Mask) -> Tensor:
        if kept is None:
            hidden = x @ self.down[i].t()
        else:
            first = kept.tokens @ self.rows[i]
            hidden = torch.cat((first, first - kept.start(self.adapters[i])[:, :self.columns]), 1).to(self.dtype)
        output.addmm_(mask(hidden), self.up[i].t())
        # The gradient asks for the first columns only; a copy, or the others would stay too.
        return hidden[:, :self.columns].contiguous()

    def back(self, i: int, gradient: Tensor, x: Tensor, hidden: Tensor, mask: Mask, of_input: Tensor | None) -> None:
        of_hidden = mask(gradient @ self.up[i])
        if of_input is not None:
            of_input.addmm_(of_hidden, self.down[i])
        self._note(i, gradient, hidden, of_hidden[:, :self.columns] + of_hidden[:, self.columns:], x)


def group_of(adapters: Sequence[Adapter], columns: int, dtype: torch.dtype) -> Group:
    """The group that serves these adapters, all of one kind and shape."""
    if not isinstance(adapters[0], OrthoAdapter):
        return Group(adapters, columns, dtype)
    exact = adapters[0].A.dtype == dtype
    return (OrthogonalGroup if exact else DifferenceGroup)(adapters, columns, dtype)


@torch.no_grad()
def stack(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack, without copying where the tensors lie one after the other in memory, as `adapters.make_adapters` lays them."""
    first = tensors[0]
    size, start, storage = first.numel(), first.data_ptr(), first.untyped_storage()
    end, step = (first.storage_offset() + len(tensors) * size) * first.element_size(), size * first.element_size()
    in_a_row = range(start, start + len(tensors) * step, step)
    if first.is_contiguous() and end <= storage.nbytes() and [t.data_ptr() for t in tensors] == list(in_a_row):
        return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))
    return torch.stack(tensors)
