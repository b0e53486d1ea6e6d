"""Adapters on layers for one evaluation, in plain torch."""

import pytest
import torch

from tlora_core import LowRank
from tlora_core.layers.overlay import Overlay, overlaid

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def layer():
    return torch.nn.Linear(8, 6)


def update(seed, group=1):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(6, 4 * group, generator=generator), torch.randn(4 * group, 8, generator=generator), group
    )


def masked(adapter, active):
    n = adapter.group * active
    return X @ (adapter.up[:, :n] @ adapter.down[:n]).T


def test_layer_adds_the_masked_update_inside_and_nothing_outside():
    linear, adapter = layer(), update(1, group=2)
    bare = linear(X)
    with overlaid([Overlay(linear, adapter, 3)]):
        assert torch.allclose(linear(X), bare + masked(adapter, 3), atol=1e-5)
    assert torch.equal(linear(X), bare) and "forward" not in linear.__dict__


def test_nested_attachments_add_up_and_come_off_in_turn():
    linear, one, two = layer(), update(1), update(2)
    bare = linear(X)
    with overlaid([Overlay(linear, one, 4)]):
        with overlaid([Overlay(linear, two, 2)]):
            assert torch.allclose(linear(X), bare + masked(one, 4) + masked(two, 2), atol=1e-5)
        assert torch.allclose(linear(X), bare + masked(one, 4), atol=1e-5)
    assert "forward" not in linear.__dict__


def test_forward_that_somebody_else_put_there_is_kept():
    linear = layer()
    linear.forward = theirs = lambda x: torch.zeros(3, 5, 6)
    with overlaid([Overlay(linear, update(1), 2)]):
        assert torch.allclose(linear(X), masked(update(1), 2), atol=1e-5)
    assert linear.forward is theirs


def test_error_half_way_through_attaching_takes_off_what_was_on():
    linear = layer()

    def attachments():
        yield Overlay(linear, update(1), 2)
        raise KeyError("no such layer")

    with pytest.raises(KeyError), overlaid(attachments()):
        pass
    assert "forward" not in linear.__dict__


def test_samples_have_ranks_of_their_own():
    linear, adapter = layer(), update(1)
    with overlaid([Overlay(linear, adapter, torch.tensor([0, 2, 4]))]):
        out = linear(X)
    for i, active in enumerate((0, 2, 4)):
        assert torch.allclose(out[i], (linear(X) + masked(adapter, active))[i], atol=1e-5)
