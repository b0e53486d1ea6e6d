"""Trainable adapters of one shape in stacked parameters, and the branch of each adapter beside its layer.

A model has hundreds of adapters of a dozen shapes. With stacks, one operation prepares the factors of all adapters of a
shape, an optimizer sees a dozen large tensors, and autograd propagates the gradients of the layers to the stacks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import Adapter, difference_form

Starts = tuple[Tensor, Tensor, Tensor]  # B0 float16 [n, out, r], S0 [n, 1, r], A0 float16 [n, r, in]


class Branch(NamedTuple):
    """One adapter's branch beside its layer in an evaluation of the model: up M_t down x, in the dtype of x.

    up [out, g * c], down [g * c, in]: the applied factors, without gradients; c components with g columns each. On a
        text, which all layers of a bank share, down is M down x [tokens, g * c] instead.
    P [out, c], A [c, in] (on a text M A x [tokens, c]): autograd connects them to the parameters. The gradient for P is
        that of B S and the gradient for A that of A, over both halves of up and down.
    on [B, 1, 1, c]: ones for the active components of each sample; None if all are active.
    """

    P: Tensor
    up: Tensor
    A: Tensor
    down: Tensor
    on: Tensor | None


class Bank(nn.Module):
    """The adapters of n layers of one shape; `bank[i]` is the adapter of layer i.

    Without starts: B A of LoRA and Vanilla T-LoRA. With starts: B S A - B0 S0 A0 of Ortho-LoRA and T-LoRA (equation 6);
    S has a dimension for B's rows, so that it broadcasts over B's columns. The starts are buffers outside the state
    dict, since they follow from a seed or a weight. Those of A and B are float16, to which they are rounded: A and B
    begin as exactly these values. The rounding leaves them orthonormal to 5e-4, far less than one step moves them.
    """

    A: nn.Parameter
    S: nn.Parameter | None
    B: nn.Parameter

    def __init__(self, B: Tensor, S: Tensor | None, A: Tensor):
        """B [n, out, r], S [n, 1, r] or None, A [n, r, in]; an orthogonal start has all three."""
        super().__init__()
        self.group = 1 if S is None else 2
        for name, start in (("A", A), ("S", S), ("B", B)):
            value = None if start is None else start.detach()
            kept = None
            if S is not None and value is not None:
                kept = value if name == "S" else value.half()
                value = kept.to(value.dtype, copy=True)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
            self.register_buffer(f"{name}0", kept, persistent=False)

    def __len__(self) -> int:
        return len(self.A)

    def __getitem__(self, index: int) -> "BankAdapter":
        return BankAdapter(self, index)

    def branches(
        self, columns: int, dtype: torch.dtype, on: Tensor | None = None, text: Tensor | None = None
    ) -> list[Branch]:
        """Each adapter's branch with the first `columns` components. text [B, tokens, in]: the input of all layers."""
        starts = None if self.S is None else (self.B0, self.S0, self.A0)
        stacks = _Branches.apply(self.B, self.S, self.A, starts, columns, dtype, on, text)
        return [Branch(P, up, A, down, on) for P, up, A, down in zip(*(stack.unbind() for stack in stacks))]


class BankAdapter(Adapter):
    """One layer's adapter in a bank. Its A [r, in], S [r] and B [out, r] are slices of the stacks."""

    def __init__(self, bank: Bank, index: int):
        self.bank, self.index = bank, index
        self.module, self.group, self.rank = bank, bank.group, bank.A.shape[1]

    @property
    def A(self) -> Tensor:
        return self.bank.A[self.index]

    @property
    def B(self) -> Tensor:
        return self.bank.B[self.index]

    @property
    def S(self) -> Tensor | None:
        return None if self.bank.S is None else self.bank.S[self.index, 0]

    def factors(self) -> tuple[Tensor, Tensor]:
        bank, i = self.bank, self.index
        if bank.S is None:
            return bank.B[i], bank.A[i]
        return difference_form((bank.B[i], bank.S[i], bank.A[i]), (bank.B0[i], bank.S0[i], bank.A0[i]))


class _Branches(torch.autograd.Function):
    """P, up, A and down of all branches of a bank, or on a text P, up, M A x and M down x.

    up = [P, P - P0] with P = B S, and down = [A - A0; A0]. The update is P (A - A0) + (P - P0) A0: it uses small
    differences of factors, where B S A - B0 S0 A0 would lose all digits in half precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        B: Tensor,
        S: Tensor | None,
        A: Tensor,
        starts: Starts | None,
        columns: int,
        dtype: torch.dtype,
        on: Tensor | None,
        text: Tensor | None,
    ):
        tokens = None if text is None else text.flatten(0, -2).to(A.dtype)
        ctx.save_for_backward(B, S, A, tokens)
        A, A0 = A[:, :columns], None if starts is None else starts[2][:, :columns]
        up = _up(B, S, starts, columns, dtype)
        if tokens is not None:
            # In full precision, this difference of products keeps its digits, and down need not be formed.
            Ax = tokens @ A.mT
            hidden = Ax if A0 is None else torch.cat((Ax - (A0x := tokens @ A0.mT.to(A.dtype)), A0x), -1)
            Ax, down = (masked(each.to(dtype, copy=True), on, columns) for each in (Ax, hidden))
        elif A0 is None:
            down = A.to(dtype, copy=True)
            Ax = down[:, :columns]
        else:
            down = A.new_empty(len(A), 2 * columns, A.shape[2], dtype=dtype)
            torch.sub(A, A0, out=down[:, :columns])
            down[:, columns:] = A0
            Ax = down[:, :columns]
        ctx.mark_non_differentiable(up, down)
        ctx.set_materialize_grads(False)  # no zeros for the unused gradients of up and down
        return up[..., :columns], up, Ax, down

    @staticmethod
    def backward(ctx, grad_P, _, grad_Ax, __):
        B, S, A, tokens = ctx.saved_tensors
        grad_B = grad_S = grad_A = None
        if grad_P is not None:
            columns = grad_P.shape[2]
            grad_B = torch.empty_like(B) if columns == B.shape[2] else torch.zeros_like(B)  # of components that are off
            own = grad_B[..., :columns]
            if S is None:
                own.copy_(grad_P)
            else:
                # This may be the step's memory peak, so the terms of S's gradient use the memory of B's gradient first.
                torch.mul(grad_P, B[..., :columns], out=own)
                grad_S = grad_B.sum(1, keepdim=True)
                torch.mul(grad_P, S[..., :columns], out=own)
        if grad_Ax is not None:
            columns = grad_Ax.shape[1 if tokens is None else 2]
            grad_A = torch.empty_like(A) if columns == A.shape[1] else torch.zeros_like(A)
            grad_A[:, :columns] = grad_Ax if tokens is None else grad_Ax.mT.to(A.dtype) @ tokens
        return grad_B, grad_S, grad_A, None, None, None, None, None


def _up(B: Tensor, S: Tensor | None, starts: Starts | None, columns: int, dtype: torch.dtype) -> Tensor:
    """up [n, out, g * columns] of all branches."""
    if S is None or starts is None:
        return B[..., :columns].to(dtype, copy=True)
    B, S, B0, S0 = (t[..., :columns] for t in (B, S, *starts[:2]))
    up = B.new_empty(*B.shape[:2], 2 * columns, dtype=dtype)
    torch.mul(B, S, out=up[..., :columns])
    up[..., columns:] = torch.sub(B, B0).mul_(S).addcmul_(B0, S - S0)
    return up


def masked(hidden: Tensor, on: Tensor | None, columns: int) -> Tensor:
    """Zeroes the inactive components of each sample in hidden [..., B * tokens, g * columns], in place."""
    if on is not None:
        hidden.view(*hidden.shape[:-2], len(on), -1, hidden.shape[-1] // columns, columns).mul_(on)
    return hidden


def lora_bank(starts: Sequence[tuple[Tensor, Tensor]]) -> Bank:
    """A bank from the starts (B [out, r], A [r, in]) of layers of one shape."""
    B, A = (torch.stack(each) for each in zip(*starts))
    return Bank(B, None, A)


def ortho_bank(starts: Sequence[Starts]) -> Bank:
    """A bank from the starts (B0 [out, r], S0 [r], A0 [r, in]) of layers of one shape."""
    B0, S0, A0 = (torch.stack(each) for each in zip(*starts))
    return Bank(B0, S0[:, None], A0)
