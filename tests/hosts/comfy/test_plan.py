"""What a page learns about a training before it runs, from the header of the model's file, compared with the real
run."""

import json
import math
import struct

import pytest
import torch

SDXL = {
    "use_checkpoint": False,
    "image_size": 32,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "in_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_head_channels": 64,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}
FIELDS = {
    "token": "sks",
    "class_word": "dog",
    "method": "auto",
    "rank": 64,
    "min_rank": 32,
    "alpha": 1.0,
    "curve": "",
    "start": "last_random",
    "resolution": 0,
    "layers": "attention",
}
CONFIG = {"steps": 0, "learning_rate": 0.0, "batch_size": 1, "seed": 0, "optimizer": "auto"}


@pytest.fixture
def checkpoints(comfy, tmp_path, monkeypatch):
    """The host's checkpoints folder, empty."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def write_header(path, shapes) -> None:
    """A safetensors file without values, since only the header is read."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_sdxl_is_known_from_its_header(checkpoints):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from tlora_core.hosts.comfy.routes.plan import plan

    with torch.device("meta"):
        network = UNetModel(**SDXL)
    write_header(
        checkpoints / "xl.safetensors",
        {f"model.diffusion_model.{name}": p.shape for name, p in network.state_dict().items()},
    )
    told = plan("CheckpointLoaderSimple", "xl.safetensors", FIELDS, CONFIG)
    weights = 2 * sum(p.numel() for p in network.state_dict().values())
    assert 1.0 < (told.pop("least_bytes") - weights) / 1e9 < 2.0 and told.pop("device_bytes") > 0
    assert told.pop("streamable_bytes") == 0, "on the CPU, the weights are where they are"
    assert told == {
        "steps": 800,
        "learning_rate": 1e-4,
        "optimizer": "adamw",
        "resolution": 1024,
        "method": "tlora",
        "rank": 64,
        "min_rank": 32,
        "layers": 560,
        "guidance": {"scale": 5.0, "told": None, "told_in_training": None},
    }
    own = plan(
        "CheckpointLoaderSimple",
        "xl.safetensors",
        {**FIELDS, "method": "lora", "resolution": 768},
        {**CONFIG, "steps": 7},
    )
    assert (own["steps"], own["resolution"], own["method"], own["min_rank"]) == (7, 768, "lora", 64)


def test_weights_may_stay_in_ram_where_the_device_has_memory_of_its_own(comfy, monkeypatch):
    import comfy.model_management

    from tlora_core.hosts.comfy.routes.plan import plan

    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    told = plan("TLoRATinyBaseModel", "", FIELDS, CONFIG)
    assert 0 < told["streamable_bytes"] < told["least_bytes"]


def test_the_tiny_base_is_what_the_run_takes(base):
    from tlora_core.hosts.comfy.model.families import target_layers
    from tlora_core.hosts.comfy.routes.plan import plan
    from tlora_core.hosts.comfy.training.personalize import filled_in

    told, request = plan("TLoRATinyBaseModel", "", FIELDS, CONFIG), filled_in(base[0], CONFIG, **FIELDS)
    assert (
        told["layers"] == len(target_layers(base[0]))
        and told["resolution"] == request.resolution
        and told["method"] == request.method
    )
    assert (told["steps"], told["learning_rate"]) == (request.config.steps, request.config.learning_rate)


@pytest.mark.parametrize("method", ["tlora", "lora"])
def test_bytes_of_adapters_are_those_that_a_training_holds(comfy, method):
    from tlora_core.hosts.comfy.routes.plan import adapter_bytes
    from tlora_core.method.factory import make_adapters

    shapes = {"a": (12, 8), "b": (8, 20), "c": (12, 8)}
    adapters = make_adapters(method, "last_random", shapes, 4, seed=0)
    trained = sum(p.nbytes for p in adapters.parameters())
    kept = sum(b.nbytes for b in adapters.buffers())
    # The parameters, their gradients and two moments; and the start.
    assert adapter_bytes(method, shapes.values(), 4, "adamw") == trained * 4 + kept
    assert adapter_bytes("oft", shapes.values(), 4, "adamw") == 0


def test_unknown_values_are_not_guessed(checkpoints):
    from tlora_core.hosts.comfy.routes.plan import asked_plan, plan

    (checkpoints / "broken.safetensors").write_bytes(b"no header")
    write_header(checkpoints / "other.safetensors", {"model.diffusion_model.unknown.weight": (4, 4)})
    for loader, file in (
        ("CheckpointLoaderSimple", "broken.safetensors"),
        ("CheckpointLoaderSimple", "other.safetensors"),
        ("CheckpointLoaderSimple", "../other.safetensors"),
        ("SomeLoader", "other.safetensors"),
    ):
        assert plan(loader, file, FIELDS, CONFIG) is None
    wrong = asked_plan({**FIELDS, **CONFIG, "min_rank": 65, "loader": "TLoRATinyBaseModel", "file": ""})
    assert wrong == {"wrong": "min_rank is 65; set it to a whole number from 0 to the rank, which is 64."}
