"""Where T-LoRA files live in the host: its loras folders, and nothing outside them."""
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher

from ..errors import TLoRAError
from ..foreign import Loaded, load_any
from ..writing import EXTENSION
from .progress import counting
from .targets import target_of

READABLE = (EXTENSION, ".sft", ".pt", ".bin")  # the reference writes FLUX checkpoints as lora.pt, older diffusers its LoRAs as .bin


def lora_names() -> list[str]:
    """The files of the loras folders that may be a LoRA, with their sub-folders, as the host lists them."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(READABLE)]


def lora_path(name: str) -> Path:
    """Where a file of the loras list lies. Raises TLoRAError when it is not there any more, and for a name that climbs out."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise TLoRAError(f'file: "{name}" is not in the loras folders any more; press R to refresh the list and choose another.')
    return Path(path)


def load_lora(name: str, model: ModelPatcher | None, node_id: str | None, min_rank: int | None = None,
              alpha: float | None = None) -> Loaded:
    """Reads a file of the loras folders by its name, for `model` where given; see foreign.load_any. What did not fit is logged."""
    path = lora_path(name)
    target = None if model is None else target_of(model)
    loaded = load_any(path, target, min_rank, alpha, counting("making the base terms again", node_id))
    if loaded.unmatched or loaded.notes:
        logging.warning("[T-LoRA] %s\n%s", path.name, loaded.report)
    return loaded


def file_stamp(name: str) -> str:
    """Changes when the file of this name does."""
    stat = lora_path(name).stat()
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def new_lora_path(prefix: str) -> Path:
    """A path in the first loras folder that no file has yet: `prefix`, which may name a sub-folder, with a number. Makes the sub-folder.

    Raises TLoRAError, naming file_name, for a prefix that leaves the folder or that no file or folder can have here.
    """
    folder = folder_paths.get_folder_paths("loras")[0]
    wanted = prefix.strip().replace("\\", "/")  # a workflow made on Windows names the same file here
    if not wanted or wanted.endswith("/"):
        raise TLoRAError(f'file_name is "{prefix}"; give a name such as "tlora/sks_dog".')
    try:
        parent, stem, counter, _, _ = folder_paths.get_save_image_path(wanted, folder)
    except OSError as error:
        raise _cannot_be_made(prefix, error) from error
    except Exception as error:  # the host raises a bare Exception
        raise TLoRAError(f'file_name is "{prefix}", which leaves the loras folder; give a name such as "tlora/sks_dog".') from error
    path = Path(parent) / f"{stem}_{counter:05}_{EXTENSION}"
    try:
        os.lstat(path)  # asked now, as a name that is too long would only be noticed when the file is there to be named
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        raise _cannot_be_made(prefix, error) from error
    return path


def _cannot_be_made(prefix: str, error: Exception) -> TLoRAError:
    reason = getattr(error, "strerror", None) or error
    return TLoRAError(f'file_name is "{prefix[:300]}", which cannot be made here ({reason}); give a short name such as "tlora/sks_dog".')


def runs_folder() -> Path:
    """Where the folders of training runs are: tlora_runs in the host's output folder."""
    folder = Path(folder_paths.get_output_directory()) / "tlora_runs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def class_pictures_folder() -> Path:
    """Where pictures of classes are kept for prior preservation: tlora_class_pictures in the host's output folder."""
    return Path(folder_paths.get_output_directory()) / "tlora_class_pictures"


def name_of(path: Path) -> str:
    """The name by which the host's loaders list a file that `new_lora_path` made: with the system's own separators, as there."""
    return str(path.relative_to(folder_paths.get_folder_paths("loras")[0]))


def told_of(names: Sequence[str], text: str) -> dict[str, list[str]]:
    """What a node that saved files of these names shows, and tells the page, whose lists are to have them."""
    return {"tlora_files": [str(lora_path(name)) for name in names], "tlora_names": list(names), "text": [text]}
