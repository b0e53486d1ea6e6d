"""Loads models and pictures by name or path with the host's own loader nodes, so that they are what a graph gets."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...errors import TLoRAError, require_choice
from ...tiny import WEIGHTS
from ...tiny import comfy as tiny_base

TINY = "tiny"  # the name of the pack's own model
DEFAULT_DTYPE = "default"
_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".bin", ".pth")
_FOLDERS = {"model": "checkpoints", "unet": "diffusion_models", "clip": "text_encoders", "vae": "vae"}
Files = str | Path


def load_checkpoint(name: Files) -> tuple[ModelPatcher, CLIP | None, VAE | None]:
    """What Load Checkpoint gives for a file of the checkpoints folders or a path; or, for "tiny", the tiny base. Raises
    TLoRAError."""
    if str(name) == TINY:
        return tiny_base.load(str(WEIGHTS))
    with _listed("model", "checkpoints", name) as listed:
        return _node("CheckpointLoaderSimple").load_checkpoint(listed)


def load_unet(name: Files, dtype: str = DEFAULT_DTYPE) -> ModelPatcher:
    """What Load Diffusion Model gives. dtype: one of its weight_dtypes. Raises TLoRAError."""
    node = _node("UNETLoader")
    require_choice("weight_dtype", dtype, node.INPUT_TYPES()["required"]["weight_dtype"][0])
    with _listed("unet", "diffusion_models", name) as listed:
        return node.load_unet(listed, dtype)[0]


def load_clip(names: Sequence[Files], kind: str) -> CLIP:
    """What Load CLIP or DualCLIPLoader gives for one file or two. kind: one of their types. Raises TLoRAError."""
    if len(names) not in (1, 2):
        raise TLoRAError(f"clip names {len(names)} files; give one or two.")
    node = _node("CLIPLoader" if len(names) == 1 else "DualCLIPLoader")
    require_choice("clip_type", kind, node.INPUT_TYPES()["required"]["type"][0])
    with ExitStack() as stack:
        listed = [stack.enter_context(_listed("clip", "text_encoders", name)) for name in names]
        return node.load_clip(*listed, type=kind)[0]


def load_vae(name: Files) -> VAE:
    """What Load VAE gives. Raises TLoRAError."""
    with _listed("vae", "vae", name) as listed:
        return _node("VAELoader").load_vae(listed)[0]


def load_clip_vision(name: Files) -> Any:
    """What Load CLIP Vision gives, a CLIP_VISION. Raises TLoRAError."""
    with _listed("clip_vision", "clip_vision", name) as listed:
        return _node("CLIPVisionLoader").load_clip(listed)[0]


def check_files(parts: Mapping[str, Any]) -> None:
    """Whether the files exist that these parts of a model name: model, unet, clip (one or several) and vae. Raises
    TLoRAError."""
    for name, kind in _FOLDERS.items():
        given = parts.get(name) or ()
        for file in [given] if isinstance(given, Files) else given:
            if (name, str(file)) != ("model", TINY):
                with _listed(name, kind, file):
                    pass


def load_picture(path: Files, name: str = "image") -> Tensor:
    """What Load Image gives for a file anywhere: [N, H, W, 3] in 0..1. name: of the input. Raises TLoRAError."""
    with _seen_as_input(path, name) as file:
        return _node("LoadImage").load_image(file)[0]


def load_mask(path: Files) -> Tensor:
    """A mask [N, H, W] in 0..1 from a file that is white where the subject is: what Load Image (as Mask) gives for the
    channel red. Raises TLoRAError."""
    with _seen_as_input(path, "mask") as file:
        return _node("LoadImageMask").load_image_mask(file, "red")[0]


def _node(name: str) -> Any:
    # By its name as text: the pack has a package of that name too, which no code of the library may import.
    return getattr(importlib.import_module("nodes"), name)()


@contextmanager
def _listed(name: str, kind: str, file: Files) -> Iterator[str]:
    """Within the block, the host's loaders find a file under the name that this gives: it is in the host's folders of
    that kind, or it is a path, whose disk becomes one of them for so long. name: of the input."""
    path = Path(file).expanduser()
    if path.suffix.lower() not in _ENDINGS:
        raise TLoRAError(
            f'{name} is "{file}"; give a file that ends in {", ".join(_ENDINGS)}. Other kinds need the node that loads '
            "them: use them in a workflow."
        )
    if path.is_file():
        folders = folder_paths.folder_names_and_paths[kind][0]
        before = list(folders)
        # From its root, because two files in several folders may have one name.
        folders[:] = [path.absolute().anchor, *before]
        try:
            yield str(path.absolute().relative_to(path.absolute().anchor))
        finally:
            folders[:] = before
        return
    if folder_paths.get_full_path(kind, str(file)) is None:
        folders = ", ".join(folder_paths.get_folder_paths(kind))
        raise TLoRAError(f'{name} is "{file}", which is neither a file nor in {folders}; check the name.')
    yield str(file)


@contextmanager
def _seen_as_input(file: Files, name: str) -> Iterator[str]:
    """Within the block, the file is in the host's input folder, outside which its nodes load nothing. Gives its
    name."""
    path, before = Path(file).expanduser(), folder_paths.get_input_directory()
    if not path.is_file():
        raise TLoRAError(f'{name} is "{file}", and there is no such file; check the path.')
    folder_paths.set_input_directory(str(path.absolute().parent))
    try:
        yield path.name
    except Exception as error:
        raise TLoRAError(f'{name} is "{file}", which ComfyUI cannot read as a picture ({error}).') from error
    finally:
        folder_paths.set_input_directory(before)
