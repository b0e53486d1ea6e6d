"""Names of layers, against the host's own tables and models."""

import pytest
from foreign_files import (
    FLUX_LAYERS,
    SDXL_ATTENTION,
    pairs,
)
from safetensors.torch import save_file

from tlora_core.files.foreign import load_any
from tlora_core.files.layer_names import Place, diffusers_name, layer_of, plain_name


def sdxl_config():
    return {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "model_channels": 320,
    }


def sd15_config():
    return {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "model_channels": 320,
    }


@pytest.mark.parametrize("config", [sdxl_config, sd15_config])
def test_names_of_u_nets_are_the_hosts(comfy, config):
    import comfy.utils

    table = comfy.utils.unet_to_diffusers(config())
    checked = 0
    for name, path in table.items():
        if not name.endswith(".weight") or not any(
            word in name for word in (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net", "proj_")
        ):
            continue
        name, path = name.removesuffix(".weight"), path.removesuffix(".weight")
        assert layer_of(plain_name(name)) == layer_of(plain_name(path)) == Place(path)
        assert diffusers_name(path) == name
        checked += 1
    assert checked > 150


def test_names_of_flux_are_the_hosts(comfy):
    import comfy.utils

    width, checked = 3072, 0
    for name, place in comfy.utils.flux_to_diffusers(
        {"depth": 19, "depth_single_blocks": 38, "hidden_size": width}
    ).items():
        others = ("norm_", ".linear_", "to_qkv_mlp_proj")  # no linear layers, or FLUX.2's
        is_flux2 = any(word in name for word in others) or name.startswith("single_") and ".attn.to_out." in name
        if not name.endswith(".weight") or "_blocks" not in name or is_flux2:
            continue
        key, (_, row, _) = place if isinstance(place, tuple) else (place, (0, None, None))
        path, name = key.removesuffix(".weight"), name.removesuffix(".weight")
        found = layer_of(plain_name(name))
        assert found and found.layer(width) == (path if row is None else f"{path}@{row}"), name
        assert diffusers_name(path, None if row is None else row // width) == name
        assert layer_of(plain_name(path)) == Place(path)
        checked += 1
    assert checked > 300


def test_every_row_of_the_tests_tables_is_a_rule():
    for module, (path, _) in SDXL_ATTENTION.items():
        assert layer_of(plain_name(f"unet.{module}.processor.to_out")) == Place(f"{path}.to_out.0")
    for name, (layer, _, in_features) in FLUX_LAYERS.items():
        assert layer_of(plain_name(name)).layer(in_features) == layer


def test_all_names_the_host_knows_reach_the_model(comfy, tmp_path):
    import comfy.lora
    from host_models import random_unet

    from tlora_core.hosts.comfy.model.description import describe_model
    from tlora_core.hosts.comfy.model.families import target_layers

    model = random_unet()
    description = describe_model(model)
    assert description.noise_domain == "discrete" and description.num_timesteps == 1000
    wanted = {path: tuple(layer.weight.shape) for path, layer in target_layers(model).items()}
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    by_layer: dict[str, set[str]] = {}
    for name, key in keys.items():
        by_layer.setdefault(key.removeprefix("diffusion_model.").removesuffix(".weight"), set()).add(name)
    styles = {
        style: next(name for name in by_layer[next(iter(wanted))] if name.startswith(style))
        for style in ("lora_unet_input", "lora_unet_down", "lycoris_", "unet.", "diffusion_model.", "down_blocks")
    }
    for style in styles:
        layers = pairs(
            [(path, *shape) for path, shape in wanted.items() if any(n.startswith(style) for n in by_layer[path])]
        )
        state = {}
        for path, (up, down) in layers.items():
            key = next(name for name in by_layer[path] if name.startswith(style))
            state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"] = up, down
        save_file(state, tmp_path / "a.safetensors")
        assert load_any(tmp_path / "a.safetensors", description).tlora.layers.keys() == layers.keys() and layers
