"""OFT, GSOFT and SVDiff: against their definitions, by the adapters' contract, and in training."""

import pytest
import torch

from tlora_core import TLoRAError, make_adapters
from tlora_core.layers.overlay import Overlay, overlaid

OUT, IN, BLOCKS = 10, 12, 3
METHODS = ("oft", "gsoft", "svdiff")


def made(method, moved=0.3, dtype=torch.float64):
    torch.manual_seed(0)
    layer = torch.nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    adapter = make_adapters(method, "last_random", {"x": layer.weight}, BLOCKS, 0)["x"].to(dtype)
    if method == "svdiff":
        adapter.U, adapter.s, adapter.V = torch.linalg.svd(layer.weight, full_matrices=False)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * moved)
    return layer, adapter


@pytest.mark.parametrize("method", METHODS)
def test_update_starts_at_zero(method):
    layer, adapter = made(method, moved=0.0)
    up, down = adapter.factors()
    assert (up @ down).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["oft", "gsoft"])
def test_rotation_is_orthogonal_and_turns_the_input(method):
    layer, adapter = made(method)
    R = adapter.rotation()
    torch.testing.assert_close(R @ R.T, torch.eye(IN, dtype=R.dtype))
    up, down = adapter.factors()
    torch.testing.assert_close(layer.weight + up @ down, layer.weight @ R)
    blocks = (R.view(BLOCKS, IN // BLOCKS, BLOCKS, IN // BLOCKS).abs().amax((1, 3)) > 1e-9).double()
    # OFT's blocks know only themselves; the shuffle joins each with every other.
    assert torch.equal(
        blocks, torch.eye(BLOCKS, dtype=R.dtype) if method == "oft" else torch.ones(BLOCKS, BLOCKS, dtype=R.dtype)
    )


def test_svdiff_shifts_singular_values_and_none_below_zero():
    layer, adapter = made("svdiff")
    with torch.no_grad():
        adapter.shift[-1] = -100.0
    up, down = adapter.factors()
    values = torch.linalg.svdvals(layer.weight + up @ down)
    expected = (torch.linalg.svdvals(layer.weight) + adapter.shift).clamp(min=0).sort(descending=True).values
    torch.testing.assert_close(values, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_training_is_that_of_the_formula(method):
    layer, adapter = made(method)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    weigh = torch.randn(2, 5, OUT, dtype=torch.float64)
    parameters = [x, *adapter.parameters()]
    up, down = adapter.factors()
    wanted = torch.autograd.grad(((layer(x) + x @ (up @ down).T) * weigh).sum(), parameters)
    with overlaid([Overlay(layer, adapter, adapter.rank)]):
        output = layer(x)
        got = torch.autograd.grad((output * weigh).sum(), parameters)
    for one, other in zip(wanted, got):
        torch.testing.assert_close(one, other)


def test_blocks_that_do_not_divide_the_width_are_refused():
    with pytest.raises(TLoRAError, match="rank is 5.*12 wide.*divides"):
        make_adapters("oft", "last_random", {"x": torch.randn(OUT, IN)}, 5, 0)
    with pytest.raises(TLoRAError, match="rank is 12.*12 wide"):  # blocks of one channel cannot turn
        make_adapters("gsoft", "last_random", {"x": torch.randn(OUT, IN)}, 12, 0)
    with pytest.raises(TLoRAError, match='"oft" needs the weight'):
        make_adapters("oft", "last_random", {"x": (OUT, IN)}, 3, 0)
