"""The roofline benchmark: what it counts, and that a T-LoRA adds no operations but those it needs."""

import sys

import pytest
import torch
from places import REPO

sys.path.append(str(REPO / "benchmarks"))
import memory  # noqa: E402
import roofline  # noqa: E402
from memory import META  # noqa: E402

TEXT = ("attn2.to_k", "attn2.to_v")
CARD = roofline.Card(bandwidth=1e9, half=1e9, single=1e8)


def counted(function):
    """(bytes, flops) of each operation of the function."""
    with roofline.Operations() as operations, torch.no_grad():
        function()
    return [(each.bytes, each.flops) for each in operations.all]


def empty(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype, device=META)


def test_bytes_and_arithmetic_of_products():
    a, b, c = empty(3, 5), empty(5, 7), empty(3, 7)
    assert counted(lambda: a @ b) == [(2 * (15 + 35 + 21), 2 * 3 * 5 * 7)]
    both = [(2 * (21 + 21), 0), (2 * (15 + 35 + 21 + 21), 210)]  # a copy of c, and the product added to it
    assert counted(lambda: torch.addmm(c, a, b)) == counted(lambda: torch.addmm(c, a, b, out=empty(3, 7))) == both
    assert counted(lambda: torch.addmm(empty(7), a, b)) == [(2 * (15 + 35 + 7 + 21), 210)]


def test_what_is_written_in_place_is_read_too_but_not_what_is_filled():
    a, b = empty(4, 6), empty(4, 6)
    assert counted(lambda: a.add_(b)) == [(2 * 3 * 24, 0)]
    assert counted(lambda: a[:, :3].addmm_(empty(4, 2), empty(2, 3))) == [(2 * (12 + 12 + 8 + 6), 2 * 4 * 2 * 3)]
    assert counted(lambda: a.copy_(b)) == [(2 * 2 * 24, 0)]
    assert counted(lambda: a.zero_()) == [(2 * 24, 0)]


def test_what_the_operation_before_has_written_is_in_the_cache_if_that_is_large_enough():
    stack, weights = empty(2, 4, 6), [empty(4, 6), empty(4, 6)]
    with roofline.Operations() as operations:
        torch.stack(weights, out=stack)
        stack.baddbmm_(empty(2, 4, 3), empty(2, 3, 6))
        stack.baddbmm_(empty(2, 4, 3), empty(2, 3, 6)[:, :, :])
        weights[0].add_(1)
    assert [each.again for each in operations.all] == [0, 2 * stack.nbytes, 2 * stack.nbytes, 0]
    card = CARD._replace(cache=stack.nbytes)
    first, second, *_ = operations.all
    assert second.seconds(card, is_cached=True) == pytest.approx(roofline.START + second.flops / card.half)
    for each, other in ((first, card), (second, card._replace(cache=stack.nbytes - 1))):
        assert each.seconds(other, is_cached=True) == each.seconds(other)


def test_views_and_repetitions_take_nothing():
    a, b = empty(4, 6), empty(6)
    assert counted(lambda: a.t()[1:].unsqueeze(0)) == []
    assert counted(lambda: a + b.expand(4, 6)) == [(2 * (24 + 24 + 6), 0)]


def test_attention_stores_no_matrix_of_its_tokens():
    q, k = empty(2, 10, 4), empty(2, 12, 4)
    operations = roofline.Operations()
    assert operations.attention(q, k, k).shape == (2, 10, 4)
    assert (operations.all[0].bytes, operations.all[0].flops) == (2 * (80 + 96 + 96 + 80), 2 * 2 * 20 * 12 * 4)


@pytest.mark.parametrize(
    "bytes, flops, is_half, seconds",
    [(1000, 10, True, 1e-6), (10, 1000, True, 1e-6), (10, 1000, False, 1e-5), (0, 0, True, 0)],
)
def test_the_longer_of_bytes_and_arithmetic_counts_after_the_start(bytes, flops, is_half, seconds):
    assert roofline.Operation("", bytes, flops, is_half).seconds(CARD) == pytest.approx(roofline.START + seconds)


@pytest.fixture
def rows(comfy):
    """A function of a kind of model that gives the rows of a small one by what they are."""
    import random_models

    from tlora_core.hosts.comfy.sampling import apply_tlora

    def measure(kind):
        make = {
            "sdxl": lambda: random_models.sdxl(64, (0, 1, 1), 64, dtype=torch.float16, device=META),
            "flux": lambda: random_models.flux(256, (2, 3), 64, 32, dtype=torch.bfloat16, device=META),
        }
        with memory.host_on_meta():
            model = make[kind]()
            memory.move(model)
            model.model.model_sampling.to(META)
            tlora = roofline.tlora_on_meta(model, 8)
            found = roofline.rows_of(model, kind, 32, tlora, apply_tlora, with_parts=True)
        return model, tlora, {row["what"]: row for row in found}

    return measure


def test_on_flux_only_the_rows_with_an_update_are_touched(rows):
    model, tlora, found = rows("flux")
    layers = dict(model.model.diffusion_model.named_modules())
    changed = sum(2 * low.shape[0] * low.shape[1] * 2 + low.nbytes // 2 for low in tlora.layers.values())
    whole = {name for name, low in tlora.layers.items() if low.shape[0] == layers[name.path].out_features}
    shared = {name.path for name in tlora.layers if "linear1" in name.path}
    places = {(layers[name.path].out_features, name.row) for name in tlora.layers}
    more = found["folded"]["more_than_bare"]
    counts = {name: count for name, (count, _) in more.items()}
    # The rows that change are copied, those of layers of one shape that change as a whole together; then one product
    # adds what such layers have in the same place.
    assert len(whole) > 1 and counts == {"copy_": len(shared), "stack": 2, "baddbmm_": len(places)}
    assert sum(gb for _, gb in more.values()) <= round(2 * changed / 1e9, 1)
    assert found["short"]["kernels"] <= found["folded"]["kernels"]
    assert found["beside"]["more_than_bare"].keys() <= {"addmm_", "mm", "cat"}


def test_on_sdxl_layers_of_one_shape_take_two_operations_together_and_those_of_texts_none_of_their_own(rows):
    _, tlora, found = rows("sdxl")
    of_text = sum(name.path.endswith(TEXT) for name in tlora.layers)
    more = {name: count for name, (count, _) in found["folded"]["more_than_bare"].items()}
    of_shapes = {(*low.shape, name.path.endswith(TEXT)) for name, low in tlora.layers.items()}
    texts = sum(is_text for *_, is_text in of_shapes)
    assert more == {"stack": len(of_shapes) - texts, "clone": texts, "baddbmm_": len(of_shapes), "mm": -of_text}
