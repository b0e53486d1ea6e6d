"""Trainable adapters of one shape in stacked parameters, and the branch of each adapter beside its layer.

A model has hundreds of adapters of a dozen shapes. With stacks, one operation prepares the factors of all adapters of a
shape, an optimizer sees a dozen large tensors, and autograd propagates the gradients of the layers to the stacks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapters import Adapter, difference_form

Saved = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]  # saved for a branch's backward: Ax, up, down, on


class Branch(NamedTuple):
    """One adapter's branch beside its layer in an evaluation of the model: up M_t down x, in the dtype of x.

    up [out, g * c], down [g * c, in]: the applied factors, without gradients; c components with g columns each.
    P [out, c], A [c, in]: the first columns of up and rows of down, which autograd connects to the parameters. The
        gradient for P is that of B S and the gradient for A that of A, over both halves of up and down.
    on [B, 1, 1, c]: ones for the active components of each sample; None if all are active.
    """

    P: Tensor
    up: Tensor
    A: Tensor
    down: Tensor
    on: Tensor | None

    def add(self, output: Tensor, x: Tensor, is_recorded: bool, wants_grad_x: bool) -> Saved:
        """Adds the branch to output [tokens, out] in place, for x [tokens, in]."""
        columns = self.A.shape[0]
        hidden = _masked(x @ self.down.t(), self.on, columns)
        output.addmm_(hidden, self.up.t())
        Ax = hidden
        if is_recorded and hidden.shape[1] > columns:
            # down is [A - A0; A0], so the two halves add up to A x.
            Ax = hidden[:, :columns] + hidden[:, columns:]
        return Ax, self.up, self.down if wants_grad_x else None, self.on

    @staticmethod
    def backward(saved: Saved, grad: Tensor, x: Tensor, grad_x: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of P and A from grad, the output's [tokens, out]; adds the gradient of x to grad_x unless it
        is None."""
        Ax, up, down, on = saved
        columns = Ax.shape[1]
        grad_hidden = _masked(grad @ up, on, columns)
        if grad_x is not None:
            grad_x.addmm_(grad_hidden, down)
        # up is [P, P - P0] and down [A - A0; A0]: the first half of grad_hidden is the gradient of A x.
        return grad.t() @ Ax, grad_hidden[:, :columns].t() @ x


class TextBranch(NamedTuple):
    """A `Branch` on the text. All layers of a bank have the same text as input, so their products are made together.

    Ax [tokens, c]: M A x, which autograd connects to A. hidden [tokens, g * c]: M down x, without gradients.
    """

    P: Tensor
    up: Tensor
    Ax: Tensor
    hidden: Tensor
    on: Tensor | None

    def add(self, output: Tensor, x: Tensor, is_recorded: bool, wants_grad_x: bool) -> Saved:
        """Like Branch.add. The text needs no gradient."""
        output.addmm_(self.hidden, self.up.t())
        return self.Ax, self.up, None, self.on

    @staticmethod
    def backward(saved: Saved, grad: Tensor, x: Tensor, grad_x: None) -> tuple[Tensor, Tensor]:
        """The gradients of P and Ax from grad, the output's [tokens, out]."""
        Ax, up, _, on = saved
        return grad.t() @ Ax, _masked(grad @ up, on, Ax.shape[1])[:, : Ax.shape[1]]


def _masked(hidden: Tensor, on: Tensor | None, columns: int) -> Tensor:
    """Zeroes the inactive components of each sample in hidden [..., B * tokens, g * columns], in place."""
    if on is not None:
        hidden.view(*hidden.shape[:-2], len(on), -1, hidden.shape[-1] // columns, columns).mul_(on)
    return hidden


def branches_of(kind: type, tensors: Sequence[Tensor | None]) -> list[Branch | TextBranch]:
    """Branches of one kind from the flat sequence of their tensors."""
    size = len(kind._fields)
    return [kind(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


class Bank(nn.Module):
    """The adapters of n layers of one shape. `bank[i]` is the adapter of layer i."""

    group: int
    A: nn.Parameter  # [n, r, in]
    B: nn.Parameter  # [n, out, r]

    def __len__(self) -> int:
        return len(self.A)

    def __getitem__(self, index: int) -> "BankAdapter":
        return BankAdapter(self, index)

    def ups(self, columns: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """P and up of each adapter's branch, with the first `columns` components active."""
        raise NotImplementedError

    def downs(self, columns: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """A and down of each adapter's branch, with the first `columns` components active."""
        raise NotImplementedError

    def on_text(self, columns: int, x: Tensor, on: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Ax and hidden of each adapter's branch for the text x [B, tokens, in]."""
        return _each(_OnText.apply(self.A, getattr(self, "A0", None), x, on, columns))

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """(up, down) of one adapter, as specified in `adapters`; differentiable in the parameters."""
        raise NotImplementedError


class BankAdapter(Adapter):
    """One layer's adapter in a bank. Its A [r, in], S [r] and B [out, r] are slices of the stacks."""

    def __init__(self, bank: Bank, index: int):
        self.bank, self.index = bank, index

    @property
    def module(self) -> nn.Module:
        return self.bank

    @property
    def group(self) -> int:
        return self.bank.group

    @property
    def rank(self) -> int:
        return self.bank.A.shape[1]

    @property
    def A(self) -> Tensor:
        return self.bank.A[self.index]

    @property
    def B(self) -> Tensor:
        return self.bank.B[self.index]

    @property
    def S(self) -> Tensor:
        return self.bank.S[self.index, 0]

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.bank.factors(self.index)


class LoRABank(Bank):
    """B A of LoRA and Vanilla T-LoRA, initialised with B [n, out, r] and A [n, r, in]."""

    group = 1

    def __init__(self, B: Tensor, A: Tensor):
        super().__init__()
        self.A, self.B = nn.Parameter(A.detach()), nn.Parameter(B.detach())

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        return self.B[index], self.A[index]

    def ups(self, columns, dtype):
        P = self.B[..., :columns].to(dtype)
        return _each((P, P.detach()))

    def downs(self, columns, dtype):
        A = self.A[:, :columns].to(dtype)
        return _each((A, A.detach()))


class OrthoBank(Bank):
    """B S A - B0 S0 A0 of Ortho-LoRA and T-LoRA (equation 6): A, S, B start at A0, S0, B0, and the update at zero.

    B0 [n, out, r], S0 [n, 1, r], A0 [n, r, in]: buffers outside the state dict, as they follow from a seed or a weight.
    S has a dimension for B's rows, so that it broadcasts over B's columns.
    """

    group = 2

    def __init__(self, B0: Tensor, S0: Tensor, A0: Tensor):
        super().__init__()
        for name, start in (("A", A0), ("S", S0), ("B", B0)):
            self.register_parameter(name, nn.Parameter(start.detach().clone()))
            self.register_buffer(f"{name}0", start.detach(), persistent=False)

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        return difference_form(
            (self.B[index], self.S[index], self.A[index]), (self.B0[index], self.S0[index], self.A0[index])
        )

    def ups(self, columns, dtype):
        return _each(_Up.apply(self.B, self.S, self.B0, self.S0, columns, dtype))

    def downs(self, columns, dtype):
        return _each(_Down.apply(self.A, self.A0, columns, dtype))


def _each(stacks: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The pair of tensors of each adapter."""
    return list(zip(*(stack.unbind() for stack in stacks)))


class _Up(torch.autograd.Function):
    """up = [P, P - P0] with P = B S. The update is P (A - A0) + (P - P0) A0: it uses small differences of factors,
    where B S A - B0 S0 A0 would lose all digits in half precision."""

    @staticmethod
    def forward(ctx, B, S, B0, S0, columns, dtype):
        ctx.save_for_backward(B, S)
        B, S, B0, S0 = (t[..., :columns] for t in (B, S, B0, S0))
        up = B.new_empty(*B.shape[:2], 2 * columns, dtype=dtype)
        torch.mul(B, S, out=up[..., :columns])
        up[..., columns:] = torch.sub(B, B0).mul_(S).addcmul_(B0, S - S0)
        ctx.mark_non_differentiable(up)
        ctx.set_materialize_grads(False)  # no zeros for the unused gradient of up
        return up[..., :columns], up

    @staticmethod
    def backward(ctx, grad, _):
        B, S = ctx.saved_tensors
        grad_B, columns = _empty_grad(B, grad.shape[2], B.shape[2]), grad.shape[2]
        own = grad_B[..., :columns]
        # This may be the step's memory peak, so the terms of S's gradient use the memory of B's gradient first.
        torch.mul(grad, B[..., :columns], out=own)
        grad_S = grad_B.sum(1, keepdim=True)
        torch.mul(grad, S[..., :columns], out=own)
        return grad_B, grad_S, None, None, None, None


class _Down(torch.autograd.Function):
    """down = [A - A0; A0]."""

    @staticmethod
    def forward(ctx, A, A0, columns, dtype):
        ctx.save_for_backward(A)
        down = A.new_empty(A.shape[0], 2 * columns, A.shape[2], dtype=dtype)
        torch.sub(A[:, :columns], A0[:, :columns], out=down[:, :columns])
        down[:, columns:] = A0[:, :columns]
        ctx.mark_non_differentiable(down)
        ctx.set_materialize_grads(False)
        return down[:, :columns], down

    @staticmethod
    def backward(ctx, grad, _):
        (A,) = ctx.saved_tensors
        grad_A = _empty_grad(A, grad.shape[1], A.shape[1])
        grad_A[:, : grad.shape[1]] = grad
        return grad_A, None, None, None


class _OnText(torch.autograd.Function):
    """M A x and M down x of all adapters [n, B * tokens, ...] for a text x [B, tokens, in]. In full precision, the
    difference of products keeps its digits and down need not be formed."""

    @staticmethod
    def forward(ctx, A, A0, x, on, columns):
        tokens = x.flatten(0, -2).to(A.dtype)
        ctx.save_for_backward(A, tokens)
        Ax = tokens @ A[:, :columns].mT
        if A0 is None:
            hidden = Ax.to(x.dtype, copy=True)
        else:
            A0x = tokens @ A0[:, :columns].mT
            hidden = torch.cat((Ax - A0x, A0x), -1).to(x.dtype)
        Ax = Ax.to(x.dtype)
        for each in (Ax, hidden):
            _masked(each, on, columns)
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        return Ax, hidden

    @staticmethod
    def backward(ctx, grad, _):
        A, tokens = ctx.saved_tensors
        grad_A = _empty_grad(A, grad.shape[2], A.shape[1])
        grad_A[:, : grad.shape[2]] = grad.mT.to(A.dtype) @ tokens
        return grad_A, None, None, None, None


def _empty_grad(parameter: Tensor, columns: int, rank: int) -> Tensor:
    """Memory for a parameter's gradient, with zeros if only the first `columns` of its `rank` components were
    active."""
    return torch.empty_like(parameter) if columns == rank else torch.zeros_like(parameter)


def lora_bank(starts: Sequence[tuple[Tensor, Tensor]]) -> LoRABank:
    """A bank from the starts (B [out, r], A [r, in]) of layers of one shape."""
    B, A = (torch.stack(each) for each in zip(*starts))
    return LoRABank(B, A)


def ortho_bank(starts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> OrthoBank:
    """A bank from the starts (B0 [out, r], S0 [r], A0 [r, in]) of layers of one shape."""
    B0, S0, A0 = (torch.stack(each) for each in zip(*starts))
    return OrthoBank(B0, S0[:, None], A0)
