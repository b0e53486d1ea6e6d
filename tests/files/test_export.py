"""T-LoRAs in the layouts of other programs, read back the same."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign_files import (
    RANK,
    assert_close,
    assert_same_updates,
    orthogonal_parts,
    pairs,
    reference_flux,
    reference_orthogonal,
    reference_plain,
    unused_of_single_blocks,
    update,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlora_core import RankSchedule, TLoRAError, TLoRAFile
from tlora_core.files.atomic import numbered
from tlora_core.files.export import LAYOUTS, export, fused
from tlora_core.files.foreign import load_any
from tlora_core.method.adapters import LowRank


def made_in(folder):
    folder.mkdir()
    return folder


def load_of(name, tmp_path):
    state, path = (
        {"orthogonal": reference_orthogonal, "plain": reference_plain}[name]()[0],
        tmp_path / f"{name}.safetensors",
    )
    save_file(state, path)
    return load_any(path, min_rank=2, alpha=1.5).tlora


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


@pytest.mark.parametrize("moved", [1e-3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_reference_export_of_a_small_update_survives_half_precision(tmp_path, moved, dtype, tolerance):
    from tlora_core.files.foreign.orthogonal import as_low_rank

    parts = orthogonal_parts(12, 12, moved=moved)
    layer = as_low_rank(*(tuple(part.float() for part in triple) for triple in parts))
    tlora = TLoRAFile(
        {"middle_block.1.transformer_blocks.0.attn1.to_q": layer}, "tlora", RankSchedule(4, 2), 1000, "discrete", "sdxl"
    )
    loaded = load_any(export(tlora, tmp_path / "out", "reference", dtype)).tlora
    assert_same_updates(loaded, tlora, tolerance)


def test_reference_export_names_the_tensors_as_the_reference_does(tmp_path):
    tlora = load_of("orthogonal", tmp_path)
    state, _ = reference_orthogonal()
    written = load_file(export(tlora, tmp_path / "out", "reference"))
    assert {key: tensor.shape for key, tensor in written.items()} == {
        key.removeprefix("unet."): tensor.shape for key, tensor in state.items()
    }


def as_the_reference_loads(attention, path, widths, rank, orthogonal):
    """Adapters loaded as the reference's inference does: strictly, into one for each projection of each attention of
    the model."""
    from diffusers.loaders import AttnProcsLayers
    from torch import nn

    def term(names, rows, columns):
        down, up, size = names
        parts = {down: nn.Linear(columns, rank, bias=False), up: nn.Linear(rank, rows, bias=False)}
        return nn.ModuleDict(parts), size

    def adapter(rows, columns):
        if not orthogonal:
            return term(("down", "up", None), rows, columns)[0]
        both = nn.ModuleDict()
        for names in (("q_layer", "p_layer", "lambda_layer"), ("base_q", "base_p", "base_lambda")):
            parts, size = term(names, rows, columns)
            both.update(parts)
            both.register_parameter(size, nn.Parameter(torch.ones(1, rank)))
        return both

    processors = {
        name: nn.ModuleDict({f"{projection}_lora": adapter(*shape) for projection, shape in widths(name).items()})
        for name in attention
    }
    layers = AttnProcsLayers(processors)
    layers.load_state_dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))
    return layers.state_dict()


@pytest.fixture(scope="module")
def sdxl_attention():
    """Names of SDXL's attention processors -> their widths."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    modules = dict(unet.named_modules())
    return {
        name: {
            f"to_{x}": tuple((attention.to_out[0] if x == "out" else getattr(attention, f"to_{x}")).weight.shape)
            for x in ("q", "k", "v", "out")
        }
        for name in unet.attn_processors
        for attention in [modules[name.removesuffix(".processor")]]
    }


@pytest.mark.parametrize("method", ["tlora", "vanilla_tlora"])
def test_the_reference_loads_its_sdxl_layout_strictly(tmp_path, sdxl_attention, method):
    group = 2 if method == "tlora" else 1
    name = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"  # the one layer trained; the rest is as it was
    layers = {name: LowRank(torch.randn(640, 2 * group), torch.randn(2 * group, 2048), group)}
    tlora = TLoRAFile(layers, method, RankSchedule(2, 1, 1.5), 1000, "discrete", "sdxl", "sks", "dog")
    path = export(tlora, tmp_path / "out", "reference", torch.float32)
    state = as_the_reference_loads(sdxl_attention, path, sdxl_attention.get, 2, group == 2)
    trained = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora."
    ups = {key: tensor for key, tensor in state.items() if key.endswith(("up.weight", "p_layer.weight"))}
    assert len(ups) == 560 and {key.rpartition("_lora.")[0] + "_lora." for key, up in ups.items() if up.any()} == {
        trained
    }
    loaded = load_any(path).tlora
    assert_close(update(loaded.layers[name], 2), update(layers[name], 2))
    assert (loaded.method, loaded.schedule) == (method, tlora.schedule)


@pytest.mark.parametrize("method", ["vanilla_tlora", "lora"])
def test_the_reference_loads_its_flux_layout_strictly(tmp_path, method):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        attention = list(FluxTransformer2DModel().attn_processors)
    name = "single_blocks.3.linear1@3072"
    layers = {name: LowRank(torch.randn(3072, 2), torch.randn(2, 3072), 1)}
    tlora = TLoRAFile(
        layers, method, RankSchedule(2, 1 if method == "vanilla_tlora" else 2), 1.0, "flow", "flux", "sks", "dog"
    )
    path = export(tlora, tmp_path / "out", "reference")
    shapes = dict.fromkeys(("to_q", "to_k", "to_v", "to_out", "to_q_proj", "to_k_proj", "to_v_proj"), (3072, 3072))
    state = as_the_reference_loads(attention, path, lambda name: shapes, 2, False)
    assert {key for key, tensor in state.items() if tensor.any()} == {
        f"single_transformer_blocks.3.attn.processor.to_k_lora.{part}.weight" for part in ("up", "down")
    }
    assert load_any(path).tlora.schedule == tlora.schedule


def test_flux_of_another_width_gets_the_unused_tensors_of_its_single_blocks(tmp_path):
    state, _ = reference_flux()
    torch.save(state, tmp_path / "lora.pt")
    written = torch.load(
        export(load_any(tmp_path / "lora.pt").tlora, tmp_path / "out", "reference", torch.float32), weights_only=True
    )
    unused = unused_of_single_blocks(state)
    assert written.keys() == state.keys() | unused.keys()
    assert not any(written[key].any() for key in unused)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_reference_hparams_hold_what_its_inference_asks_for(tmp_path, family):
    import yaml

    if family == "sdxl":
        tlora = load_of("orthogonal", tmp_path)
        wanted = {
            "lora_rank": 4,
            "min_rank": 2,
            "alpha_rank_scale": 1.5,
            "sig_type": "last",
            "trainer_class": "sdxl_tlora",
            "trainer_type": "ortho_lora",
            "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
        }
    else:
        torch.save(reference_flux()[0], tmp_path / "lora.pt")
        tlora = load_any(tmp_path / "lora.pt").tlora
        wanted = {
            "rank": 4,
            "min_rank": 2,
            "tlora": True,
            "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
        }
    path = export(
        replace(tlora, token="sks", class_word="dog", training={"steps": 500}),
        made_in(tmp_path / "it's") / "dog_v1.5",
        "reference",
    )
    hparams = yaml.safe_load((path.parents[1] / "logs" / "hparams.yml").read_text(encoding="utf-8"))
    assert hparams == wanted | {
        "placeholder_token": "sks",
        "class_name": "dog",
        "revision": None,
        "output_dir": str(tmp_path / "it's" / "dog_v1.5"),
    }
    assert Path(hparams["output_dir"], "checkpoint-500", path.name) == path and path.exists()


def test_a_tlora_of_flux_schnell_names_it_as_its_base(tmp_path):
    torch.save(reference_flux()[0], tmp_path / "lora.pt")
    tlora = replace(load_any(tmp_path / "lora.pt").tlora, base_model="fluxschnell")
    path = export(tlora, tmp_path / "out", "reference")
    assert (
        "pretrained_model_name_or_path: black-forest-labs/FLUX.1-schnell\n"
        in (path.parents[1] / "logs" / "hparams.yml").read_text()
    )


@pytest.mark.parametrize("alpha", [1, 0.05, 1e-05, 1.5e-05, 1e16])
def test_an_alpha_of_any_size_is_a_number_to_the_references_inference(tmp_path, alpha):
    import yaml

    tlora = replace(load_of("orthogonal", tmp_path), schedule=RankSchedule(4, 2, alpha))
    path = export(tlora, tmp_path / "out", "reference")
    read = yaml.safe_load((path.parents[1] / "logs" / "hparams.yml").read_text(encoding="utf-8"))["alpha_rank_scale"]
    assert type(read) is float and read == alpha
    assert load_any(path).tlora.schedule == tlora.schedule


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "tlora"}, 'method is "tlora".*only supports vanilla_tlora and lora'),
        ({"schedule": RankSchedule(2, 1, 0.5)}, "alpha is 0.5"),
        ({"base_model": "flux2"}, '"flux2".*only supports SDXL and FLUX.1'),
        ({"schedule": RankSchedule(4, 1)}, "attn.processor.to_out.* rank 2 and the schedule 4"),
    ],
)
def test_what_the_references_code_has_no_place_for_is_refused_in_a_sentence(tmp_path, changes, named):
    group = 2 if "method" in changes else 1
    layers = {"double_blocks.0.img_attn.proj": LowRank(torch.randn(6, 2 * group), torch.randn(2 * group, 6), group)}
    if "rank" in named:
        layers["double_blocks.0.img_attn.qkv@0"] = LowRank(torch.randn(6, 4), torch.randn(4, 6), 1)
    asked = {"method": "vanilla_tlora", "schedule": RankSchedule(2, 1), "base_model": "flux", **changes}
    with pytest.raises(TLoRAError, match=named):
        export(TLoRAFile(layers, num_timesteps=1.0, noise_domain="flow", **asked), tmp_path / "out", "reference")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base_model", ["sd15", "sd20"])
def test_older_unets_are_refused_by_the_references_layout(tmp_path, base_model):
    tlora = replace(load_of("plain", tmp_path), base_model=base_model)
    with pytest.raises(TLoRAError, match=f'"{base_model}".*only supports SDXL and FLUX.1'):
        export(tlora, tmp_path / "out", "reference")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dog_v1.5", "v1.5.dog", "dog_v1.5.safetensors", "dog.pt"])
def test_a_dot_in_the_name_stays_in_it(tmp_path, layout, name):
    path = export(load_of("plain", tmp_path), made_in(tmp_path / "out") / name, layout)
    made = [p.name for p in (tmp_path / "out").iterdir()]
    assert path.exists() and made == [name.removesuffix(".safetensors") if layout == "reference" else name]


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
    ],
)
def test_a_fused_module_has_the_height_that_it_has_in_the_model(base_model, path, parts, height):
    layers = {f"{path}@{row}": LowRank(torch.ones(rows, 2), torch.ones(2, 6), 1) for row, rows in parts.items()}
    (whole,) = fused(TLoRAFile(layers, "lora", RankSchedule(2, 2), 1.0, "flow", base_model)).values()
    assert whole.up.shape == (height, 2 * len(parts))


def test_a_fused_module_whose_height_cannot_be_told_is_refused():
    layers = {"layers.0.attention.qkv@6": LowRank(torch.ones(2, 2), torch.ones(2, 6), 1)}
    with pytest.raises(TLoRAError, match="size of the module .*layers.0.attention.qkv"):
        fused(TLoRAFile(layers, "lora", RankSchedule(2, 2), 1.0, "flow", "lumina2"))


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


def test_a_reference_export_that_fails_leaves_no_folder_behind(tmp_path, monkeypatch):
    def full(*args):
        raise TLoRAError("the disk is full.")

    tlora = load_of("orthogonal", tmp_path)
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(TLoRAError, match="disk is full"):
        patch.setattr(sys.modules["tlora_core.files.reference_layout"], "write_tensors", full)
        export(tlora, tmp_path / "out", "reference")
    assert sorted(tmp_path.iterdir()) == before
    weights = export(tlora, tmp_path / "out", "reference")
    assert weights.exists() and (tmp_path / "out" / "logs" / "hparams.yml").exists()
    with pytest.raises(TLoRAError, match='"out" could not be made'):
        export(tlora, tmp_path / "out", "reference")
