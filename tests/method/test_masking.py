"""The masked product compared with the formula up M_t down x in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlora_core import add_low_rank

pytestmark = pytest.mark.usefixtures("one_thread")


def low_rank_delta(x, up, down, *mask):
    """The update alone."""
    return add_low_rank(x.new_zeros(*x.shape[:-1], up.shape[0]), x, up, down, *mask)


def reference(x, up, down, active, group):
    """One row of x at a time, with the mask M_t written out as a matrix."""
    rows = []
    for i, row in enumerate(x.double()):
        kept = group * int(active[i] if isinstance(active, torch.Tensor) and active.dim() else active)
        M = torch.diag((torch.arange(down.shape[0]) < kept).double())
        rows.append(row @ (up.double() @ M @ down.double()).T)
    return torch.stack(rows)


@settings(max_examples=60)
@given(
    st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3), st.integers(1, 6), st.sampled_from([1, 2]), st.data()
)
def test_equals_the_formula_for_any_shape_and_mask(batch, middle, rank, group, data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch, *middle, 5, generator=g)
    up, down = torch.randn(7, group * rank, generator=g), torch.randn(group * rank, 5, generator=g)
    ranks = st.integers(0, rank)
    one = data.draw(ranks)
    many = torch.tensor(data.draw(st.lists(ranks, min_size=batch, max_size=batch)))
    for active in (one, torch.tensor(one), many):
        got = low_rank_delta(x, up, down, active, group)
        assert got.shape == (batch, *middle, 7)
        torch.testing.assert_close(got.double(), reference(x, up, down, active, group), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", [2, torch.tensor([2, 0, 3])])
def test_gradients_reach_active_components_and_no_others(active):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    up = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    down = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: low_rank_delta(*a, active, 2), (x, up, down))
    low_rank_delta(x, up, down, active, 2).square().sum().backward()
    most = 2 * int(torch.as_tensor(active).max())
    assert up.grad[:, :most].abs().min() > 0 and down.grad[:most].abs().min() > 0
    assert up.grad[:, most:].abs().max() == 0 and down.grad[most:].abs().max() == 0


def test_rank_zero_is_exactly_zero():
    x, up, down = torch.randn(2, 3, 5), torch.randn(4, 6), torch.randn(6, 5)
    assert torch.equal(low_rank_delta(x, up, down, 0, 2), torch.zeros(2, 3, 4))
    assert torch.equal(low_rank_delta(x, up, down, torch.tensor([0, 0]), 2), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("active", [2, torch.tensor([2, 3])])
def test_a_slice_of_a_wider_output_gets_the_update_and_the_rest_stays(active):
    output, x, up, down = torch.randn(2, 3, 9), torch.randn(2, 3, 5), torch.randn(4, 6), torch.randn(6, 5)
    got = add_low_rank(output, x, up, down, active, 2, row=3)
    assert torch.equal(got[..., :3], output[..., :3]) and torch.equal(got[..., 7:], output[..., 7:])
    torch.testing.assert_close(
        got[..., 3:7] - output[..., 3:7], low_rank_delta(x, up, down, active, 2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("active", [-1, 4, torch.tensor([1]), torch.tensor([[1, 1]])])
def test_a_mask_that_does_not_fit_is_refused(active):
    with pytest.raises(ValueError, match="active"):
        low_rank_delta(torch.randn(2, 3, 5), torch.randn(4, 6), torch.randn(6, 5), active, 2)
