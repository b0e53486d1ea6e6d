"""CLIP and DINO models in the host's clip_vision folders, each a folder in the transformers layout."""

from collections.abc import Sequence
from pathlib import Path

import comfy.model_management
import folder_paths

from ...errors import TLoRAError
from ...reports.evaluation import ImageEncoder, model_type

FOLDER = "clip_vision"


def encoder_names(types: Sequence[str]) -> list[str]:
    """Names of the folders directly in the clip_vision folders whose config.json names one of `types`."""
    return sorted({folder.name for folder in _folders() if model_type(folder) in types})


def load_encoder(name: str, types: Sequence[str]) -> ImageEncoder:
    """Loads an encoder to the host's device. Raises TLoRAError if `name` is not a listed folder, so no other path can
    be opened."""
    found = next((folder for folder in _folders() if folder.name == name and model_type(folder) in types), None)
    if found is None:
        raise TLoRAError(
            f'"{name}" is no longer in the folder models/{FOLDER}; press R to refresh the list and choose another.'
        )
    device = comfy.model_management.get_torch_device()
    size = sum(file.stat().st_size for file in (*found.glob("*.safetensors"), *found.glob("*.bin")))
    comfy.model_management.free_memory(size, device)
    return ImageEncoder(found, types, device)


def _folders() -> list[Path]:
    parents = [Path(parent) for parent in folder_paths.get_folder_paths(FOLDER)]
    return [folder for parent in parents if parent.is_dir() for folder in sorted(parent.iterdir()) if folder.is_dir()]
