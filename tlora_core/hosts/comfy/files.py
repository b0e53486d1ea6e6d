"""Where T-LoRA files live in the host: its loras folders, and nothing outside them."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath

import folder_paths
from comfy.model_patcher import ModelPatcher

from ...errors import TLoRAError
from ...files.atomic import EXTENSION
from ...files.foreign import Loaded, load_any
from ...training.run_folder import as_file_name
from .model.targets import target_of
from .progress import counting
from .room import LORAS_ADVICE, REFUSED, RUNS_ADVICE, refusal

READABLE = (
    EXTENSION,
    ".sft",
    ".pt",
    ".bin",
)  # the reference writes FLUX checkpoints as lora.pt, older diffusers its LoRAs as .bin


def lora_names() -> list[str]:
    """The files of the loras folders that may be a LoRA, with their sub-folders, as the host lists them."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(READABLE)]


def lora_path(name: str) -> Path:
    """Where a file of the loras list lies. Raises TLoRAError when it is not there any more, and for a name that climbs
    out."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise TLoRAError(
            f'file: "{name}" is not in the loras folders any more; press R to refresh the list and choose another.'
        )
    return Path(path)


def load_lora(
    name: str, model: ModelPatcher | None, node_id: str | None, min_rank: int | None = None, alpha: float | None = None
) -> Loaded:
    """Reads a file of the loras folders by its name, for `model` where given; see foreign.load_any. What did not fit is
    logged."""
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
    """A path in the first loras folder that no file has yet: `prefix`, which may name a sub-folder, with a number.
    Makes the sub-folder. Links to folders are followed, as the host's list of files follows them.

    Raises TLoRAError, naming file_name, for a prefix that climbs out of the folder or that no file or folder can have
    here.
    """
    parts = _parts(prefix)
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    try:
        for part in parts[:-1]:
            folder = folder / _with_date(part, folder)
            _require_target(prefix, folder)
        path = new_path(folder, parts[-1], EXTENSION)
        os.lstat(path)  # asked now, as a name that is too long would only be noticed when the file is there to be named
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        raise _cannot_be_made(prefix, folder, error) from error
    return path


def new_path(folder: Path, name: str, ending: str) -> Path:
    """A path in `folder`, which is made where it is not there, that no file has yet: `name` with a number, and
    `ending`. Raises OSError."""
    _, stem, counter, _, _ = folder_paths.get_save_image_path(name, str(folder))
    return folder / f"{stem}_{counter:05}_{ending}"


def _parts(prefix: str) -> list[str]:
    """The names that `prefix` is made of, "." and ".." worked out. Raises TLoRAError for a prefix that is no path below
    a folder."""
    wanted = prefix.strip().replace("\\", "/")  # a workflow made on Windows names the same file here
    if not wanted or wanted.endswith(("/", "/.")) or wanted == ".":
        raise TLoRAError(f'file_name is "{prefix}"; give a name such as "tlora/sks_dog".')
    # By the names alone: what lies behind a link is no reason to refuse it, and ".." after a link would lead out of the
    # folder.
    parts = os.path.normpath(wanted).replace("\\", "/").split("/")
    if Path(wanted).anchor or parts[0] in ("..", "."):  # "a/.." is the folder itself
        raise TLoRAError(
            f'file_name is "{prefix}", which leaves the loras folder; give a name such as "tlora/sks_dog".'
        )
    return parts


def _with_date(name: str, folder: Path) -> str:
    """`name` with the host's %year% and the like filled in, by the host itself, one name at a time: of a whole path it
    refuses links."""
    return folder_paths.get_save_image_path(name, str(folder))[1]


def _require_target(prefix: str, folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise TLoRAError(
            f'file_name is "{prefix}", but "{folder}" is a link to "{os.readlink(folder)}", which is not there; '
            f"connect that disk, or "
            "choose another folder."
        )


def _cannot_be_made(prefix: str, folder: Path, error: Exception) -> TLoRAError:
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, OSError) and error.errno in REFUSED:
        return refusal(folder, error, LORAS_ADVICE)
    return TLoRAError(
        f'file_name is "{prefix[:300]}", which cannot be made here ({reason}); give a short name such as '
        f'"tlora/sks_dog".'
    )


def runs_folder() -> Path:
    """Where the folders of training runs are: tlora_runs in the host's output folder. Raises TLoRAError where it cannot
    be made."""
    folder = Path(folder_paths.get_output_directory()) / "tlora_runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(folder, error, RUNS_ADVICE) from error
    return folder


def save_elsewhere(file_name: str, save: Callable[[Path], object]) -> str:
    """Calls `save` with a path in the output folder, else in the temp folder, for a file that the loras folder does not
    take under `file_name`; says where it is now and what to do with it."""
    name = as_file_name(PureWindowsPath(file_name).name, "tlora")  # both separators
    for place, until in (
        (folder_paths.get_output_directory(), ""),
        (folder_paths.get_temp_directory(), " before ComfyUI is closed, which empties that folder"),
    ):
        try:
            path = new_path(Path(place), name, EXTENSION)
            save(path)
            return f'It is kept as "{path}"; move that file to "{folder_paths.get_folder_paths("loras")[0]}"{until}.'
        except (TLoRAError, OSError) as error:
            logging.warning("[T-LoRA] %s", error)
    return (
        "The output folder and the temp folder do not take it either, so it is not kept; free some space before "
        "the next run."
    )


def class_pictures_folder() -> Path:
    """Where pictures of classes are kept for prior preservation: tlora_class_pictures in the host's output folder."""
    return Path(folder_paths.get_output_directory()) / "tlora_class_pictures"


def name_of(path: Path) -> str:
    """The name by which the host's loaders list a file that `new_lora_path` made: with the system's own separators, as
    there."""
    return str(path.relative_to(folder_paths.get_folder_paths("loras")[0]))


def told_of(names: Sequence[str], text: str) -> dict[str, list[str]]:
    """What a node that saved files of these names shows, and tells the page, whose lists are to have them."""
    return {"tlora_files": [str(lora_path(name)) for name in names], "tlora_names": list(names), "text": [text]}
