"""The four adapters: their starts, their updates compared with the paper's formula in float64, and their precision when
stored."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlora_core import METHODS, STARTS, LowRank, TLoRAError, add_low_rank, make_adapters, orthogonal_start
from tlora_core.method.bank import ortho_bank

LOW_RANK = [name for name, method in METHODS.items() if not method.of_weight]
pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def start_of(kind, out=96, width=64, rank=16):
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(out, width, generator=g) / width**0.5
    return orthogonal_start(kind, out, width, rank, g, weight=weight)


def low_rank_delta(x, up, down, active, group):
    return add_low_rank(x.new_zeros(*x.shape[:-1], up.shape[0]), x, up, down, active, group)


def ortho(seed=0, moved=0.0, start=None):
    """An adapter whose factors each moved from their start by `moved` times their norm."""
    bank = ortho_bank([start or start_of("last_random")])
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(moved * p.norm() / p.numel() ** 0.5 * torch.randn(p.shape, generator=g))
    return bank[0]


def paper_update(a, active):
    """B S M A - B0 S0 M A0 in float64 (equation 6)."""
    M = (torch.arange(a.rank) < active).double()
    B, S, A, B0, S0, A0 = (t.detach().double() for t in (a.B, a.S, a.A, *start_buffers(a)))
    return (B * (S * M)) @ A - (B0 * (S0 * M)) @ A0


def start_buffers(a):
    return a.module.B0[a.index], a.module.S0[a.index, 0], a.module.A0[a.index]


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-4, 1e-3, 1e-2, 1.0]), st.integers(1, 16))
def test_difference_form_is_the_papers_update(seed, moved, active):
    adapter = ortho(seed=seed, moved=moved)
    up, down = (f.detach() for f in adapter.factors())
    expected = paper_update(adapter, active)
    # What float32 parameters can tell apart of a start moved by `moved`.
    assert relative_error(up[:, : 2 * active] @ down[: 2 * active], expected) < 2e-6
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    got = low_rank_delta(x, up, down, active, adapter.group)
    assert relative_error(got, x.double() @ expected.T) < 1e-5


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("moved", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_half_precision_storage_keeps_the_update_however_little_it_moved(start, moved, dtype, limit):
    rank = 32
    adapter = ortho(moved=moved, start=start_of(start, 640, 320, rank))
    stored = adapter.detach().to(dtype=dtype)
    for active in (rank // 2, rank):
        kept = slice(0, 2 * active)
        product = stored.up[:, kept].double() @ stored.down[kept].double()
        assert relative_error(product, paper_update(adapter, active)) < limit


def test_every_orthogonal_start_has_an_update_of_exactly_zero_and_learns():
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 32)
    for start in STARTS:
        adapter = make_adapters("tlora", start, {"layer": weight}, rank=8, seed=0)["layer"]
        y = low_rank_delta(x, *adapter.factors(), 8, adapter.group)
        assert torch.equal(y, torch.zeros(2, 48)), start
        y.sum().backward()
        assert all(p.grad.abs().max() > 0 for p in adapter.module.parameters()), start


def test_gradients_are_those_of_the_masked_product():
    adapter = ortho(moved=0.3)
    bank = adapter.module.double()
    x = torch.randn(2, 64, dtype=torch.float64)
    low_rank_delta(x, *adapter.factors(), 5, 2).square().sum().backward()
    got = [p.grad.clone() for p in bank.parameters()]
    bank.zero_grad()
    M = (torch.arange(16) < 5).double()
    B0, S0, A0 = start_buffers(adapter)
    update = (adapter.B * (adapter.S * M)) @ adapter.A - (B0 * (S0 * M)) @ A0
    (x @ update.T).square().sum().backward()
    for grad, p in zip(got, bank.parameters()):
        torch.testing.assert_close(grad, p.grad)


def test_lora_starts_as_the_reference_draws_it():
    adapter = make_adapters("lora", "last_random", {"x": (96, 4096)}, 16, 0)["x"]
    assert adapter.group == 1 and torch.equal(adapter.B, torch.zeros(96, 16))
    assert adapter.A.mean().abs() < 1e-3 and abs(adapter.A.std().item() * 16 - 1) < 0.01
    up, down = adapter.factors()
    assert torch.equal(up, adapter.B) and torch.equal(down, adapter.A)


def test_start_is_a_buffer_that_neither_trains_nor_is_saved():
    bank = ortho().module
    assert set(bank.state_dict()) == {"A", "S", "B"} == {n for n, _ in bank.named_parameters()}
    before = bank.A0.clone()
    with torch.no_grad():
        bank.A.add_(1)
    assert torch.equal(bank.A0, before)
    assert bank.to(torch.float64).A0.dtype == torch.float64


def test_adapters_of_one_shape_share_their_parameters():
    layers = {"a": (8, 6), "b": (6, 8), "c": (8, 6)}
    made = make_adapters("tlora", "last_random", layers, 2, 0)
    assert list(made) == list(layers) and made["a"].module is made["c"].module is not made["b"].module
    assert [tuple(p.shape) for p in made.parameters()] == [
        (2, 2, 6),
        (2, 1, 2),
        (2, 8, 2),
        (1, 2, 8),
        (1, 1, 2),
        (1, 6, 2),
    ]


@pytest.mark.parametrize("moved", [0.0, 1e-3, 1.0])
def test_detached_update_is_balanced_and_apart(moved):
    adapter = ortho(moved=moved)
    layer = adapter.detach()
    up_norm, down_norm = layer.up.norm(dim=0), layer.down.norm(dim=1)
    if moved:
        torch.testing.assert_close(up_norm, down_norm)
    assert torch.isfinite(layer.up).all() and torch.isfinite(layer.down).all()
    up, down = adapter.factors()
    torch.testing.assert_close(layer.up @ layer.down, (up @ down).detach(), atol=1e-6, rtol=1e-4)
    assert (layer.rank, layer.group, layer.up.requires_grad) == (16, 2, False)
    before = layer.up.clone()
    with torch.no_grad():
        adapter.module.B.add_(1)
    assert torch.equal(layer.up, before)


def test_untrained_lora_detaches_to_a_zero_update():
    layer = make_adapters("lora", "last_random", {"x": (8, 6)}, 2, 0)["x"].detach()
    assert torch.equal(layer.up @ layer.down, torch.zeros(8, 6)) and layer.rank == 2


@pytest.mark.parametrize("method", LOW_RANK)
def test_factory_is_seeded_and_each_layer_depends_on_its_name_alone(method):
    layers = {"a.to_q": (64, 48), "a.to_k": (64, 96), "b.to_q": (64, 48), "c.wide": torch.zeros(40, 40)}
    first = make_adapters(method, "last_random", layers, rank=8, seed=1)
    assert list(first) == list(layers)
    assert all(a.group == METHODS[method].group and a.rank == 8 for a in first.values())
    assert [(a.B.shape[0], a.A.shape[1]) for a in first.values()] == [(64, 48), (64, 96), (64, 48), (40, 40)]
    assert torch.equal(first["a.to_q"].A, make_adapters(method, "last_random", layers, 8, 1)["a.to_q"].A)
    alone = make_adapters(method, "last_random", {"b.to_q": (64, 48)}, 8, 1)["b.to_q"]
    torch.testing.assert_close(alone.A, first["b.to_q"].A)
    assert not torch.allclose(first["a.to_q"].A, first["b.to_q"].A)
    assert not torch.allclose(first["a.to_q"].A, make_adapters(method, "last_random", layers, 8, 2)["a.to_q"].A)


def test_factory_uses_the_weights_it_is_given():
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    adapter = make_adapters("ortho_lora", "principal_weight", {"layer": weight}, 8, seed=0)["layer"]
    B0, S0, A0 = start_buffers(adapter)
    top = torch.linalg.svdvals(weight - (B0 * S0) @ A0.float())[0]
    torch.testing.assert_close(top, torch.linalg.svdvals(weight)[8], rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("rank", [33, 0, -1])
def test_a_rank_the_layer_cannot_hold_names_layer_width_and_rank(method, rank):
    with pytest.raises(TLoRAError, match=rf'rank is {rank}.*"b.to_q".*32.*from 1 to 32'):
        make_adapters(method, "last_random", {"b.to_q": (64, 32), "a": (64, 64)}, rank, seed=0)


@pytest.mark.parametrize(
    ("method", "start", "named"),
    [("dora", "last_random", "dora"), ("tlora", "first", "first"), ("tlora", "last_weight", 'weight of the layer "a"')],
)
def test_unknown_or_impossible_choices_are_refused(method, start, named):
    with pytest.raises(TLoRAError, match=named):
        make_adapters(method, start, {"a": (16, 16)}, 4, seed=0)


def test_table_of_methods_is_the_papers():
    table = {name: (m.is_orthogonal, m.is_masked) for name, m in METHODS.items() if name in LOW_RANK}
    assert table == {
        "lora": (False, False),
        "vanilla_tlora": (False, True),
        "ortho_lora": (True, False),
        "tlora": (True, True),
    }


def test_low_rank_moves_between_dtypes_and_refuses_odd_shapes():
    layer = LowRank(torch.randn(4, 6), torch.randn(6, 5), group=2)
    half = layer.to(dtype=torch.float16)
    assert half.up.dtype == half.down.dtype == torch.float16 and (half.rank, half.group) == (3, 2)
    assert half.nbytes * 2 == layer.nbytes == 4 * (24 + 30)
    odd = [((4, 6), (5, 5), 1), ((4, 5), (5, 5), 2), ((4,), (4, 5), 1), ((4, 0), (0, 5), 1), ((4, 6), (6, 5), 3)]
    for up, down, group in odd:
        with pytest.raises(TLoRAError, match="not valid"):
            LowRank(torch.zeros(up), torch.zeros(down), group)


@pytest.mark.parametrize("start", STARTS)
def test_starts_are_kept_in_half_precision_and_training_begins_at_exactly_these_values(start):
    rank = 32
    B0, S0, A0 = start_of(start, 640, 320, rank)
    bank = ortho_bank([(B0, S0, A0)])
    assert (bank.B0.dtype, bank.S0.dtype, bank.A0.dtype) == (torch.float16, torch.float32, torch.float16)
    for name, exact in (("B", B0), ("A", A0)):
        kept, begun = getattr(bank, f"{name}0"), getattr(bank, name)
        assert begun.dtype == torch.float32 and torch.equal(begun, kept.float())
        torch.testing.assert_close(begun[0], exact, rtol=5e-4, atol=1e-7)
    assert torch.equal(bank.S[0, 0], S0)
    eye = torch.eye(rank)
    for gram in (bank.A[0] @ bank.A[0].T, bank.B[0].T @ bank.B[0]):
        assert (gram - eye).abs().max() < 5e-4, "as orthonormal as the bank's docstring says"
