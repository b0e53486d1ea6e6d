"""Plain LoRAs in every naming: matched, scaled, reported, and given a schedule."""

import json

import pytest
import torch
from foreign_files import (
    NAMINGS,
    RANK,
    assert_close,
    masked,
    orthogonal_parts,
    plain_layers,
    plain_state,
    target_with,
    unet_layers,
    update,
)
from own_files import make
from safetensors.torch import save_file

from tlora_core import RankSchedule, TLoRAError, TLoRAFile
from tlora_core.files.export import LAYOUTS, export
from tlora_core.files.foreign import load_any


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_plain_lora_in_every_naming(tmp_path, naming, alpha):
    layers = plain_layers()
    save_file(plain_state(naming, layers, alpha), tmp_path / "a.safetensors")
    loaded = load_any(tmp_path / "a.safetensors")
    assert loaded.tlora.layers.keys() == layers.keys() and not loaded.unmatched
    assert (loaded.tlora.method, loaded.tlora.schedule) == ("lora", RankSchedule(4, 4))
    assert loaded.notes and "set min_rank" in loaded.notes[0]
    for name, (up, down) in layers.items():
        assert_close(update(loaded.tlora.layers[name], RANK), (alpha or 4) / 4 * up.double() @ down.double())


def test_a_schedule_can_be_put_on_a_plain_lora(tmp_path):
    save_file(plain_state("kohya", plain_layers()), tmp_path / "a.safetensors")
    loaded = load_any(tmp_path / "a.safetensors", min_rank=1)
    assert (loaded.tlora.method, loaded.tlora.schedule) == ("vanilla_tlora", RankSchedule(4, 1))
    assert load_any(tmp_path / "a.safetensors", min_rank=4).tlora.method == "lora"
    with pytest.raises(TLoRAError, match='"a.safetensors": min_rank is 5'):
        load_any(tmp_path / "a.safetensors", min_rank=5)


@pytest.mark.parametrize(
    ("config", "scale"),
    [({"unet.lora_alpha": 8, "unet.r": 4}, 2.0), ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0), ({}, 1.0)],
)
def test_pefts_scale_is_read_from_its_settings(tmp_path, config, scale):
    layers = plain_layers()
    save_file(
        plain_state("diffusers", layers), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)}
    )
    tlora = load_any(tmp_path / "a.safetensors").tlora
    for name, (up, down) in layers.items():
        assert_close(update(tlora.layers[name], RANK), scale * up.double() @ down.double())


def test_pefts_own_folder(tmp_path):
    layers = plain_layers()
    save_file(plain_state("peft", layers), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    tlora = load_any(tmp_path / "adapter_model.safetensors").tlora
    for name, (up, down) in layers.items():
        assert_close(update(tlora.layers[name], RANK), 0.5 * up.double() @ down.double())


@pytest.mark.parametrize(
    "config",
    [
        "[",
        "[1]",
        '{"lora_alpha": "x"}',
        '{"lora_alpha": 1, "alpha_pattern": {"a": 2}}',
        "[" * 10**5,
        f'{{"lora_alpha": 1{"0" * 400}}}',
    ],
    ids=range(6),
)
def test_peft_settings_that_leave_the_scale_unknown_are_refused(tmp_path, config):
    save_file(plain_state("diffusers", plain_layers()), tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(TLoRAError, match="PEFT settings"):
        load_any(tmp_path / "a.safetensors")


def test_unmatched_keys_are_reported_with_the_reason(tmp_path):
    state = plain_state("kohya", plain_layers())
    dora = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q"
    state |= {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 2),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4),
        "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight": torch.ones(4, 2, 1, 1),
        "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": torch.ones(2, 4, 3, 3),
        f"{dora}.lora_up.weight": torch.ones(12, 2),
        f"{dora}.lora_down.weight": torch.ones(2, 12),
        f"{dora}.dora_scale": torch.ones(12, 1),
        "lora_unet_something_else.lora_up.weight": torch.ones(4, 2),
        "lora_unet_something_else.lora_down.weight": torch.ones(2, 4),
        "step": torch.ones(1),
    }
    save_file(state, tmp_path / "a.safetensors")
    loaded = load_any(tmp_path / "a.safetensors")
    assert len(loaded.tlora.layers) == 16 and len(loaded.unmatched) == 10
    reasons = " ".join(loaded.unmatched.values())
    for words in ("text encoder", "convolution", "dora_scale changes", "not belong to SD1.5", "not part of a LoRA"):
        assert words in reasons and words in loaded.report
    assert "16 layers matched" in loaded.report


def test_layers_of_another_shape_and_files_without_a_match_are_refused(tmp_path):
    save_file(plain_state("kohya", plain_layers()), tmp_path / "a.safetensors")
    weights = {path: torch.zeros(o, i) for _, path, o, i in unet_layers()}
    assert len(load_any(tmp_path / "a.safetensors", target_with(weights)).tlora.layers) == 16
    first = next(iter(weights))
    few = load_any(tmp_path / "a.safetensors", target_with({first: weights[first]}))
    assert list(few.tlora.layers) == [first] and set(few.unmatched.values()) == {"the model has no such layer"}
    with pytest.raises(TLoRAError, match=f"made for another model: its layer {first} is 12x12 and the model's 13x12"):
        load_any(tmp_path / "a.safetensors", target_with({first: torch.zeros(13, 12)}))
    with pytest.raises(TLoRAError, match="none of its 32 keys fits; .* the model has no such layer"):
        load_any(tmp_path / "a.safetensors", target_with({"x": weights[first]}))


# Plain LoRAs made of a T-LoRA.


def stacked(
    path,
    order=lambda rank: [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)],
    minus="up",
    moved=0.05,
    naming="comfyui",
    plain=0,
):
    """A plain LoRA of both terms of a T-LoRA, [P, -P0] [A; A0] but for `order`; the first `plain` layers are not of
    that kind. Returns {name: (trained, base)}."""
    layers, pairs = {}, plain_layers()
    for index, (_, name, o, i) in enumerate(unet_layers()):
        trained, base = layers[name] = orthogonal_parts(o, i, moved=moved)
        P, P0 = trained[0] * trained[1], base[0] * base[1]
        sign = (-1, 1) if minus == "up" else (1, -1)
        up, down = (
            torch.stack((P, sign[0] * P0), 2).flatten(1),
            torch.stack((trained[2], sign[1] * base[2]), 1).flatten(0, 1),
        )
        if index >= plain:
            pairs[name] = up[:, order(RANK)].float().contiguous(), down[order(RANK)].float().contiguous()
    save_file(plain_state(naming, pairs, alpha=2.0 * RANK), path, {"format": "pt"})
    return layers


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"order": lambda rank: list(range(2 * rank))}, id="halves"),
        {"minus": "down"},
        {"moved": 1e-4},
        {"moved": 0.1},
        {"naming": "kohya"},
    ],
    ids=str,
)
def test_both_terms_of_a_tlora_in_a_plain_lora_are_recognised_and_masked_together(tmp_path, options):
    layers = stacked(tmp_path / "a.safetensors", **options)
    loaded = load_any(tmp_path / "a.safetensors")
    assert (loaded.tlora.method, loaded.tlora.schedule) == ("ortho_lora", RankSchedule(RANK, RANK))
    assert "made of an orthogonal one" in loaded.report and "the paper's is 2, half the rank" in loaded.report
    scheduled = load_any(tmp_path / "a.safetensors", min_rank=1).tlora
    assert (scheduled.method, scheduled.schedule) == ("tlora", RankSchedule(RANK, 1))
    for name, (trained, base) in layers.items():
        for r in range(1, RANK + 1):
            want = masked(trained, r) - masked(base, r)
            size = masked(base, r).norm()  # what float32 can tell apart, as the file holds the two large terms
            assert (update(scheduled.layers[name], r) - want).norm() <= 1e-6 * size


def test_no_schedule_is_put_on_a_file_of_which_only_some_layers_hold_both_terms(tmp_path):
    stacked(tmp_path / "a.safetensors", plain=3)
    loaded = load_any(tmp_path / "a.safetensors")
    assert loaded.tlora.method == "lora" and "set min_rank" not in loaded.report and "partly made of" in loaded.report
    for asked in ({"min_rank": 2}, {"alpha": 2.0}):
        with pytest.raises(
            TLoRAError,
            match='"a.safetensors": 13 of its 16 layers hold both terms .* it cannot have a schedule; set min_rank',
        ):
            load_any(tmp_path / "a.safetensors", **asked)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "reference"])
def test_no_schedule_is_put_on_an_export_of_ours_whose_ranks_are_pairs(tmp_path, layout):
    stacked(tmp_path / "a.safetensors")
    ours = load_any(tmp_path / "a.safetensors", min_rank=2).tlora
    ours.save(tmp_path / "ours.safetensors")
    export(TLoRAFile.load(tmp_path / "ours.safetensors"), tmp_path / "b.safetensors", layout)
    loaded = load_any(tmp_path / "b.safetensors")
    assert "load that T-LoRA to have its schedule" in loaded.report and "set min_rank" not in loaded.report
    with pytest.raises(
        TLoRAError, match='"b.safetensors": It was exported from a T-LoRA of this pack, .*it cannot have a schedule'
    ):
        load_any(tmp_path / "b.safetensors", min_rank=2)


def test_report_says_which_schedule_is_used_and_why(tmp_path):
    path, ours = tmp_path / "plain.safetensors", tmp_path / "ours.safetensors"
    save_file(plain_state("kohya", plain_layers()), path)
    make().save(ours)
    for where, words, chosen in (
        (ours, "The schedule is the file's own.", {}),
        (
            ours,
            "The schedule is the file's own, but the node sets min_rank 3 in place of 2 and alpha 2 in place of 1.",
            {"min_rank": 3, "alpha": 2.0},
        ),
        (path, "The schedule is a default, as the file states none.", {}),
        (
            path,
            "The schedule is a default, as the file states none, but the node sets min_rank 1 in place of 4.",
            {"min_rank": 1},
        ),
    ):
        assert words in load_any(where, **chosen).report.splitlines()
    make(schedule=RankSchedule.from_text(4, 0, 1.0, "0:4, 1:1")).save(ours)
    assert "sets alpha 2 in place of the curve." in load_any(ours, alpha=2.0).report
