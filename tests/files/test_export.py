"""T-LoRAs in the layouts of other programs, read back the same; parts of fused layers."""

from pathlib import Path

import pytest
import torch
from foreign_files import (
    RANK,
    assert_close,
    assert_same_updates,
    load_of,
    pairs,
    reference_flux,
    update,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlora_core import RankSchedule, TLoRAError, TLoRAFile
from tlora_core.files.atomic import numbered
from tlora_core.files.export import LAYOUTS, export, fused
from tlora_core.files.foreign import load_any
from tlora_core.method.adapters import LowRank


@pytest.mark.parametrize("kind", ["orthogonal", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_read_back_the_same(tmp_path, kind, layout):
    tlora = load_of(kind, tmp_path)
    path = export(tlora, tmp_path / "out.safetensors", layout, torch.float32)
    loaded = load_any(path).tlora
    if layout == "reference":
        assert (loaded.method, loaded.schedule) == (tlora.method, tlora.schedule)
        assert_same_updates(loaded, tlora)
        return
    assert loaded.method == "lora" and "tlora" not in safe_open(path, "pt").metadata()
    assert loaded.layers.keys() == tlora.layers.keys()
    for name, layer in tlora.layers.items():
        assert_close(update(loaded.layers[name], loaded.layers[name].rank), update(layer, layer.rank))


def test_a_dot_stays_in_the_names_of_parts():
    assert [numbered(Path(name), 2).name for name in ("dog_v1.5.safetensors", "dog_v1.5", "dog")] == [
        "dog_v1.5part2.safetensors",
        "dog_v1.5part2",
        "dogpart2",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flux_rows_are_exported_and_read_back(tmp_path, layout):
    torch.save(reference_flux()[0], tmp_path / "lora.pt")
    tlora = load_any(tmp_path / "lora.pt").tlora
    loaded = load_any(export(tlora, tmp_path / "out.safetensors", layout, torch.float32)).tlora
    if layout in ("diffusers", "reference"):
        assert_same_updates(loaded, tlora)
        return
    if layout == "comfyui":  # the host has names for the parts, whatever the module holds besides
        assert loaded.layers.keys() == tlora.layers.keys()
        for name, layer in tlora.layers.items():
            assert_close(update(loaded.layers[name], loaded.layers[name].rank), update(layer, layer.rank))
        return
    # One update of the whole fused module, which holds the same at the same rows.
    whole = {name: update(layer, layer.rank) for name, layer in loaded.layers.items()}
    for name, layer in tlora.layers.items():
        path, _, row = name.partition("@")
        row = int(row or 0)
        assert_close(whole[path][row : row + 6], update(layer, layer.rank))
    assert whole["single_blocks.3.linear1"].shape == (42, 6) and not whole["single_blocks.3.linear1"][18:].any()


def test_our_own_file_of_flux_rows_has_names_that_others_read(comfy, tmp_path):
    import comfy.utils

    torch.save(reference_flux()[0], tmp_path / "lora.pt")
    tlora = load_any(tmp_path / "lora.pt").tlora
    tlora.save(tmp_path / "a.safetensors")
    assert_same_updates(TLoRAFile.load(tmp_path / "a.safetensors"), tlora)
    table = comfy.utils.flux_to_diffusers({"depth": 1, "depth_single_blocks": 4, "hidden_size": 6})
    known = {"lora_transformer_" + name.removesuffix(".weight").replace(".", "_") for name in table}
    assert {key.split(".")[0] for key in load_file(tmp_path / "a.safetensors")} <= known


def test_a_fused_update_is_split_for_diffusers(tmp_path):
    layers = pairs([("double_blocks.0.img_attn.qkv", 18, 6), ("single_blocks.3.linear1", 42, 6)])
    state = {}
    for name, (up, down) in layers.items():
        state[f"diffusion_model.{name}.lora_up.weight"], state[f"diffusion_model.{name}.lora_down.weight"] = up, down
    save_file(state, tmp_path / "a.safetensors")
    written = load_any(
        export(load_any(tmp_path / "a.safetensors").tlora, tmp_path / "b.safetensors", "diffusers", torch.float32)
    )
    for name, layer in written.tlora.layers.items():
        path, _, row = name.partition("@")
        up, down = layers[path]
        assert_close(update(layer, RANK), (up.double() @ down.double())[int(row) : int(row) + len(layer.up)])
    assert len(written.tlora.layers) == 7


# The second path occurs in U-Nets with one residual block a level, like the tiny base's.
@pytest.mark.parametrize("path", ["blocks.0", "input_blocks.3.1.transformer_blocks.0.attn1.to_q"])
def test_a_layer_without_a_name_in_the_layout_is_refused_and_nothing_is_written(tmp_path, path):
    save_file(
        {
            f"diffusion_model.{path}.lora_up.weight": torch.ones(4, 2),
            f"diffusion_model.{path}.lora_down.weight": torch.ones(2, 4),
        },
        tmp_path / "a.safetensors",
    )
    tlora = load_any(tmp_path / "a.safetensors").tlora
    for layout in ("diffusers", "reference"):
        with pytest.raises(TLoRAError, match=f'"{path}" is not known; choose the layout kohya'):
            export(tlora, tmp_path / "out.safetensors", layout)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "base_model, path, parts, height",
    [
        ("flux", "single_blocks.0.linear1", {0: 6, 6: 6, 12: 6}, 42),
        ("flux2", "single_blocks.0.linear1", {0: 6, 6: 6, 12: 6}, 54),
        ("lumina2", "layers.0.attention.qkv", {0: 6, 6: 2, 8: 2}, 10),
        ("flux", "double_blocks.0.img_attn.qkv", {6: 6}, 18),
        ("hunyuandit", "blocks.0.attn1.Wqkv", {0: 6, 6: 6, 12: 6}, 18),
        ("hunyuandit", "blocks.0.attn2.kv_proj", {0: 8, 8: 8}, 16),
        ("pixartsigma", "blocks.0.cross_attn.kv_linear", {0: 6, 6: 6}, 12),
        ("minimaxh3", "blocks.0.attn.qkv_proj", {0: 6, 6: 9, 15: 9}, 24),  # as earlier versions cut it
    ],
)
def test_a_fused_module_has_the_height_that_it_has_in_the_model(base_model, path, parts, height):
    layers = {f"{path}@{row}": LowRank(torch.ones(rows, 2), torch.ones(2, 6), 1) for row, rows in parts.items()}
    (whole,) = fused(TLoRAFile(layers, "lora", RankSchedule(2, 2), 1.0, "flow", base_model)).values()
    assert whole.up.shape == (height, 2 * len(parts))


def test_a_fused_module_is_as_high_as_the_file_says():
    layers = {"blocks.0.mixed@4": LowRank(torch.ones(2, 2), torch.ones(2, 6), 1)}
    heights = {"blocks.0.mixed": 50}
    tlora = TLoRAFile(layers, "lora", RankSchedule(2, 2), 1.0, "flow", "tomorrows", heights=heights)
    (whole,) = fused(tlora).values()
    assert whole.up.shape == (50, 2) and whole.up[4:6].all() and whole.up.count_nonzero() == 4


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("heights", [{}, {"layers.0.attention.qkv": 7}])
def test_a_fused_module_of_unknown_height_is_refused_without_sending_on(tmp_path, layout, heights):
    """Also by the note of the file itself, which names no layout that would be refused."""
    layers = {"layers.0.attention.qkv@6": LowRank(torch.ones(2, 2), torch.ones(2, 6), 1)}
    tlora = TLoRAFile(layers, "lora", RankSchedule(2, 2), 1.0, "flow", "lumina2", heights=heights)
    assert "find 0 of the file's 1 layers" in tlora.note and "Export" not in tlora.note
    with pytest.raises(TLoRAError, match="size of the module .*layers.0.attention.qkv") as caught:
        export(tlora, tmp_path / "a.safetensors", layout)
    assert "layout" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name, rows",
    [
        ("double_blocks.0.img_attn.qkv@9", 6),
        ("double_blocks.0.img_attn.qkv@0", 12),
        ("double_blocks.0.img_attn.qkv@600", 6),
        ("single_blocks.0.linear1@36", 12),
        ("single_blocks.0.linear1", 54),
    ],
)
def test_rows_that_no_name_stands_for_are_never_exported_as_others(tmp_path, layout, name, rows):
    """Of a file by hand, or of a FLUX.2, whose feed-forward is larger."""
    whole = "@" not in name
    layers = {name: LowRank(torch.randn(rows, 2), torch.randn(2, 6), 1)}
    tlora = TLoRAFile(layers, "lora", RankSchedule(2, 2), 1.0, "flow", "flux2" if rows == 54 else "flux")
    try:
        path = export(tlora, tmp_path / "a", layout, torch.float32)
    except TLoRAError:
        return
    assert layout in ("kohya", "comfyui")
    (layer,) = load_any(path).tlora.layers.values()
    first = int(name.partition("@")[2] or 0)
    assert whole or not update(layer, layer.rank)[:first].any()
    assert_close(update(layer, layer.rank)[first : first + rows], update(layers[name], 2))
