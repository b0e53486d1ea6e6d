"""The report on a T-LoRA: effective ranks and norms against full matrices, and what text and picture show."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tlora_core import LowRank, RankSchedule, TLoRAFile, make_adapters
from tlora_core.reports.report import (
    B_KEY,
    block_name,
    blocks,
    effective_rank,
    effective_rank_of_b,
    report_picture,
    report_text,
    singular_values,
)

NAMES = [
    "output_blocks.10.1.attn1.to_q",
    "output_blocks.9.1.attn1.to_q",
    "input_blocks.4.1.attn1.to_q",
    "input_blocks.4.1.attn1.to_k",
    "middle_block.1.attn1.to_q",
    "double_blocks.3.img_attn.qkv@128",
]


def random_layer(seed=0, out=12, inner=6, width=10, group=2):
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, inner, generator=g), torch.randn(inner, width, generator=g), group)


def make(names=NAMES, training=None, **changes):
    layers = {name: random_layer(seed) for seed, name in enumerate(names)}
    fields = {
        "layers": layers,
        "method": "tlora",
        "schedule": RankSchedule(3, 1, 2.0),
        "num_timesteps": 1000,
        "noise_domain": "discrete",
        "base_model": "sdxl",
        "token": "sks",
        "class_word": "dog",
        "training": {"steps": 800} if training is None else training,
    }
    return TLoRAFile(**(fields | changes))


def by_full_svd(matrix, share):
    """The definition itself, with numpy: the smallest number of singular values that hold the share."""
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    total = sum(values)
    return next((n for n in range(len(values) + 1) if sum(values[:n]) >= share * (1 - 1e-6) * total), 0)


sizes = st.tuples(*[st.integers(1, 9)] * 3)


@given(sizes, st.integers(0, 2**31), st.sampled_from([0.5, 0.8, 0.95]), st.sampled_from([0, 1, 3]))
def test_effective_rank_and_norm_are_those_of_the_full_matrix(size, seed, share, decay):
    out, inner, width = size
    g = torch.Generator().manual_seed(seed)
    strength = 10.0 ** (-decay * torch.arange(inner))
    up = torch.randn(out, inner, generator=g, dtype=torch.float64) * strength
    down = torch.randn(inner, width, generator=g, dtype=torch.float64)
    product = up @ down
    assert effective_rank((up, down), share) == effective_rank(product, share) == by_full_svd(product, share)
    assert float(singular_values((up, down)).norm()) == pytest.approx(float(product.norm()), rel=1e-9)
    expected = torch.linalg.svdvals(product)
    found = singular_values(product)[: len(expected)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected[0]))


@pytest.mark.parametrize("count, wanted", [(1, 1), (10, 10), (20, 19), (40, 38), (60, 57), (64, 61), (100, 95)])
def test_equal_singular_values_are_counted_exactly(count, wanted):
    for size in (1, 0.7, 1.3, 2.3, 3.3):  # of some of these, 95% of the sum is rounded to just above the sum of 95%
        columns = torch.eye(128, count, dtype=torch.float64) * size
        assert effective_rank(columns) == effective_rank((columns, torch.eye(count))) == wanted


def test_one_large_direction_has_rank_one_and_nothing_has_rank_zero():
    assert effective_rank(torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 5))) == 1
    assert effective_rank(torch.zeros(5, 3)) == effective_rank((torch.zeros(5, 2), torch.ones(2, 3))) == 0


def test_half_precision_factors_are_measured_in_float64():
    layer = random_layer().to(dtype=torch.float16)
    up, down = layer.up * 10000, layer.down  # float16 holds this, but neither its Gram matrix nor the product
    assert effective_rank(up) == by_full_svd(up, 0.95)
    assert effective_rank((up, down)) == by_full_svd(up.double() @ down.double(), 0.95)


@pytest.mark.parametrize("method", ["tlora", "lora"])
def test_learnt_factor_b_is_measured_alone(method):
    adapters = make_adapters(method, "last_random", {"a.b": (12, 10), "c": (8, 20)}, 4, seed=0)
    expected = {"tlora": 4, "lora": 0}[method]  # orthonormal from the start; zero until trained
    assert effective_rank_of_b(adapters) == {"a.b": expected, "c": expected}
    with torch.no_grad():
        adapters["c"].B[:, 1:] *= 1e-3
        adapters["c"].B[:, 0] = 1
    assert effective_rank_of_b(adapters) == {"a.b": expected, "c": 1}


@pytest.mark.parametrize(
    "layer, block",
    [
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.4"),
        ("middle_block.1.proj_in", "middle_block"),
        ("double_blocks.3.img_attn.qkv@3072", "double_blocks.3"),
        ("single_blocks.37.linear1@0", "single_blocks.37"),
        ("layers.12.attention.out", "layers.12"),
        ("context_embedder", "context_embedder"),
        ("img_in@64", "img_in"),
        ("down_blocks.1.attentions.0.to_q", "down_blocks.1"),
        ("blocks.0", "blocks.0"),
        ("time_embed.0", "time_embed"),
    ],
)
def test_layers_are_grouped_by_the_models_blocks(layer, block):
    assert block_name(layer) == block


def test_blocks_come_in_order_with_the_figures_of_their_layers():
    tlora = make()
    found = blocks(tlora)
    assert [b.name for b in found] == [
        "double_blocks.3",
        "input_blocks.4",
        "middle_block",
        "output_blocks.9",
        "output_blocks.10",
    ]
    updates = [tlora.layers[name].up.double() @ tlora.layers[name].down.double() for name in NAMES[2:4]]
    assert found[1].ranks == [by_full_svd(u, 0.95) for u in updates]
    assert found[1].norm == pytest.approx(float(torch.cat(updates).norm()), rel=1e-9)
    assert all(b.ranks_b == [] for b in found)


def test_text_gives_the_settings_the_ranks_and_every_block():
    tlora = make(training={"steps": 800, "start": "last_random", B_KEY: {NAMES[2]: 1, NAMES[3]: 3, NAMES[4]: 2}})
    text = report_text(tlora, blocks(tlora))
    for words in (
        'base model sdxl: token "sks", class word "dog"',
        "method tlora, rank 3, min_rank 1, alpha 2",
        "1: 1, 0.75: 1, 0.5: 1, 0.25: 2, 0: 3",
        "noise domain discrete, T = 1000",
        "6 layers, 0.00 MB in float32",
        '"steps": 800, "start": "last_random"',
        "whole update up @ down, all ranks on: ",
        "(6 columns)",
        "factor B alone, at the end of training: 1/2/3 (rank 3)",
    ):
        assert words in text, words
    lines = [line.split()[0] for line in text.partition("by block")[2].splitlines()[1:]]
    assert lines == [b.name for b in blocks(tlora)]
    assert B_KEY not in text


def test_size_is_that_of_the_tensors():
    layer = LowRank(torch.ones(1000, 600).half(), torch.ones(600, 1000).half(), 2)
    tlora = make(layers={"a": layer}, schedule=RankSchedule(300, 300))
    assert "1 layer, 2.40 MB in float16" in report_text(tlora, blocks(tlora))


@pytest.mark.parametrize("recorded", [None, [1], "x", {NAMES[0]: "4", NAMES[1]: True, NAMES[2]: None, "gone": 4}])
def test_other_things_under_the_name_of_factor_b_are_not_taken_for_ranks(recorded):
    tlora = make(training={B_KEY: recorded})
    text = report_text(tlora, blocks(tlora))
    assert (
        "factor B alone, at the end of training: not recorded in this file" in text and "training: not recorded" in text
    )


def colours(picture):
    return {tuple(c) for c in np.asarray(picture).reshape(-1, 3).tolist()}


def test_picture_shows_factor_b_only_where_it_was_recorded():
    mark = (255, 176, 80)
    without, with_b = make(), make(training={B_KEY: dict.fromkeys(NAMES, 2)})
    for tlora, shown in ((without, False), (with_b, True)):
        picture = report_picture(tlora, blocks(tlora))
        assert picture.size == (640, 720) and (mark in colours(picture)) == shown


def test_bars_of_the_picture_follow_norm_and_effective_rank():
    def bar_pixels(scale, panel):
        layers = {"input_blocks.0.a": random_layer(0), "input_blocks.1.a": random_layer(0)}
        layers["input_blocks.1.a"] = LowRank(layers["input_blocks.1.a"].up * scale, layers["input_blocks.1.a"].down, 2)
        tlora = make(layers=layers)
        pixels = np.asarray(report_picture(tlora, blocks(tlora)))[240 * panel : 240 * (panel + 1)]
        return [int((half == (100, 180, 255)).all(2).sum()) for half in (pixels[:, 64:342], pixels[:, 342:])]

    whole, quarter = bar_pixels(0.25, 2)
    assert quarter / whole == pytest.approx(0.25, abs=0.03)
    left, right = bar_pixels(0.25, 1)
    assert left == pytest.approx(right, rel=0.02)


@pytest.mark.parametrize("count", [1, 57, 200])
def test_any_number_of_blocks_and_a_zero_update_are_drawn(count):
    layers = {f"double_blocks.{i}.a": LowRank(torch.zeros(4, 6), torch.zeros(6, 4), 2) for i in range(count)}
    tlora = make(layers=layers)
    assert report_picture(tlora, blocks(tlora)).size == (640, 720)
    assert "0/0/0" in report_text(tlora, blocks(tlora))


class NoFloat64BeyondTheCPU(TorchDispatchMode):
    """Stands for a device without float64, on which torch casts before it moves what is to be both moved and cast."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float64 and "device" in kwargs:
            raise TypeError("this device has no float64")
        return func(*args, **kwargs)


def test_figures_need_no_float64_where_the_adapters_are():
    (adapter,) = make_adapters("tlora", "last_random", {"a": (8, 6)}, 2, seed=0).values()
    with NoFloat64BeyondTheCPU():
        assert effective_rank_of_b({"a": adapter}) == {"a": 2}
        assert effective_rank(adapter.factors()) == 0
