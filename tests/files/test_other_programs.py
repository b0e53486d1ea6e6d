"""Our own file in a program that does not know T-LoRA: the host's Load LoRA, on each family of models."""

import json

import pytest
import torch
from foreign_files import assert_close, update
from host_lora import by_the_host, host_updates, our_updates
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlora_core import LowRank, RankSchedule, TLoRAFile
from tlora_core.files.export import export
from tlora_core.files.layer_names import layer_key

# Family -> layers of those trained by "attention+feed-forward" that the host has a name for, where that is not all of
# them.
FAMILIES = {
    "sdxl": None,
    "sd15": None,
    "sd3": None,
    "flux": None,
    "chroma": None,
    "z-image": None,
    "qwen-image": None,
    "wan": None,
    # The host takes keys and values to have as many heads as queries.
    "lumina2": ("layers.0.attention.qkv@0", "noise_refiner.0.attention.qkv@0"),
    "hunyuan-video": (),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, comfy):
    """(name, MODEL, a T-LoRA on all layers that can be trained by name)."""
    import random_models

    from tlora_core.hosts.comfy.model.families import target_layers

    model = random_models.sdxl(64, (0, 1, 1), 64) if request.param == "sdxl" else random_models.small(request.param)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, layer in target_layers(model, "attention+feed-forward").items():
        rows, columns = layer.shape
        layers[name] = LowRank(
            torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator), 1
        )
    base_model = type(model.model.model_config).__name__.lower()
    return request.param, model, TLoRAFile(layers, "vanilla_tlora", RankSchedule(2, 1), 1.0, "flow", base_model)


def assert_whole(changed, tlora, but=()):
    for name, layer in tlora.layers.items():
        path, row = name.path, name.row
        if name not in but:
            assert_close(changed[path][row : row + len(layer.up)].double(), update(layer, layer.rank))


def test_the_host_loads_all_of_it_as_a_plain_lora_or_the_file_says_so(family, tmp_path):
    name, model, tlora = family
    tlora.save(tmp_path / "a.safetensors")
    changed = host_updates(by_the_host(model, tmp_path / "a.safetensors"))
    known = FAMILIES[name]
    unknown = set() if known is None else {layer for layer in tlora.layers if "@" in layer and layer not in known}
    assert_whole(changed, tlora, unknown)
    if known is None:
        assert tlora.note == ""
    else:
        total = len(tlora.layers)
        assert (
            f"find {total - len(unknown)} of the file's {total} layers" in tlora.note and "Export T-LoRA" in tlora.note
        )
        export(tlora, tmp_path / "b.safetensors", "comfyui", torch.float32)
        assert_whole(host_updates(by_the_host(model, tmp_path / "b.safetensors")), tlora)


def test_we_read_it_back_and_what_earlier_versions_called_its_layers(family, tmp_path):
    _, _, tlora = family
    path = tmp_path / "a.safetensors"
    tlora.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    content = json.loads(metadata["tlora"])
    for name, key in content.pop("keys").items():
        for part in ("lora_up.weight", "lora_down.weight", "alpha"):
            tensors[f"{layer_key(name)}.{part}"] = tensors.pop(f"{key}.{part}")
    save_file(tensors, tmp_path / "b.safetensors", metadata | {"tlora": json.dumps(content)})
    for file in (path, tmp_path / "b.safetensors"):
        again = TLoRAFile.load(file)
        assert again.layers.keys() == tlora.layers.keys()
        assert all(torch.equal(again.layers[name].up, layer.up) for name, layer in tlora.layers.items())


def test_rows_that_are_no_part_of_the_module_get_no_parts_name():
    rows = {"double_blocks.0.img_attn.qkv@3": 6, "double_blocks.1.img_attn.qkv@0": 12, "single_blocks.0.linear1@18": 36}
    layers = {name: LowRank(torch.ones(count, 2), torch.ones(2, 6), 1) for name, count in rows.items()}
    assert "find 0 of the file's 3 layers" in TLoRAFile(layers, "lora", RankSchedule(2, 2), 1.0, "flow", "flux").note


def test_a_trainings_file_says_how_high_the_modules_are_of_which_it_has_parts(comfy):
    from family_checks import Trial, personalization

    trial = Trial("ovis")
    with torch.inference_mode():
        training = personalization(trial, "fast", method="vanilla_tlora")
        training.train(1)
        tlora = training.tlora()
    layers = tlora.layers
    assert tlora.heights == {
        name.path: trial.model.model.diffusion_model.get_submodule(name.path).out_features
        for name in layers
        if name.is_part
    }
    assert tlora.heights["single_blocks.0.linear1"] == 11 * 256  # FLUX.1's has 7 times the width


def test_a_foreign_files_parts_are_exported_to_the_height_of_the_model_it_was_loaded_for(comfy, tmp_path):
    from family_checks import Trial

    from tlora_core.files.foreign import load_any
    from tlora_core.hosts.comfy.model.description import describe_model

    trial = Trial("ovis")
    export(trial.tlora(), tmp_path / "a.safetensors", "diffusers", torch.float32)
    loaded = load_any(tmp_path / "a.safetensors", describe_model(trial.model)).tlora
    export(loaded, tmp_path / "b.safetensors", "kohya", torch.float32)
    changed = host_updates(by_the_host(trial.model, tmp_path / "b.safetensors"))
    torch.testing.assert_close(changed, our_updates(trial.model, trial.tlora()))
