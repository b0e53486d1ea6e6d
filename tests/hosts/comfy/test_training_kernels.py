"""The fast kernels that the host's models call in training have gradients, those of their plain forms."""

import pytest
import torch

X = (1, 6, 2, 8)  # batch, tokens, heads, width of a head
ARGUMENTS = {"freqs_cis": (1, 6, 1, 4, 2, 2), "scale": (8,), "q_scale": (8,), "k_scale": (8,), "shift": (8,)}
PLAIN_NUMBERS = {"epsilon": 1e-6, "eps": 1e-6, "rot_dim": 0}


def kernels():
    """(name, operator) of the kernels that round nothing."""
    import comfy_kitchen

    named = {name: getattr(torch.ops.comfy_kitchen, name, None) for name in comfy_kitchen.__all__}
    return {
        name: operator.default
        for name, operator in named.items()
        if operator is not None and ("rope" in name or "adaln" in name) and not name.endswith("_")
    }


def arguments_of(operator):
    generator = torch.Generator().manual_seed(0)
    return [
        PLAIN_NUMBERS[each.name]
        if each.name in PLAIN_NUMBERS
        else torch.randn(ARGUMENTS.get(each.name, X), generator=generator)
        for each in operator._schema.arguments
    ]


def gradients(run, arguments, needing):
    """Of the tensors at the places `needing`, by a fixed sum of everything that `run` returns."""
    given = [
        a.clone().requires_grad_(i in needing) if isinstance(a, torch.Tensor) else a for i, a in enumerate(arguments)
    ]
    outputs = run(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=weights)).sum() for o in outputs if o.requires_grad)
    return torch.autograd.grad(loss, [given[i] for i in sorted(needing)])


def test_every_smooth_kernel_has_the_gradients_of_its_plain_form(comfy):
    import comfy_kitchen

    from tlora_core.hosts.comfy.training.kernels import make_kernels_differentiable

    make_kernels_differentiable()
    assert len(kernels()) >= 10
    for name, operator in kernels().items():
        arguments = arguments_of(operator)
        plain = comfy_kitchen.registry.get_implementation(name, backend="eager")
        tensors = {i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
        for needing in (tensors, {0}):
            ours, expected = gradients(operator, arguments, needing), gradients(plain, arguments, needing)
            for mine, right in zip(ours, expected):
                torch.testing.assert_close(mine, right, msg=lambda text, name=name: f"{name}: {text}")


def test_kernels_give_what_they_gave_where_nothing_is_trained(comfy):
    import comfy_kitchen

    from tlora_core.hosts.comfy.training.kernels import make_kernels_differentiable

    make_kernels_differentiable()
    for name, operator in kernels().items():
        arguments = arguments_of(operator)
        plain = comfy_kitchen.registry.get_implementation(name, backend="eager")
        with torch.inference_mode():
            given, expected = operator(*arguments), plain(*arguments)
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
        assert not any(each.requires_grad for each in (given if isinstance(given, tuple) else (given,)))


def test_a_kernel_that_rounds_gets_no_formula(comfy):
    """Its plain form would give a gradient of zero, and no error."""
    from tlora_core.hosts.comfy.training.kernels import make_kernels_differentiable

    make_kernels_differentiable()
    x = torch.randn(4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.comfy_kitchen.quantize_int8_rowwise(x)[1].sum().backward()
