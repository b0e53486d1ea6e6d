"""Plain LoRAs in every naming: matched, scaled, reported, and given a schedule."""

import json

import pytest
import torch
from foreign_files import (
    NAMINGS,
    RANK,
    assert_close,
    plain_layers,
    plain_state,
    target_with,
    unet_layers,
    update,
)
from safetensors.torch import save_file

from tlora_core import RankSchedule, TLoRAError
from tlora_core.foreign import load_any


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
    save_file(plain_state("diffusers", layers), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
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
    "config", ["[", "[1]", '{"lora_alpha": "x"}', '{"lora_alpha": 1, "alpha_pattern": {"a": 2}}', "[" * 10**5,
               f'{{"lora_alpha": 1{"0" * 400}}}'], ids=range(6)
)
def test_peft_settings_that_leave_the_scale_unknown_are_refused(tmp_path, config):
    save_file(plain_state("diffusers", plain_layers()), tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(TLoRAError, match="PEFT settings"):
        load_any(tmp_path / "a.safetensors")


def test_what_does_not_match_is_reported_with_its_reason(tmp_path):
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
    for words in ("text encoder", "convolution", "dora_scale changes", "not one of SD1.5", "no part of a LoRA"):
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
