"""Fills in the Train node's defaults before the run, from the header of the model file."""

import functools
import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import folder_paths
import torch
from torch import nn

from .... import tiny
from ....errors import TLoRAError
from ....method.adapters import METHODS
from ....tiny.comfy import unet_config
from ....training.optimizers import STATE_SIZES
from ..model.defaults import Defaults, defaults_of
from ..model.families import layers_among
from ..training.personalize import completed

# The host's loaders of model files: {node: (folder, input)}.
LOADERS = {"CheckpointLoaderSimple": ("checkpoints", "ckpt_name"), "UNETLoader": ("diffusion_models", "unet_name")}
TINY = "TLoRATinyBaseModel"
_MOST_HEADER = 1 << 27  # bytes; a header is a few hundred KB


@dataclass(frozen=True)
class KnownModel:
    """defaults: of its kind. linear: its linear layers by module path, on the meta device. weight_bytes: size of all
    its weights, with at most two bytes per number, because a GPU gets float32 weights in half precision."""

    defaults: Defaults
    linear: Mapping[str, nn.Linear]
    weight_bytes: int


def plan(loader: str, file: str, fields: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings and the least memory of a training with these inputs, as JSON values. None if the loader does not
    tell the model.

    loader, file: the node that the model comes from, and the file that it loads. fields, config: as in
        `personalize.filled_in`.
    Raises TLoRAError for invalid inputs.
    """
    path = _path_of(loader, file)
    known = None if path is None else _known(path, path.stat().st_mtime_ns, loader == TINY)
    if known is None:
        return None
    request = completed(known.defaults, config, **fields)
    schedule = request.schedule
    layers = layers_among(known.linear, request.layers, "model")
    device = comfy.model_management.get_torch_device()
    shapes = [layer.shape for layer in layers.values()]
    return {
        "steps": request.config.steps,
        "learning_rate": request.config.learning_rate,
        "optimizer": request.config.optimizer,
        "resolution": request.resolution,
        "method": request.method,
        "rank": schedule.rank,
        "min_rank": schedule.min_rank,
        "layers": len(layers),
        "guidance": known.defaults.guidance._asdict(),
        "least_bytes": known.weight_bytes
        + adapter_bytes(request.method, shapes, schedule.rank, request.config.optimizer),
        # Of these, the weights that may stay in RAM: those of a model that is not on the CPU anyway.
        "streamable_bytes": 0 if comfy.model_management.is_device_cpu(device) else known.weight_bytes,
        "device_bytes": comfy.model_management.get_total_memory(device),
    }


def adapter_bytes(method: str, shapes: Collection[tuple[int, int]], rank: int, optimizer: str) -> int:
    """Bytes that the adapters of layers of these shapes hold in a step: float32 factors, their gradients, the
    optimizer's state and, for an orthogonal start, the start, of whose factors A and B are in half precision. 0 for
    methods that are not low-rank."""
    if METHODS[method].of_weight:
        return 0
    orthogonal = METHODS[method].is_orthogonal
    factors = sum(rank * sum(shape) for shape in shapes)
    scales = sum(rank * orthogonal for _ in shapes)
    trained = 4 * (factors + scales) * (2 + STATE_SIZES[optimizer])
    return int(trained + orthogonal * (2 * factors + 4 * scales))


def _path_of(loader: str, file: str) -> Path | None:
    """The model file's path. Names are only looked up in the host's lists."""
    if loader == TINY:
        return Path(tiny.__file__).parent / "weights" / "tiny_base.safetensors"
    folder, _ = LOADERS.get(loader, ("", ""))
    path = (
        folder_paths.get_full_path(folder, file) if folder and file in folder_paths.get_filename_list(folder) else None
    )
    return Path(path) if path and path.endswith((".safetensors", ".sft")) else None


@functools.lru_cache(8)
def _known(path: Path, _changed: int, is_tiny: bool) -> KnownModel | None:
    tensors, sizes = _header(path)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    config = unet_config() if is_tiny else comfy.model_detection.model_config_from_unet(tensors, prefix)
    if config is None:
        return None
    linear = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix) and name.endswith(".weight") and tensor.ndim == 2:
            rows, columns = tensor.shape
            linear[name[len(prefix) : -len(".weight")]] = nn.Linear(columns, rows, bias=False, device="meta")
    weight_bytes = sum(min(size, 2 * tensors[name].numel()) for name, size in sizes.items() if name.startswith(prefix))
    return KnownModel(defaults_of(config), linear, weight_bytes)


def _header(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """(tensors on the meta device, their sizes in bytes), both by name. Empty if it is not a safetensors file."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(min(length, _MOST_HEADER)))
        entries.pop("__metadata__", None)
        sizes = {
            name: end - start
            for name, (start, end) in ((name, entry["data_offsets"]) for name, entry in entries.items())
        }
        return {name: torch.empty(entry["shape"], device="meta") for name, entry in entries.items()}, sizes
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RuntimeError):
        return {}, {}


def asked_plan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a page that sends a node's inputs and its loader: the plan, {} if the model is unknown, or
    {"wrong": sentence}."""
    try:
        names = ("token", "class_word", "method", "rank", "min_rank", "alpha", "curve", "start", "resolution", "layers")
        fields = {name: values[name] for name in names}
        config = {name: values[name] for name in ("steps", "learning_rate", "batch_size", "seed", "optimizer")}
        return plan(str(values["loader"]), str(values["file"]), fields, config) or {}
    except TLoRAError as error:
        return {"wrong": str(error)}
