"""T-LoRA schedules in the metadata of trainers built on kohya's scripts, and these trainers' own orthogonal files.

The behaviour of each trainer at a noise level is written out here from its public code.
"""

import json
import math

import pytest
import torch
from foreign_files import RANK, assert_close, masked, orthogonal_parts, plain_layers, plain_state, unet_layers, update
from safetensors.torch import save_file

from tlora_core import RankSchedule
from tlora_core.files.foreign import load_any
from tlora_core.files.foreign.kohya import stated_schedule

LEVELS = torch.linspace(0, 1, 4001, dtype=torch.float64).tolist()


def power(t, rank, low, a=1.0, end=1.0):
    return math.floor(max(0.0, (end - t) / end) ** a * (rank - low)) + low


def rounded(t, rank, low, cosine):
    p = 0.5 - 0.5 * math.cos(math.pi * (1 - t)) if cosine else 1 - t
    return low + round((rank - low) * p)


def boundary(t, rank, low, level=0.875, a=1.0):
    return math.floor((1 - (t - level) / (1 - level)) ** a * (rank - low)) + low if t > level else rank


# network_module, network_args, other ss_ keys, r(t)
TRAINERS = {
    "sd-scripts fork": (
        "networks.tlora",
        {"tlora_min_rank": "3", "tlora_rank_schedule": "linear"},
        {},
        lambda t, r: rounded(t, r, 3, False),
    ),
    "its default": ("networks.tlora_flux", {"tlora_min_rank": "3"}, {}, lambda t, r: rounded(t, r, 3, True)),
    "its own keys": (
        "networks.lora",
        {},
        {"tlora_min_rank": "2", "tlora_rank_schedule": "cosine"},
        lambda t, r: rounded(t, r, 2, True),
    ),
    "no arguments": ("networks.tlora_anima", None, {}, lambda t, r: rounded(t, r, 1, True)),
    "fork for Anima": (
        "networks.lora_tlora_anima",
        {"tlora_min_rank": 5, "tlora_alpha_rank_scale": 0.5},
        {},
        lambda t, r: power(t, r, 5, 0.5),
    ),
    "its keys": (
        "networks.lora_tlora",
        None,
        {"tlora_min_rank": "5", "tlora_alpha_rank_scale": "2.0", "tlora_max_timestep": "1000"},
        lambda t, r: power(t, r, 5, 2.0),
    ),
    "another T": (
        "networks.lora_tlora",
        None,
        {"tlora_min_rank": "5", "tlora_max_timestep": "0.8"},
        lambda t, r: power(t, r, 5, 1.0, 0.8),
    ),
    "mask as an option": (
        "networks.lora_anima",
        {"use_timestep_mask": "true", "min_rank": "4", "alpha_rank_scale": "1.25"},
        {},
        lambda t, r: power(t, r, 4, 1.25),
    ),
    "its stamps": (
        "networks.lora_anima",
        {},
        {"use_timestep_mask": "true", "min_rank": "4", "alpha_rank_scale": "1.0"},
        lambda t, r: power(t, r, 4),
    ),
    "fork of musubi-tuner": ("networks.tlora_wan", {"tlora_min_rank": "2"}, {}, lambda t, r: boundary(t, r, 2)),
    "its exponent": (
        "networks.t_lora",
        {"tlora_min_rank": "0", "tlora_alpha": "2", "tlora_boundary_timestep": "500"},
        {},
        lambda t, r: boundary(t, r, 0, 0.5, 2.0),
    ),
    "LyCORIS": (
        "lycoris.kohya",
        {"algo": "tlora", "tlora_min_rank": "4", "tlora_alpha": "1.5"},
        {},
        lambda t, r: power(t, r, 4, 1.5),
    ),
    "above the rank": ("networks.tlora", {"tlora_min_rank": "99"}, {}, lambda t, r: r),
}


def metadata_of(module, args, keys):
    told = {"ss_network_module": module, "ss_network_dim": "16", **{f"ss_{key}": value for key, value in keys.items()}}
    return told if args is None else {**told, "ss_network_args": json.dumps(args)}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("rank", [8, 16, 61])
def test_schedule_that_the_metadata_tells_is_the_trainers_at_every_noise_level(trainer, rank):
    *told, ranks = TRAINERS[trainer]
    schedule, note = stated_schedule(metadata_of(*told), rank)
    assert "from its trainer's metadata" in note and f"set min_rank to the rank, {rank}" in note
    assert ("this is not done here" in note) == ("rounded" in ranks.__code__.co_names)
    wrong = [t for t in LEVELS if schedule.active_rank(t, 1) != ranks(t, rank)]
    # Where a rank ends, the last digit of a float decides.
    assert all(abs(schedule.active_rank(t, 1) - ranks(t, rank)) == 1 for t in wrong)
    assert all(
        ranks(t - 1e-9, rank) != ranks(t + 1e-9, rank) or ranks(t, rank) != ranks(t + 1e-9, rank)
        for t in wrong
        if 0 < t < 1
    ), wrong


def test_file_gets_the_schedule_and_the_users_own_comes_first(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(
        plain_state("kohya", plain_layers()), path, metadata_of("networks.tlora_flux", {"tlora_min_rank": "1"}, {})
    )
    loaded = load_any(path)
    assert (
        loaded.tlora.method == "vanilla_tlora" and loaded.tlora.schedule.min_rank == 1 and loaded.tlora.schedule.points
    )
    assert (
        "min_rank 1, a curve" in loaded.report
        and "tlora_min_rank 1" in loaded.report
        and "A plain LoRA has no" not in loaded.report
    )
    assert load_any(path, min_rank=2).tlora.schedule == RankSchedule(RANK, 2)
    assert load_any(path, min_rank=RANK).tlora.method == "lora"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"ss_network_module": "networks.lora", "ss_network_args": '{"min_rank": "2"}'},
        {"ss_network_args": "[" * 10**5},
        {"ss_network_args": "[1]", "ss_network_module": "networks.net_lora"},
        {"ss_network_args": '{"use_timestep_mask": "false", "min_rank": 1}'},
    ],
    ids=range(5),
)
def test_other_files_are_as_they_were(tmp_path, metadata):
    save_file(plain_state("kohya", plain_layers()), tmp_path / "a.safetensors", metadata)
    loaded = load_any(tmp_path / "a.safetensors")
    assert loaded.tlora.method == "lora" and "A plain LoRA has no schedule" in loaded.report


@pytest.mark.parametrize(
    "args",
    [
        {"tlora_min_rank": "x"},
        {"tlora_min_rank": "-1"},
        {"tlora_min_rank": "1e999"},
        {"tlora_min_rank": "nan"},
        {"tlora_min_rank": "1", "tlora_alpha": "-2"},
        {"tlora_min_rank": 1, "tlora_max_timestep": 4000, "tlora_alpha": 1},
    ],
    ids=str,
)
def test_nonsense_is_said_and_takes_nothing_for_granted(tmp_path, args):
    save_file(plain_state("kohya", plain_layers()), tmp_path / "a.safetensors", metadata_of("networks.tlora", args, {}))
    loaded = load_any(tmp_path / "a.safetensors")
    assert (
        loaded.tlora.method == "lora"
        and "the schedule cannot be read (" in loaded.report
        and "\n\n" not in loaded.report
    )


@pytest.mark.parametrize("suffix", ["base_lambda", "base_lambda_buf"])
def test_orthogonal_file_of_such_a_trainer_has_its_base_term_and_needs_no_model(tmp_path, suffix):
    state, layers = {}, {}
    for _, name, o, i in unet_layers():
        trained, base = layers[name] = orthogonal_parts(o, i)
        key = "lora_unet_" + name.replace(".", "_")
        for (B, S, A), names in (
            (trained, ("p_layer.weight", "lambda_layer", "q_layer.weight")),
            (base, ("base_p.weight", suffix, "base_q.weight")),
        ):
            state |= {f"{key}.{part}": tensor.float().contiguous() for part, tensor in zip(names, (B, S[None], A))}
        state[f"{key}.alpha"] = torch.tensor(2.0)
    metadata = metadata_of("networks.lora_tlora", None, {"tlora_min_rank": "2", "tlora_alpha_rank_scale": "1.0"})
    save_file(state, tmp_path / "a.safetensors", metadata)
    loaded = load_any(tmp_path / "a.safetensors")
    assert (loaded.kind, loaded.tlora.method, loaded.tlora.schedule) == (
        "T-LoRA of a kohya-like trainer",
        "tlora",
        RankSchedule(RANK, 2),
    )
    assert not loaded.unmatched
    for name, (trained, base) in layers.items():
        for r in range(1, RANK + 1):
            assert_close(update(loaded.tlora.layers[name], r), 2.0 / RANK * (masked(trained, r) - masked(base, r)))
    save_file(state, tmp_path / "b.safetensors")
    assert "half the rank" in load_any(tmp_path / "b.safetensors").report
