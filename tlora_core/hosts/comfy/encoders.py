"""What sees pictures for scores: folders in the transformers layout in the host's clip_vision folders, the host's own
CLIP_VISION objects, and the tiny world's scorer."""

from collections.abc import Sequence
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import TLoRAError
from ...reports.folder_encoder import CLIP_TYPES, DINO_TYPES, FolderEncoder, model_type
from ...reports.picture_scores import Encoder, WholePictureEncoder
from ...tiny.encoder import NAME as TINY_WORLD
from ...tiny.encoder import TinyEncoder

FOLDER = "clip_vision"
NONE = "none"


def encoder_names(types: Sequence[str]) -> list[str]:
    """Names of the folders directly in the clip_vision folders whose config.json names one of `types`."""
    return sorted({folder.name for folder in _folders() if model_type(folder) in types})


def scorer_names() -> list[str]:
    """The options of an input that chooses what scores pictures: none, the tiny world's scorer, and the folders."""
    return [NONE, TINY_WORLD, *encoder_names((*CLIP_TYPES, *DINO_TYPES))]


def load_scorer(name: str) -> Encoder:
    """The encoder that is named by one of `scorer_names`, but for none. Raises like `load_encoder`."""
    return TinyEncoder() if name == TINY_WORLD else load_encoder(name, (*CLIP_TYPES, *DINO_TYPES))


def load_encoder(name: str, types: Sequence[str]) -> FolderEncoder:
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
    return FolderEncoder(found, types, device)


class VisionEncoder(WholePictureEncoder):
    """The host's CLIP_VISION: CLIP, SigLIP or DINOv2, as Load CLIP Vision loads them. clip: the checkpoint's CLIP,
    whose text encoder tells how well pictures follow prompts if it pairs with the image encoder."""

    def __init__(self, vision: ClipVisionModel, clip: CLIP | None = None):
        self.vision = vision
        self.name = f"{vision.model_type}, {vision.config.get('hidden_size')} wide"
        self.why_no_text = "Obedience is not measured: no text encoder that belongs to clip_vision is connected."

    def images(self, pictures: Tensor) -> Tensor:
        found = self.vision.encode_image(pictures)["image_embeds"].float().cpu()
        return normalize(found if found.ndim == 2 else found.mean(1), dim=-1)  # SigLIP gives a vector for each patch

    def follows(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError(self.why_no_text)


def _folders() -> list[Path]:
    parents = [Path(parent) for parent in folder_paths.get_folder_paths(FOLDER)]
    return [folder for parent in parents if parent.is_dir() for folder in sorted(parent.iterdir()) if folder.is_dir()]
