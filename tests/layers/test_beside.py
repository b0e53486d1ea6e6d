"""Adapters beside a layer: on some of its rows, several at once, and never written to a tensor that is another's."""

from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tlora_core.layers.overlay import Overlay, overlaid
from tlora_core.method.adapters import LowRank

RANK, ROWS, WIDTH = 4, 12, 8
THREE = [(4, 0), (4, 4), (2, 8)]  # (rows, first row): as queries, keys and values of one layer

pytestmark = pytest.mark.usefixtures("one_thread")


def update(seed, rows=ROWS):
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, RANK, generator=g), torch.randn(RANK, WIDTH, generator=g))


def tokens(*shape):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(9))


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, ROWS).requires_grad_(False)


def reference(output, x, *parts):
    """output plus the products in float64, given (update, active, row)."""
    total = output.double()
    for low, active, row in parts:
        product = x.double() @ (low.up[:, :active].double() @ low.down[:active].double()).T
        total = total + torch.nn.functional.pad(product, (row, total.shape[-1] - row - product.shape[-1]))
    return total


def near(got, wanted):
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_slices_of_a_new_output_are_added_in_place_and_all_read_their_input_once():
    layer, x = linear(), tokens(2, 20)
    wanted = reference(layer(x), x, *((update(i, rows), 3, row) for i, (rows, row) in enumerate(THREE)))
    overlays = [Overlay(layer, update(i, rows), 3, row) for i, (rows, row) in enumerate(THREE)]
    with overlaid(overlays), Operations() as operations:
        got = layer(x)
    near(got, wanted)
    counted = operations.counted
    assert counted["addmm_"] == 3 and counted["mm"] == 1 and counted["cat"] == 1
    assert not any(counted[name] for name in ("clone", "constant_pad_nd", "add", "copy_")), counted


def test_for_few_tokens_the_factors_are_not_copied_into_one():
    layer, x = linear(), tokens(1, 2)
    overlays = [Overlay(layer, update(i, rows), 3, row) for i, (rows, row) in enumerate(THREE)]
    with overlaid(overlays), Operations() as operations:
        got = layer(x)
    near(got, reference(layer(x), x, *(each[1:] for each in overlays)))
    assert operations.counted["mm"] == 3


class Same(torch.nn.Linear):
    """Gives its input."""

    def forward(self, input):
        return input


class Cached(torch.nn.Linear):
    """Gives the same tensor each time, or a view of it."""

    def __init__(self, is_view):
        super().__init__(WIDTH, WIDTH)
        self.cache = tokens(2, 3)
        self.is_view = is_view

    def forward(self, input):
        return self.cache.view(self.cache.shape) if self.is_view else self.cache


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("parts", [[(WIDTH, 0)], [(2, 1), (3, 4)]], ids=["all rows", "some rows"])
@pytest.mark.parametrize("make", [lambda: Same(WIDTH, WIDTH), lambda: Cached(False), lambda: Cached(True)])
def test_what_a_layer_did_not_make_is_never_written_to(make, parts, inference):
    with torch.inference_mode(inference):
        layer, x = make(), tokens(2, 3)
        output = layer(x)
        before, given = output.clone(), x.clone()
        overlays = [Overlay(layer, update(i, rows), 2, row) for i, (rows, row) in enumerate(parts)]
        with overlaid(overlays):
            got = layer(x)
        near(got, reference(before, x, *(each[1:] for each in overlays)))
        assert torch.equal(output, before) and torch.equal(x, given)


@pytest.mark.parametrize("count", [1, 3])
def test_nor_what_stands_in_for_its_forward_gives(count):
    layer, x = linear(), tokens(2, 3)
    kept = layer(x)
    layer.forward = lambda input: kept
    before = kept.clone()
    with ExitStack() as stack, Operations() as operations:
        for i, (rows, row) in enumerate(THREE[:count]):
            stack.enter_context(overlaid([Overlay(layer, update(i, rows), 3, row)]))
        got = layer(x)
    near(got, reference(before, x, *((update(i, rows), 3, row) for i, (rows, row) in enumerate(THREE[:count]))))
    assert torch.equal(kept, before) and operations.counted["clone"] == 1


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, ROWS), st.integers(0, ROWS - 1), st.integers(0, RANK)), min_size=1, max_size=4)
)
def test_any_rows_of_several_tloras(parts):
    layer, x = linear(), tokens(2, 3)
    parts = [(update(i, min(rows, ROWS - row)), active, row) for i, (rows, row, active) in enumerate(parts)]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(overlaid([Overlay(layer, *part)]))
        near(layer(x), reference(torch.nn.functional.linear(x, layer.weight, layer.bias), x, *parts))
    assert "forward" not in layer.__dict__


def test_one_tlora_with_a_rank_for_each_sample_and_one_with_a_rank():
    layer, x, ranks = linear(), tokens(3, 5), torch.tensor([0, 2, 4])
    one, two = update(1, 5), update(2, 6)
    with overlaid([Overlay(layer, one, ranks, 3)]), overlaid([Overlay(layer, two, 3, 5)]):
        got = layer(x)
    for i, rank in enumerate(ranks.tolist()):
        near(got[i], reference(layer(x[i]), x[i], (one, rank, 3), (two, 3, 5)))


@pytest.mark.parametrize("parts", [[(ROWS, 0)], THREE], ids=["all rows", "some rows"])
def test_gradients_pass_through(parts):
    """As when another T-LoRA is trained on a model that has one."""
    layer = linear().double()
    lows = [LowRank(*(each.double() for each in update(i, rows).factors())) for i, (rows, _) in enumerate(parts)]

    def run(x):
        with overlaid([Overlay(layer, low, 3, row) for low, (_, row) in zip(lows, parts)]):
            return layer(x).sin()

    assert torch.autograd.gradcheck(run, tokens(2, 3).double().requires_grad_())
