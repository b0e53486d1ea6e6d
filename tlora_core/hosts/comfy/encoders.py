"""What sees pictures for scores: folders in the transformers layout in the host's clip_vision folders, the host's own
CLIP_VISION objects, and the tiny world's scorer."""

from collections.abc import Sequence
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.clip_model import clip_preprocess
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


def load_scorer(name: str, on_cpu: bool = False) -> Encoder:
    """The encoder that is named by one of `scorer_names`, but for none. Raises like `load_encoder`."""
    return TinyEncoder() if name == TINY_WORLD else load_encoder(name, (*CLIP_TYPES, *DINO_TYPES), on_cpu)


def load_encoder(name: str, types: Sequence[str], on_cpu: bool = False) -> FolderEncoder:
    """Loads an encoder to the host's device, or to the CPU, where it takes no memory of the card. Raises TLoRAError if
    `name` is not a listed folder, so no other path can be opened."""
    found = next((folder for folder in _folders() if folder.name == name and model_type(folder) in types), None)
    if found is None:
        raise TLoRAError(
            f'"{name}" is no longer in the folder models/{FOLDER}; press R to refresh the list and choose another.'
        )
    if on_cpu:
        return FolderEncoder(found, types)
    device = comfy.model_management.get_torch_device()
    size = sum(file.stat().st_size for file in (*found.glob("*.safetensors"), *found.glob("*.bin")))
    comfy.model_management.free_memory(size, device)
    return FolderEncoder(found, types, device)


class VisionEncoder(WholePictureEncoder):
    """The host's CLIP_VISION: CLIP, SigLIP, DINOv2 or DINOv3, as Load CLIP Vision loads them. clip: the checkpoint's
    CLIP, whose text encoder tells how well pictures follow prompts if it pairs with the image encoder."""

    def __init__(self, vision: ClipVisionModel, clip: CLIP | None = None):
        self.vision = vision
        self.name = f"{vision.model_type}, {vision.config.get('hidden_size')} wide"
        self.texts = paired_text(self, clip)
        self.why_no_text = (
            ""
            if self.texts
            else (
                "Obedience is not measured, as clip_vision is no image encoder of the CLIP whose text encoder the "
                "checkpoint has."
            )
        )

    @property
    def projection(self) -> int:
        """The length of the vectors that pictures share with texts; 0 for an encoder that knows no texts."""
        # SigLIP and DINOv2 have none, or a function in its place.
        return getattr(getattr(self.vision.model, "visual_projection", None), "out_features", 0)

    @torch.inference_mode()
    def images(self, pictures: Tensor) -> Tensor:
        found = self._vectors(pictures).float().cpu()
        return normalize(found if found.ndim == 2 else found.mean(1), dim=-1)  # SigLIP gives a vector for each patch

    def _vectors(self, pictures: Tensor) -> Tensor:
        vision = self.vision
        if vision.model_type != "dinov3":
            return vision.encode_image(pictures)["image_embeds"]
        # The host's encode_image (0.30.0) fails, as it moves hidden states that this model does not give.
        comfy.model_management.load_model_gpu(vision.patcher)
        size, mean, std = vision.image_size, vision.image_mean, vision.image_std
        return vision.model(clip_preprocess(pictures.to(vision.load_device), size, mean, std).float())[2]

    def follows(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.texts is None:
            raise TLoRAError(self.why_no_text)
        return (self.seen(pictures) * self.texts(prompts)).sum(1)


def paired_text(encoder: VisionEncoder, clip: CLIP | None) -> "Texts | None":
    """The text encoder in `clip` that was trained together with the image encoder; None if there is none.

    One whose vectors have the same length may be another's, trained further, or without its projection, which some
    checkpoints leave out and the host then leaves uninitialised. So it counts only if it tells plain colours apart."""
    if clip is None or not encoder.projection:
        return None
    for name in ("l", "g", "h"):
        inner = getattr(clip.cond_stage_model, f"clip_{name}", None)
        projection = getattr(getattr(inner, "transformer", None), "text_projection", None)
        if getattr(projection, "out_features", 0) == encoder.projection:
            texts = Texts(clip, name)
            if tells_colours_apart(encoder, texts):
                return texts
    return None


class Texts:
    """The CLIP text encoder `name` ("l", "g" or "h") of a CLIP of the host: prompts to unit vectors [N, d], float32 on
    the CPU, with its text projection."""

    def __init__(self, clip: CLIP, name: str):
        self.clip, self.name = clip, name

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        self.clip.load_model()
        transformer = getattr(self.clip.cond_stage_model, f"clip_{self.name}").transformer
        device = self.clip.patcher.load_device
        found = []
        for prompt in prompts:
            # The first part, if it is so long that the host splits it.
            tokens = self.clip.tokenize(prompt)[self.name][0]
            ids = torch.tensor([[pair[0] for pair in tokens]], device=device)
            found.append(normalize(transformer(ids)[2].float().cpu(), dim=-1))
        return torch.cat(found)


COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 0.6, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "black": (0, 0, 0),
    "white": (1, 1, 1),
}


def tells_colours_apart(encoder: VisionEncoder, texts: Texts) -> bool:
    """Whether plain pictures are nearer to the texts that name their colours than to others, with the mean of each text
    taken off: for all but one of COLOURS, which chance does once in 1500."""
    pictures = torch.tensor(list(COLOURS.values())).reshape(-1, 1, 1, 3).expand(-1, 64, 64, 3)
    cosines = encoder.images(pictures) @ texts([f"a plain {name} picture" for name in COLOURS]).T
    right = (cosines - cosines.mean(0)).argmax(1) == torch.arange(len(COLOURS))
    return int(right.sum()) >= len(COLOURS) - 1


def _folders() -> list[Path]:
    parents = [Path(parent) for parent in folder_paths.get_folder_paths(FOLDER)]
    return [folder for parent in parents if parent.is_dir() for folder in sorted(parent.iterdir()) if folder.is_dir()]
