"""Layers of one shape that are folded together: the sums are right, and few operations are made for all of them."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tlora_core.layers.folded_output import FoldedOutputs
from tlora_core.layers.folded_weight import FoldedWeights, Keeping
from tlora_core.layers.group import GROUP_BYTES, grouped
from tlora_core.layers.overlay import Overlay, overlaid
from tlora_core.layers.stacked import stacked
from tlora_core.layers.text_memo import Text
from tlora_core.method.adapters import LowRank

RANK, LAYERS, IN, OUT = 6, 4, 8, 12

pytestmark = pytest.mark.usefixtures("one_thread")


def linears(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Linear(IN, OUT).to(dtype).requires_grad_(False) for _ in range(LAYERS)]


def updates(of, dtype=torch.float32, rows=OUT, seed=0):
    """An update for each of the layers, in one stack."""
    g = torch.Generator().manual_seed(seed)
    made = {
        i: LowRank(torch.randn(rows, RANK, generator=g), torch.randn(RANK, IN, generator=g)) for i in range(len(of))
    }
    return list(stacked(made, 1.0, torch.device("cpu"), dtype).values())


def overlays(of, adapters, active, row=0):
    return [Overlay(layer, adapter, active, row) for layer, adapter in zip(of, adapters)]


def weights_of(of, keeps=True, fetch=lambda layer, like: None):
    return FoldedWeights(of, fetch, Keeping(keeps))


def put_on(group, wanted, text=None):
    return overlaid(wanted, dict(zip(group.layers, group.stand_ins())), text)


def reference(layer, wanted, x):
    weight = layer.weight.double().clone()
    for overlay in wanted:
        if overlay.layer is layer:
            up, down = overlay.factors(torch.float64)
            weight[overlay.row : overlay.row + len(up)] += up @ down
    return torch.nn.functional.linear(x.double(), weight, layer.bias.double())


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


class Names(TorchDispatchMode):
    """The names of the operations within the block."""

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keeps", [True, False])
def test_all_layers_get_their_updates_in_one_product(dtype, keeps):
    of, x = linears(dtype), torch.randn(3, IN, dtype=dtype)
    adapters, group = updates(of, dtype), weights_of(of, keeps)
    for active in (4, 2, 5):
        wanted = overlays(of, adapters, active)
        with Names() as names, put_on(group, wanted):
            got = [layer(x) for layer in of]
        for layer, output in zip(of, got):
            assert error(output, reference(layer, wanted, x)) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert names.all.count("baddbmm_") == 1
        assert bool(group.copies) == keeps


def test_copies_that_are_not_kept_are_made_once_an_evaluation_and_go_with_the_last_use():
    of, x, made = linears(torch.bfloat16), torch.randn(3, IN, dtype=torch.bfloat16), []

    @contextmanager
    def fetch(layer, like):
        made.append(layer)
        yield layer.weight, layer.bias

    group, wanted = weights_of(of, False, fetch), overlays(of, updates(of, torch.bfloat16), 4)
    for _ in range(2):
        made.clear()
        with put_on(group, wanted):
            for layer in of[:-1]:
                layer(x)
                assert len(group.copies) == LAYERS and made == of
            of[-1](x)
            assert not group.copies and not group.stack.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_or_not_the_numbers_are_the_same_in_half_precision(dtype):
    of, x = linears(dtype), torch.randn(3, IN, dtype=dtype)
    one, part = updates(of, dtype), updates(of, dtype, rows=5, seed=1)
    kept, made = weights_of(of), weights_of(of, False)
    for active in (2, 5, 4):
        for wanted in (overlays(of, one, active), overlays(of, one, active) + overlays(of, part, 3, 4)):
            outputs = []
            for group in (kept, made):
                with put_on(group, wanted):
                    outputs.append(torch.stack([layer(x) for layer in of]))
            assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_whose_overlays_differ_are_right_too(dtype):
    of, x = linears(dtype), torch.randn(3, IN, dtype=dtype)
    one, part, group = updates(of, dtype), updates(of, dtype, rows=5, seed=1), weights_of(of)
    several = [
        overlays(of, one, 4),
        overlays(of, one, 4) + overlays(of, part, 2, 4),
        overlays(of, one, 3) + overlays(of[1:3], part[1:3], 5, 7),  # a second one on some of them
        overlays(of, one, 3) + overlays(of[1:3], part[1:3], 2, 7),
        overlays(of[:2], one[:2], 1) + overlays(of[2:], one[2:], 5),  # of several ranks
        overlays(of[1:], one[1:], 2),  # on some of them alone
        overlays(of, one[::-1], 4),  # in another order than in the stack
        overlays(of, [one[0], one[1], one[3], one[2]], 4),
        overlays(of, one, 6),
    ]
    for wanted in several:
        with put_on(group, wanted):
            on = {overlay.layer for overlay in wanted}
            for layer in of:
                output = layer(x) if layer in on else None
                assert output is None or error(output, reference(layer, wanted, x)) < 1e-6


def test_a_step_that_not_all_layers_see_is_made_up_for():
    of, x = linears(), torch.randn(3, IN)
    adapters, group = updates(of), weights_of(of)
    for active, called in ((4, of), (2, of[:1]), (5, of[1:]), (3, of[:2]), (6, of)):
        wanted = overlays(of, adapters, active)
        with put_on(group, wanted):
            for layer in called:
                assert error(layer(x), reference(layer, wanted, x)) < 1e-6


def test_weights_that_something_else_changes_are_fetched_at_every_evaluation():
    (layer, *_), x, level = linears(), torch.randn(3, IN), [1.0]

    @contextmanager
    def fetch(layer, like):
        yield layer.weight * level[0], layer.bias

    adapters = updates([layer])
    group, wanted = FoldedWeights([layer], fetch, Keeping(True), is_constant=False), overlays([layer], adapters, 4)
    for level[0] in (1.0, 2.0):
        changed = torch.nn.Linear(IN, OUT).requires_grad_(False)
        changed.weight.copy_(layer.weight * level[0])
        changed.bias.copy_(layer.bias)
        with put_on(group, wanted):
            assert error(layer(x), reference(changed, overlays([changed], adapters, 4), x)) < 1e-6


def test_copies_are_in_the_dtype_of_what_they_multiply():
    of = linears()

    @contextmanager
    def fetch(layer, like):
        yield layer.weight.to(like.dtype), layer.bias.to(like.dtype)

    group, wanted = weights_of(of, fetch=fetch), overlays(of, updates(of), 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        with put_on(group, wanted):
            for layer in of:
                x = torch.randn(3, IN, dtype=dtype)
                output = layer(x)
                assert output.dtype == dtype
                assert error(output, reference(layer, wanted, x)) < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("is_kept", [True, False])
def test_outputs_for_a_text_are_made_together_and_each_is_its_own(is_kept):
    of, value = linears(), torch.randn(2, 5, IN)
    adapters, group, text = updates(of), FoldedOutputs(of), Text(value, is_kept)
    for active in (4, 4, 2):
        wanted = overlays(of, adapters, active)
        with Names() as names, put_on(group, wanted, text):
            got = [layer(value) for layer in of]
        for layer, output in zip(of, got):
            assert error(output, reference(layer, wanted, value)) < 1e-6
            output.fill_(float("nan"))  # whatever becomes of one, the rest and the next ones are right
        assert names.all.count("baddbmm_") == 1 and not group.ready
    assert bool(text.outputs) == is_kept


def test_an_output_that_no_layer_asked_for_is_not_given_later():
    of, value = linears(), torch.randn(2, 5, IN)
    adapters, group, texts = updates(of), FoldedOutputs(of), [Text(value), Text(value + 1)]
    twice = [of[0], of[0]]
    calls = [(4, 0, of[:2]), (1, 0, of[2:]), (2, 0, of), (3, 0, of[1:]), (3, 1, of), (3, 1, twice), (5, 1, of)]
    for active, which, called in calls:
        wanted, text = overlays(of, adapters, active), texts[which]
        with put_on(group, wanted, text):
            for layer in called:
                assert error(layer(text.value), reference(layer, wanted, text.value)) < 1e-6


@pytest.mark.parametrize("others", ["another input", "no text", "a text that was written to"])
def test_an_input_that_is_not_the_text_gets_its_own_sum(others):
    of, value = linears(), torch.randn(2, 5, IN)
    adapters, group, text = updates(of), FoldedOutputs(of), Text(value)
    wanted = overlays(of, adapters, 4)
    with put_on(group, wanted, None if others == "no text" else text):
        x = value + 1 if others == "another input" else value
        of[0](value)
        if others == "a text that was written to":
            value.add_(1)
        for layer in of:
            assert error(layer(x), reference(layer, wanted, x)) < 1e-6


def test_groups_are_in_order_of_one_kind_and_no_larger_than_allowed():
    half = GROUP_BYTES // 2
    each = [("a", half), ("b", half), ("a", half), ("a", 1), ("b", half + 1), ("c", 3 * half), ("c", 1)]
    groups = grouped(each, lambda one: one[0], lambda one: one[1])
    assert groups == [[each[0], each[2]], [each[1]], [each[3]], [each[4]], [each[5]], [each[6]]]
