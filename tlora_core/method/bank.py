"""Trainable adapters of one shape in stacked parameters, and what each adds beside its layer in an evaluation.

A model has hundreds of adapters of a dozen shapes. Stacked, one operation prepares the factors of all adapters of a
shape, an optimizer sees a dozen large tensors, and autograd itself leads the gradients of the layers back into the
stacks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapters import Adapter, difference_form

Kept = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # what a branch needs to go back: Ax, up, down, on


class Branch(NamedTuple):
    """What one adapter adds beside its layer in an evaluation: up M_t down x, in the dtype of x.

    up [out, g * c], down [g * c, in]: the factors as they are applied, without gradients; c components, g columns for
    each. P [out, c], A [c, in]: first columns and rows of the same, which autograd leads back to the parameters. The
        gradient given for P is that of B S, the one given for A that of A, over both halves of up and down.
    on [B, 1, 1, c]: ones for the components that each sample of a batch has on; None where that is all of them.
    """

    P: Tensor
    up: Tensor
    A: Tensor
    down: Tensor
    on: Tensor | None

    def add(self, output: Tensor, x: Tensor, is_recorded: bool, wants_grad_x: bool) -> Kept:
        """Adds this to output [tokens, out] for x [tokens, in]."""
        columns = self.A.shape[0]
        hidden = _masked(x @ self.down.t(), self.on, columns)
        output.addmm_(hidden, self.up.t())
        Ax = hidden
        if is_recorded and hidden.shape[1] > columns:
            # down is [A - A0; A0], so the two halves add up to A x.
            Ax = hidden[:, :columns] + hidden[:, columns:]
        return Ax, self.up, self.down if wants_grad_x else None, self.on

    @staticmethod
    def backward(kept: Kept, grad: Tensor, x: Tensor, grad_x: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of P and A for that of the output [tokens, out]; adds that of x to grad_x, unless it is
        None."""
        Ax, up, down, on = kept
        columns = Ax.shape[1]
        grad_hidden = _masked(grad @ up, on, columns)
        if grad_x is not None:
            grad_x.addmm_(grad_hidden, down)
        # up is [P, P - P0] and down [A - A0; A0]: the first half of grad_hidden is the gradient of A x.
        return grad.t() @ Ax, grad_hidden[:, :columns].t() @ x


class TextBranch(NamedTuple):
    """A `Branch` on the text, which all layers of a bank are given alike: their products with it are made together.

    Ax [tokens, c]: M A x, which autograd leads back to A. hidden [tokens, g * c]: M down x, without gradients.
    """

    P: Tensor
    up: Tensor
    Ax: Tensor
    hidden: Tensor
    on: Tensor | None

    def add(self, output: Tensor, x: Tensor, is_recorded: bool, wants_grad_x: bool) -> Kept:
        """As Branch.add. A text wants no gradient."""
        output.addmm_(self.hidden, self.up.t())
        return self.Ax, self.up, None, self.on

    @staticmethod
    def backward(kept: Kept, grad: Tensor, x: Tensor, grad_x: None) -> tuple[Tensor, Tensor]:
        """The gradients of P and Ax for that of the output [tokens, out]."""
        Ax, up, _, on = kept
        return grad.t() @ Ax, _masked(grad @ up, on, Ax.shape[1])[:, : Ax.shape[1]]


def _masked(hidden: Tensor, on: Tensor | None, columns: int) -> Tensor:
    """Zeroes what each sample's own rank leaves out of hidden [..., B * tokens, g * columns], in place."""
    if on is not None:
        hidden.view(*hidden.shape[:-2], len(on), -1, hidden.shape[-1] // columns, columns).mul_(on)
    return hidden


def branches_of(kind: type, tensors: Sequence[Tensor | None]) -> list[Branch | TextBranch]:
    """Branches of one kind from all their tensors in a row."""
    size = len(kind._fields)
    return [kind(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


class Bank(nn.Module):
    """The adapters of n layers of one shape. `bank[i]` is the i-th of them."""

    group: int
    A: nn.Parameter  # [n, r, in]
    B: nn.Parameter  # [n, out, r]

    def __len__(self) -> int:
        return len(self.A)

    def __getitem__(self, index: int) -> "BankAdapter":
        return BankAdapter(self, index)

    def ups(self, columns: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """P and up of each adapter's branch, with the first `columns` components on."""
        raise NotImplementedError

    def downs(self, columns: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """A and down of the same."""
        raise NotImplementedError

    def on_text(self, columns: int, x: Tensor, on: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Ax and hidden of each adapter's branch on the text x [B, tokens, in]."""
        return _each(_OnText.apply(self.A, getattr(self, "A0", None), x, on, columns))

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """(up, down) of one adapter by the contract of `adapters`, differentiable in the parameters."""
        raise NotImplementedError


class BankAdapter(Adapter):
    """One layer's adapter in a bank. Its A [r, in], S [r] and B [out, r] are parts of the stacks."""

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
    """B A of LoRA and Vanilla T-LoRA, from B [n, out, r] and A [n, r, in] as they start."""

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
    """B S A - B0 S0 A0 of Ortho-LoRA and T-LoRA (equation 6): A, S, B start at A0, S0, B0, the updates at zero.

    B0 [n, out, r], S0 [n, 1, r], A0 [n, r, in]: buffers outside the state dict, as a seed or a weight makes them again.
    S has a dimension for B's rows, so that it scales B's columns as it is.
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
    """Those of each adapter."""
    return list(zip(*(stack.unbind() for stack in stacks)))


class _Up(torch.autograd.Function):
    """up = [P, P - P0] with P = B S, as P (A - A0) + (P - P0) A0 is the update: small differences of factors, where a
    half precision format would lose all digits in B S A - B0 S0 A0."""

    @staticmethod
    def forward(ctx, B, S, B0, S0, columns, dtype):
        ctx.save_for_backward(B, S)
        B, S, B0, S0 = (t[..., :columns] for t in (B, S, B0, S0))
        up = B.new_empty(*B.shape[:2], 2 * columns, dtype=dtype)
        torch.mul(B, S, out=up[..., :columns])
        up[..., columns:] = torch.sub(B, B0).mul_(S).addcmul_(B0, S - S0)
        ctx.mark_non_differentiable(up)
        ctx.set_materialize_grads(False)  # or there would be zeros for all of up
        return up[..., :columns], up

    @staticmethod
    def backward(ctx, grad, _):
        B, S = ctx.saved_tensors
        grad_B, columns = _room_for(B, grad.shape[2], B.shape[2]), grad.shape[2]
        own = grad_B[..., :columns]
        # The products whose sum is the gradient of S lie for a moment where that of B goes: this may be the step's peak
        # in memory.
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
        grad_A = _room_for(A, grad.shape[1], A.shape[1])
        grad_A[:, : grad.shape[1]] = grad
        return grad_A, None, None, None


class _OnText(torch.autograd.Function):
    """M A x and M down x of all adapters [n, B * tokens, ...] for a text x [B, tokens, in], in full precision: this
    difference of products has its digits, and down is not made at all."""

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
        grad_A = _room_for(A, grad.shape[2], A.shape[1])
        grad_A[:, : grad.shape[2]] = grad.mT.to(A.dtype) @ tokens
        return grad_A, None, None, None, None


def _room_for(parameter: Tensor, columns: int, rank: int) -> Tensor:
    """A tensor for the gradient of a parameter whose first `columns` components of `rank` were on: zero for the
    others."""
    return torch.empty_like(parameter) if columns == rank else torch.zeros_like(parameter)


def lora_bank(starts: Sequence[tuple[Tensor, Tensor]]) -> LoRABank:
    """Of (B [out, r], A [r, in]) of layers of one shape."""
    B, A = (torch.stack(each) for each in zip(*starts))
    return LoRABank(B, A)


def ortho_bank(starts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> OrthoBank:
    """Of (B0 [out, r], S0 [r], A0 [r, in]) of layers of one shape."""
    B0, S0, A0 = (torch.stack(each) for each in zip(*starts))
    return OrthoBank(B0, S0[:, None], A0)
