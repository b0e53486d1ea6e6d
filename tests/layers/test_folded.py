"""Updates folded into a copy of a weight, against the sum in float64."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlora_core.layers.folded import STEPS_UNTIL_REBUILD, FoldedWeight, Term, folded

RANK = 6


pytestmark = pytest.mark.usefixtures("one_thread")


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(8, 12).to(dtype).requires_grad_(False)


def term(columns, seed=0, rows=12, row=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, RANK, generator=g).to(dtype), torch.randn(RANK, 8, generator=g).to(dtype)
    return Term(up, down, columns, row)


def reference(linear, terms, x):
    weight = linear.weight.double().clone()
    for t in terms:
        weight[t.row : t.row + t.up.shape[0]] += t.up[:, : t.columns].double() @ t.down[: t.columns].double()
    return torch.nn.functional.linear(x.double(), weight, linear.bias.double())


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, RANK), st.one_of(st.none(), st.integers(0, RANK))), min_size=1, max_size=6))
def test_follows_any_course_of_one_or_two_ranks(course):
    linear, x = layer(), torch.randn(3, 8)
    fold, one, two = FoldedWeight(linear), term(0, 1), term(0, 2, rows=5, row=4)
    for first, second in course:
        terms = [("a", one._replace(columns=first))] + (
            [("b", two._replace(columns=second))] if second is not None else []
        )
        contexts = [folded(key, [(fold, t)]) for key, t in terms]
        with contexts[0]:
            with contexts[1] if second is not None else folded("none", []):
                assert error(linear(x), reference(linear, [t for _, t in terms], x)) < 1e-5
        assert "forward" not in linear.__dict__ and not fold.wanted


def test_many_steps_do_not_add_up_their_rounding():
    linear, x = layer(), torch.randn(3, 8)
    fold, one, remade = FoldedWeight(linear), term(0), 0
    for i in range(20 * STEPS_UNTIL_REBUILD):
        with folded("a", [(fold, one._replace(columns=i % (RANK + 1)))]):
            got = linear(x)
        remade += fold._steps == 0
    assert error(got, reference(linear, [one._replace(columns=i % (RANK + 1))], x)) < 1e-6
    assert remade >= 19


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_however_often_the_rank_moved(dtype):
    linear, one, two = layer(dtype), term(0, 1, dtype=dtype), term(0, 2, dtype=dtype)
    fold, x = FoldedWeight(linear), torch.eye(8, dtype=dtype)
    for both in (False, True):
        for columns in (6, 1, 5, 2, 4, 3):
            terms = [("a", one._replace(columns=columns))] + ([("b", two._replace(columns=2))] if both else [])
            with folded(*_entry(fold, terms[0])), folded(*_entry(fold, terms[-1])):
                linear(x)
        exact = linear.weight.double() + sum(
            t.up[:, : t.columns].double() @ t.down[: t.columns].double() for _, t in terms
        )
        assert torch.equal(fold.weight, exact.to(dtype)) or error(fold.weight, exact) < 1.05 * error(
            exact.to(dtype), exact
        )


def _entry(fold, keyed):
    return keyed[0], [(fold, keyed[1])]


def test_the_layers_own_weight_is_never_written_and_comes_back_after_an_error():
    linear, x = layer(), torch.randn(3, 8)
    before, plain, fold = linear.weight.clone(), linear(x), FoldedWeight(linear)
    with pytest.raises(MemoryError):
        with folded("a", [(fold, term(4))]):
            assert not torch.equal(linear(x), plain)
            raise MemoryError
    assert torch.equal(linear.weight, before) and torch.equal(linear(x), plain)


def test_a_term_that_is_gone_or_another_adapters_leaves_nothing_behind():
    linear, x = layer(), torch.randn(3, 8)
    fold = FoldedWeight(linear)
    for terms in ([term(4, 1)], [term(4, 2)], [term(2, 2)]):
        with folded("a", [(fold, terms[0])]):
            assert error(linear(x), reference(linear, terms, x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fetched_weight_is_used_within_its_block_alone_and_only_when_the_rank_has_moved(dtype):
    linear, x, one, fetched = layer(dtype), torch.randn(3, 8, dtype=dtype), term(0, dtype=dtype), []

    @contextmanager
    def fetch(of, like):
        assert of is linear and like.dtype == dtype
        fetched.append((linear.weight.detach().clone(), linear.bias.detach().clone()))
        yield fetched[-1]
        for tensor in fetched[-1]:
            tensor.fill_(float("nan"))  # as the host uses its buffers again

    fold = FoldedWeight(linear, fetch)
    for columns, times in ((2, 1), (2, 1), (5, 2), (2, 3)):
        with folded("a", [(fold, one._replace(columns=columns))]):
            got = linear(x)
        assert error(got, reference(linear, [one._replace(columns=columns)], x)) < (
            1e-5 if dtype == torch.float32 else 1e-2
        )
        assert len(fetched) == (1 if dtype == torch.float32 else times)


def test_a_new_weight_is_noticed():
    linear = layer()
    fold = FoldedWeight(linear)
    assert fold.is_current
    linear.weight = torch.nn.Parameter(linear.weight.clone(), requires_grad=False)
    assert not fold.is_current
