"""Updates folded into a copy of a weight, compared with the sum in float64."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tlora_core.layers.folded_weight import STEPS_UNTIL_REBUILD, FoldedWeights, Keeping
from tlora_core.layers.overlay import Overlay, overlaid
from tlora_core.method.adapters import LowRank

RANK = 6


pytestmark = pytest.mark.usefixtures("one_thread")


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(8, 12).to(dtype).requires_grad_(False)


def update(seed=0, rows=12, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, RANK, generator=g).to(dtype), torch.randn(RANK, 8, generator=g).to(dtype))


def folded(linear, fetch=lambda layer, like: None, keeps=True):
    return FoldedWeights([linear], fetch, Keeping(keeps)).stand_ins()[0]


def on(fold, *overlays):
    """`overlaid` with folds: each overlay is (update, active) or (update, active, row)."""
    return overlaid([Overlay(fold.layer, *each) for each in overlays], {fold.layer: fold})


def product(update, active, row=0):
    return update.up[:, :active].double() @ update.down[:active].double()


def reference(linear, overlays, x):
    weight = linear.weight.double().clone()
    for update, active, *row in overlays:
        first = row[0] if row else 0
        weight[first : first + update.up.shape[0]] += product(update, active)
    return torch.nn.functional.linear(x.double(), weight, linear.bias.double())


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, RANK), st.one_of(st.none(), st.integers(0, RANK))), min_size=1, max_size=6))
def test_follows_any_course_of_one_or_two_ranks(course):
    linear, x = layer(), torch.randn(3, 8)
    fold, one, two = folded(linear), update(1), update(2, rows=5)
    for first, second in course:
        inner = [] if second is None else [(two, second, 4)]
        with on(fold, (one, first)), on(fold, *inner):
            assert error(linear(x), reference(linear, [(one, first), *inner], x)) < 1e-5
        assert "forward" not in linear.__dict__ and not fold.wanted


def test_many_steps_do_not_add_up_their_rounding():
    linear, x = layer(), torch.randn(3, 8)
    fold, one, remade = folded(linear), update(), 0
    for i in range(20 * STEPS_UNTIL_REBUILD):
        with on(fold, (one, i % (RANK + 1))):
            got = linear(x)
        remade += fold.group.steps == 0
    assert error(got, reference(linear, [(one, i % (RANK + 1))], x)) < 1e-6
    assert remade >= 19


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_however_often_the_rank_moved(dtype):
    linear, one, two = layer(dtype), update(1, dtype=dtype), update(2, dtype=dtype)
    fold, x = folded(linear), torch.eye(8, dtype=dtype)
    for inner in ([], [(two, 2)]):
        for active in (6, 1, 5, 2, 4, 3):
            with on(fold, (one, active)), on(fold, *inner):
                linear(x)
        exact = linear.weight.double() + sum(product(*each) for each in [(one, active), *inner])
        rounded = exact.to(dtype)
        assert torch.equal(fold.weight, rounded) or error(fold.weight, exact) < 1.05 * error(rounded, exact)


def test_the_layers_own_weight_is_never_written_and_comes_back_after_an_error():
    linear, x = layer(), torch.randn(3, 8)
    before, plain, fold = linear.weight.clone(), linear(x), folded(linear)
    with pytest.raises(MemoryError):
        with on(fold, (update(), 4)):
            assert not torch.equal(linear(x), plain)
            raise MemoryError
    assert torch.equal(linear.weight, before) and torch.equal(linear(x), plain)


def test_a_term_that_is_gone_or_another_adapters_leaves_nothing_behind():
    linear, x = layer(), torch.randn(3, 8)
    fold = folded(linear)
    for overlay in ((update(1), 4), (update(2), 4), (update(2), 2)):
        with on(fold, overlay):
            assert error(linear(x), reference(linear, [overlay], x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fetched_weight_is_used_within_its_block_alone_and_only_when_the_rank_has_moved(dtype):
    linear, x, one, fetched = layer(dtype), torch.randn(3, 8, dtype=dtype), update(dtype=dtype), []

    @contextmanager
    def fetch(of, like):
        assert of is linear and like.dtype == dtype
        fetched.append((linear.weight.detach().clone(), linear.bias.detach().clone()))
        yield fetched[-1]
        for tensor in fetched[-1]:
            tensor.fill_(float("nan"))  # as the host uses its buffers again

    fold = folded(linear, fetch)
    for active, times in ((2, 1), (2, 1), (5, 2), (2, 3)):
        with on(fold, (one, active)):
            got = linear(x)
        assert error(got, reference(linear, [(one, active)], x)) < (1e-5 if dtype == torch.float32 else 1e-2)
        assert len(fetched) == (1 if dtype == torch.float32 else times)


def test_a_new_weight_is_noticed():
    linear, x, one = layer(), torch.randn(3, 8), update()
    fold = folded(linear)
    with on(fold, (one, 4)):
        linear(x)
        linear.weight = torch.nn.Parameter(linear.weight + 1, requires_grad=False)
        assert error(linear(x), reference(linear, [(one, 4)], x)) < 1e-5
    assert fold.weight is None, "what was kept of the old one goes"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_or_not_the_numbers_are_the_same_in_half_precision(dtype):
    linear, x = layer(dtype), torch.randn(3, 8, dtype=dtype)
    one, part, other = update(1, dtype=dtype), update(2, rows=5, dtype=dtype), update(3, rows=4, dtype=dtype)
    for overlays in (
        [(one, 4)],
        [(one, 4), (part, 3, 4)],
        [(part, 2, 2), (other, 5, 8)],
        [(part, 4, 7), (other, 1, 1)],
    ):
        kept, made = folded(linear), folded(linear, keeps=False)
        outputs = []
        for fold in (kept, made):
            for step in (1, 0):
                with on(fold, *((each, active - step, *row) for each, active, *row in overlays)):
                    output = linear(x)
            outputs.append(output)
        assert torch.equal(*outputs) and kept.weight is not None and made.weight is None


def test_rows_that_no_update_has_are_those_of_the_weight_and_written_once():
    linear, part, other = layer(torch.bfloat16), update(1, 3, torch.bfloat16), update(2, 4, torch.bfloat16)
    fold, x = folded(linear), torch.randn(2, 8, dtype=torch.bfloat16)
    with on(fold, (part, 4, 2), (other, 4, 8)):
        linear(x)
    rest = [0, 1, 5, 6, 7]
    assert torch.equal(fold.weight[rest], linear.weight[rest])
    fold.weight[rest] = float("nan")
    with on(fold, (part, 3, 2), (other, 5, 8)):
        linear(x)
    assert fold.weight[rest].isnan().all() and not fold.weight[[2, 3, 4, 8, 9, 10, 11]].isnan().any()
    with on(fold, (part, 3, 0), (other, 5, 8)):  # on other rows than before
        assert error(linear(x), reference(linear, [(part, 3, 0), (other, 5, 8)], x)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_half_way_leaves_nothing_half_folded(dtype, monkeypatch):
    linear, x = layer(dtype), torch.randn(3, 8, dtype=dtype)
    one, two = update(1, dtype=dtype), update(2, 5, dtype)
    fold, wanted = folded(linear), []
    for active in (4, 2):
        with on(fold, (one, active), (two, active, 3)):
            wanted.append(linear(x))

    done, function = [], torch.Tensor.baddbmm_

    def cancelled(*args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(function(*args, **kwargs))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), on(fold, (one, 4), (two, 6, 3)):
        patch.setattr(torch.Tensor, "baddbmm_", cancelled)
        linear(x)
    assert done
    for active in (2, 4):
        with on(fold, (one, active), (two, active, 3)):
            assert error(linear(x), wanted.pop().double()) < 1e-5


class Dtypes(TorchDispatchMode):
    """The dtypes of all that is computed within the block."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.update(each.dtype for each in tree_leaves(result) if isinstance(each, torch.Tensor))
        return result


def test_no_rows_go_through_single_precision():
    linear = layer(torch.bfloat16)
    several = [(update(1, dtype=torch.bfloat16), 3), (update(2, 5, torch.bfloat16), 2, 4)]
    with Dtypes() as dtypes, on(folded(linear), *several):
        linear(torch.randn(2, 8, dtype=torch.bfloat16))
    assert dtypes.seen == {torch.bfloat16}


def test_where_memory_for_a_copy_is_not_there_it_is_made_anew_and_the_log_says_so_once(monkeypatch, caplog):
    linears, x, one = [layer(torch.bfloat16) for _ in range(3)], torch.randn(3, 8, dtype=torch.bfloat16), update()
    one = one.to(dtype=torch.bfloat16)
    keeping = Keeping(True)
    folds = [FoldedWeights([each], lambda layer, like: None, keeping).stand_ins()[0] for each in linears]
    with on(folds[0], (one, 4)):
        wanted = linears[0](x)

    allocate, asked = torch.empty, []

    def out_of_memory(*args, **kwargs):
        asked.append(keeping.is_on)
        if keeping.is_on:
            raise torch.OutOfMemoryError("no memory")
        return allocate(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", out_of_memory)
    for fold in folds[1:]:
        with on(fold, (one, 4)):
            assert torch.equal(fold.layer(x), wanted)
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "Too little memory to keep" in caplog.text and not keeping.is_on and asked == [True, False, False]
    assert all(fold.weight is None for fold in folds), "others let go of theirs"
