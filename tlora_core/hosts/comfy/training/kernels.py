"""Gradients for the fast kernels of comfy_kitchen, the host's package for them, where it has none.

Some of the host's models call them in training too. PyTorch refuses a backward pass through an operator that comes
without a formula, so these get one: the kernel's own plain form is computed again and differentiated.
"""

import functools
import re
from typing import Any

import comfy.quant_ops
import torch
from torch import Tensor

# Rotations and norms. The others round their input, so that their plain forms have no gradient that is of use.
_SMOOTH = re.compile(r"rope|adaln|norm")
_PLAIN = "eager"  # comfy_kitchen's name for the forms that consist of PyTorch's own operators


@functools.cache
def make_kernels_differentiable() -> None:
    """Gives the kernels their formulas, once for the process. Whatever needs no gradient runs as before."""
    kitchen = getattr(comfy.quant_ops, "ck", None)
    if kitchen is None:  # the host runs without the package, and uses none of its kernels
        return
    for name in kitchen.list_backends()[_PLAIN]["capabilities"]:
        operator = getattr(getattr(torch.ops.comfy_kitchen, name, None), "default", None)
        if operator is None or operator._schema.is_mutable or not _SMOOTH.search(name):
            continue
        plain = functools.partial(_plain, kitchen.registry, name, [each.name for each in operator._schema.arguments])
        torch.library.register_autograd(operator, functools.partial(_backward, plain), setup_context=_keep_arguments)


def _plain(registry, name: str, names: list[str], arguments: list) -> Any:
    return registry.get_implementation(name, backend=_PLAIN)(**dict(zip(names, arguments)))


def _keep_arguments(ctx, inputs: tuple, output) -> None:
    ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))
    ctx.others = [None if isinstance(each, Tensor) else (each,) for each in inputs]


def _backward(plain, ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    arguments = [next(saved).detach() if other is None else other[0] for other in ctx.others]
    wanted = [each for each, needs in zip(arguments, ctx.needs_input_grad) if needs]
    with torch.enable_grad():
        for each in wanted:
            each.requires_grad_()
        outputs = plain(arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The gradients are complete: autograd gives zeros for an output that nothing uses.
    outputs, gradients = zip(*((output, each) for output, each in zip(outputs, gradients) if output.requires_grad))
    found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
    return tuple(next(found) if needs else None for needs in ctx.needs_input_grad)
