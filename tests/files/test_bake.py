"""Plain LoRAs baked from a T-LoRA, compared with the masked product, its mean over time, and its staircase, in
float64."""

import errno
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tlora_core import LowRank, RankSchedule, TLoRAError, TLoRAFile
from tlora_core.files.bake import bake_at, bake_interval, save_all, split_steps, switch_times, when_on

BIG, SMALL = "input_blocks.4.1.attn1.to_q", "middle_block.1.attn1.to_q"


def make(rank=4, min_rank=2, small=None, method="tlora", alpha=1.0, T=1000, domain="discrete", dtype=torch.float64):
    """A T-LoRA of two layers, the second of rank `small`."""
    g = torch.Generator().manual_seed(rank + 100 * min_rank)
    group = 2 if method in ("tlora", "ortho_lora") else 1
    layers = {}
    for name, r, (out, width) in ((BIG, rank, (7, 6)), (SMALL, small or rank, (5, 9))):
        up, down = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((out, group * r), (group * r, width)))
        layers[name] = LowRank(up, down, group)
    training = {"steps": 800, "start": "last_random"}
    return TLoRAFile(layers, method, RankSchedule(rank, min_rank, alpha), T, domain, "sdxl", "sks", "dog", training)


def masked(tlora, name, rank):
    """B M A, where the mask M keeps the first `rank` components."""
    layer = tlora.layers[name]
    mask = (torch.arange(layer.up.shape[1]) < rank * layer.group).double()
    return layer.up.double() @ torch.diag(mask) @ layer.down.double()


def update(tlora, name):
    """The plain update of a baked layer; zero if the layer was left out."""
    layer = tlora.layers.get(name)
    return torch.zeros(()) if layer is None else layer.up.double() @ layer.down.double()


def close(value, wanted):
    torch.testing.assert_close(value.expand_as(wanted).double(), wanted, rtol=1e-9, atol=1e-9)


def is_plain(baked, source):
    """What every result must be: a constant T-LoRA of method lora, with everything else as in its source."""
    assert baked.method == "lora" and baked.schedule.is_constant
    assert all(layer.group == 1 for layer in baked.layers.values())
    kept = ("num_timesteps", "noise_domain", "base_model", "token", "class_word", "pack_version")
    assert all(getattr(baked, name) == getattr(source, name) for name in kept)
    assert baked.training["steps"] == 800 and baked.training["baked"]["from"]["method"] == source.method
    return True


@st.composite
def tloras(draw, lowest=0):
    rank = draw(st.integers(1, 6))
    T, domain = draw(st.sampled_from([(1000, "discrete"), (1, "flow")]))
    return make(
        rank,
        draw(st.integers(min(lowest, rank), rank)),
        draw(st.integers(1, rank)),
        T=T,
        domain=domain,
        method=draw(st.sampled_from(["tlora", "vanilla_tlora"])),
        alpha=draw(st.sampled_from([0.5, 1.0, 3.0])),
    )


levels = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@given(tloras(), levels)
def test_components_are_on_up_to_their_switch_time_and_at_no_later_one(tlora, level):
    T = tlora.num_timesteps
    for name in tlora.layers:
        schedule = tlora.schedule_of(name)
        on = [level * T <= time for time in switch_times(schedule, T)]
        assert sum(on) == schedule.active_rank(level * T, T) and on == sorted(on, reverse=True)


@given(tloras(), levels)
def test_baked_at_a_timestep_is_the_masked_product(tlora, level):
    T = tlora.num_timesteps
    ranks = {name: tlora.schedule_of(name).active_rank(level * T, T) for name in tlora.layers}
    if not any(ranks.values()):
        with pytest.raises(TLoRAError, match=r"nothing on at the noise levels to bake \(its min_rank is 0\)"):
            bake_at(tlora, level * T)
        return
    baked = bake_at(tlora, level * T)
    assert is_plain(baked, tlora) and baked.training["baked"]["timestep"] == level * T
    assert list(baked.layers) == [name for name, rank in ranks.items() if rank]
    for name, rank in ranks.items():
        close(update(baked, name), masked(tlora, name, rank))
        assert rank == 0 or baked.layers[name].rank == rank * tlora.layers[name].group


@given(tloras(lowest=1), levels, levels)
def test_baked_over_an_interval_is_the_mean_over_time(tlora, first, last):
    T, steps = tlora.num_timesteps, 400
    baked = bake_interval(tlora, first * T, last * T)
    assert is_plain(baked, tlora)
    for name, layer in tlora.layers.items():
        times = [(first + (last - first) * (i + 0.5) / steps) * T for i in range(steps)]
        schedule = tlora.schedule_of(name)
        mean = sum(masked(tlora, name, schedule.active_rank(t, T)) for t in times) / steps
        # A sum at the middle of `steps` spans misses each component's share by half a span at most.
        whole = sum(masked(tlora, name, i + 1).sub(masked(tlora, name, i)).norm() for i in range(layer.rank))
        assert (update(baked, name) - mean).norm() <= whole / steps


def test_both_factors_take_half_of_a_components_weight():
    tlora = make(2, 1, method="vanilla_tlora", alpha=1.0)
    tlora = replace(tlora, schedule=RankSchedule(2, 0))  # the components go at t = 500 and t = 0
    baked = bake_interval(tlora, 0, 1000)
    source, layer = tlora.layers[BIG], baked.layers[BIG]
    assert layer.rank == 1, "a component that is on for no time at all is left out"
    torch.testing.assert_close(layer.up, source.up[:, :1] * 0.5**0.5)
    torch.testing.assert_close(layer.down, source.down[:1] * 0.5**0.5)


def test_an_interval_may_be_given_in_either_order_and_may_be_a_point():
    tlora = make(4, 1)
    for name in tlora.layers:
        close(update(bake_interval(tlora, 900, 100), name), update(bake_interval(tlora, 100, 900), name))
        close(update(bake_interval(tlora, 300, 300), name), update(bake_at(tlora, 300), name))


def test_an_interval_without_active_components_is_refused():
    with pytest.raises(
        TLoRAError, match="nothing on at the noise levels to bake.* choose lower noise levels"
    ) as caught:
        bake_interval(make(2, 0), 900, 1000)
    assert "\n" not in str(caught.value)


def test_layers_with_nothing_on_are_left_out_and_the_schedule_is_that_of_the_largest_left():
    baked = bake_at(make(4, 0, small=1), 500)
    assert list(baked.layers) == [BIG] and baked.schedule == RankSchedule(4, 4)


def part_numbers(tlora):
    always, switching = tlora.schedule.min_rank > 0, tlora.schedule.rank - tlora.schedule.min_rank
    return always + (switching > 0), always + switching


@given(tloras(), st.data())
def test_split_parts_on_at_a_timestep_add_up_to_the_staircase(tlora, data):
    T, parts = tlora.num_timesteps, data.draw(st.integers(*part_numbers(tlora)))
    split = split_steps(tlora, parts)
    times = [t for _, t in split]
    assert len(split) == parts and times == sorted(times, reverse=True) and all(is_plain(p, tlora) for p, _ in split)
    assert times[0] == T or tlora.schedule.min_rank == 0
    heights = {
        name: [
            sum(part.layers[name].rank for part, _ in split[: n + 1] if name in part.layers) // layer.group
            for n in range(parts)
        ]
        for name, layer in tlora.layers.items()
    }
    for t in [level * T for level in (0, 0.1, 0.3, 0.5, 0.77, 1)]:
        on = [part for part, time in split if t <= time]
        for name in tlora.layers:
            height = heights[name][len(on) - 1] if on else 0
            close(sum((update(part, name) for part in on), torch.zeros(())), masked(tlora, name, height))
    largest = heights[BIG]
    assert largest[-1] == tlora.schedule.rank and heights[SMALL][-1] == tlora.layers[SMALL].rank
    groups = [b - a for a, b in zip([tlora.schedule.min_rank, *largest], largest) if b > a]
    assert not groups or max(groups) - min(groups) <= 1 or largest[0] == tlora.schedule.min_rank


@given(tloras())
def test_split_into_single_components_is_the_tlora_itself(tlora):
    T = tlora.num_timesteps
    split = split_steps(tlora, part_numbers(tlora)[1])
    for t in [level * T for level in (0, 0.2, 0.4, 0.5, 0.61, 0.99, 1)]:
        total = sum((update(part, BIG) for part, time in split if t <= time), torch.zeros(()))
        close(total, masked(tlora, BIG, tlora.schedule.active_rank(t, T)))


@pytest.mark.parametrize("small", [1, 2, 3, 5])
def test_layers_of_smaller_rank_stay_near_their_own_schedule(small):
    tlora = make(6, 0, small=small)
    for parts in (2, 3, 6):
        split = split_steps(tlora, parts)
        # Area between the layer's r(t) and its staircase, in components.
        times = [(i + 0.5) for i in range(1000)]
        own = tlora.schedule_of(SMALL)
        stairs = [sum(p.layers[SMALL].rank for p, t in split if time <= t and SMALL in p.layers) / 2 for time in times]
        wrong = sum(abs(own.active_rank(time) - height) for time, height in zip(times, stairs)) / 1000
        assert wrong <= small * 0.5 / parts + 1e-9


def test_a_group_comes_on_at_the_median_time_of_its_components():
    times = [t for _, t in split_steps(make(8, 2), 3)]
    assert times == pytest.approx([1000, 1000 * (1 - 2 / 6), 1000 * (1 - 5 / 6)])
    last = [t for _, t in split_steps(make(4, 2), 3)]
    assert last == pytest.approx([1000, 500, 0], abs=1e-9)


@pytest.mark.parametrize(
    "rank, min_rank, parts, allowed",
    [
        (4, 2, 1, "a whole number from 2 to 3"),
        (4, 2, 4, "a whole number from 2 to 3"),
        (4, 0, 5, "a whole number from 1 to 4"),
        (4, 4, 2, "set it to 1, since .* 4 are always on and 0 come on later"),
        (4, 2, 2.0, "a whole number from 2 to 3"),
    ],
)
def test_numbers_of_parts_that_cannot_be_made_are_refused(rank, min_rank, parts, allowed):
    with pytest.raises(TLoRAError, match=f"^parts is {parts}; .*{allowed}") as caught:
        split_steps(make(rank, min_rank), parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("t", [-1, 1000.1, float("nan"), float("inf")])
def test_timesteps_out_of_range_are_refused(t):
    for name, bake in (
        ("timestep", lambda: bake_at(make(), t)),
        ("first", lambda: bake_interval(make(), t, 0)),
        ("last", lambda: bake_interval(make(), 0, t)),
    ):
        with pytest.raises(TLoRAError, match=f"^{name} is .*; set it to a number from 0 to 1000, "):
            bake()


def with_parts(module, width):
    """A T-LoRA of ranks 4 and 3 on rows 0 and 2 * width of a fused module."""
    tlora, g = make(4, 2), torch.Generator().manual_seed(0)
    rows = {
        f"{module}@{row}": LowRank(torch.randn(width, 2 * r, generator=g), torch.randn(2 * r, width, generator=g), 2)
        for row, r in ((0, 4), (2 * width, 3))
    }
    return replace(tlora, layers=tlora.layers | rows)


def test_parts_of_a_fused_module_become_one_update_of_the_whole():
    module, width = "double_blocks.0.img_attn.qkv", 5
    tlora = with_parts(module, width)
    baked = bake_at(tlora, 1000)
    assert set(baked.layers) == {BIG, SMALL, module} and baked.schedule == RankSchedule(8, 8)
    whole = update(baked, module)
    assert whole.shape == (3 * width, width)
    for row in (0, width, 2 * width):
        name = f"{module}@{row}"
        wanted = masked(tlora, name, 2) if name in tlora.layers else torch.zeros(width, width).double()
        torch.testing.assert_close(whole[row : row + width], wanted)


def test_parts_of_a_module_of_unknown_size_are_refused():
    with pytest.raises(
        TLoRAError, match="^tlora has updates for parts of a layer whose whole size is not known"
    ) as caught:
        bake_at(with_parts("blocks.0.other", 5), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "level, domain, words",
    [
        (1, "discrete", "always on"),
        (1, "flow", "always on"),
        (0.625, "discrete", "start_percent 0.375 (noise level 0.625)"),
        (0, "discrete", "start_percent 0.999 (noise level 0.000)"),
        (0.625, "flow", "on from noise level 0.625 down; its start_percent depends on the shift"),
    ],
)
def test_when_a_part_comes_on_is_said_in_the_hosts_terms(level, domain, words):
    T = 1000 if domain == "discrete" else 1
    assert when_on(make(T=T, domain=domain), level * T).startswith(words)


@pytest.mark.parametrize("timestep", [0, 125, 500, 998])
def test_start_percent_is_right_to_a_timestep_in_the_hosts_own_reckoning(comfy, timestep):
    import comfy.model_sampling

    sampling = comfy.model_sampling.ModelSamplingDiscrete()
    percent = float(when_on(make(), timestep).split()[1])
    sigma = torch.tensor(sampling.percent_to_sigma(percent))
    assert float(sampling.timestep(sigma)) == pytest.approx(timestep, abs=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_baked_files_are_plain_loras_and_load_again(tmp_path, dtype):
    tlora = make(4, 2, small=3, dtype=torch.float16)
    (always, _), (later, _) = split_steps(tlora, 2)
    save_all([(always, tmp_path / "a.safetensors"), (later, tmp_path / "b.safetensors")], dtype)
    for path, file in ((tmp_path / "a.safetensors", always), (tmp_path / "b.safetensors", later)):
        again, tensors = TLoRAFile.load(path), load_file(path)
        assert again.training == file.training and again.schedule == file.schedule and again.method == "lora"
        for name in file.layers:
            up, down, alpha = (
                tensors["lora_unet_" + name.replace(".", "_") + part]
                for part in (".lora_up.weight", ".lora_down.weight", ".alpha")
            )
            assert up.dtype == dtype and alpha.item() == down.shape[0]
            torch.testing.assert_close(up.double() @ down.double(), update(file, name))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_if_one_file_cannot_be_saved_none_is_left(tmp_path, monkeypatch, failure):
    import os

    replaced, whole = [], os.replace

    def fail_at_the_third(source, target):
        replaced.append(target)
        if len(replaced) == 3:
            raise failure
        whole(source, target)

    other = tmp_path / "other.safetensors"
    other.write_bytes(b"kept")
    monkeypatch.setattr("os.replace", fail_at_the_third)
    files = [(part, tmp_path / f"{i}.safetensors") for i, (part, _) in enumerate(split_steps(make(4, 1), 4))]
    with pytest.raises((TLoRAError, KeyboardInterrupt)):
        save_all(files, torch.float32)
    assert len(replaced) == 3 and list(tmp_path.iterdir()) == [other]


def test_a_file_that_was_to_be_replaced_stays_when_saving_fails(tmp_path):
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    old.write_bytes(b"kept")
    good, bad = make(dtype=torch.float32), make(dtype=torch.float32)
    bad.layers[BIG].up[0, 0] = float("nan")
    with pytest.raises(TLoRAError, match="NaN"):
        save_all([(good, new), (bad, old)], torch.float32)
    assert old.read_bytes() == b"kept" and list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    "points", [((0.0, 2), (0.5, 8), (1.0, 4)), ((0.0, 6), (0.3, 6), (0.6, 1), (1.0, 8)), ((0.1, 5), (0.9, 3))]
)
@pytest.mark.parametrize("ends", [(0, 1), (0.2, 0.7), (0, 0), (0.5, 0.5)])
def test_baked_over_an_interval_is_the_mean_of_any_curve(points, ends):
    tlora = make(8, 0)
    schedule = RankSchedule(8, min(active for _, active in points), 1.0, points)
    tlora = replace(tlora, schedule=schedule)
    first, last = (level * 1000 for level in ends)
    times = np.linspace(first, last, 4001)
    share = np.mean([[schedule.active_rank(t, 1000) > i for i in range(8)] for t in times], axis=0)
    (name,) = [name for name in tlora.layers if tlora.layers[name].rank == 8][:1]
    layer = tlora.layers[name]
    wanted = sum(
        share[i]
        * layer.up[:, layer.group * i : layer.group * (i + 1)]
        @ layer.down[layer.group * i : layer.group * (i + 1)]
        for i in range(8)
    )
    torch.testing.assert_close(update(bake_interval(tlora, first, last), name), wanted.double(), rtol=0.02, atol=0.02)
