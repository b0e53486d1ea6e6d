"""T-LoRA files in the host's loras folders; no path leads outside them."""

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
from .model.description import describe_model
from .progress import counting
from .room import LORAS_ADVICE, REFUSED, RUNS_ADVICE, refusal

# The reference writes FLUX files as lora.pt, older diffusers writes LoRAs as .bin.
READABLE = (EXTENSION, ".sft", ".pt", ".bin")


def lora_names() -> list[str]:
    """Names of the files in the loras folders that may be LoRAs, with subfolders, as the host lists them."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(READABLE)]


def lora_path(name: str) -> Path:
    """The path of a file in the loras list. Raises TLoRAError if it no longer exists, and for a name that leaves the
    loras folders."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise TLoRAError(
            f'file: "{name}" is no longer in the loras folders; press R to refresh the list and choose another.'
        )
    return Path(path)


def load_lora(
    name: str, model: ModelPatcher | None, node_id: str | None, min_rank: int | None = None, alpha: float | None = None
) -> Loaded:
    """Loads a file of the loras folders by name, for `model` if given; see foreign.load_any. Logs what did not
    match."""
    path = lora_path(name)
    description = None if model is None else describe_model(model)
    loaded = load_any(path, description, min_rank, alpha, counting("rebuilding the base terms", node_id))
    if loaded.unmatched or loaded.notes:
        logging.warning("[T-LoRA] %s\n%s", path.name, loaded.report)
    return loaded


def file_stamp(name: str) -> str:
    """A text that changes when the file does."""
    stat = lora_path(name).stat()
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def new_lora_path(prefix: str) -> Path:
    """An unused path in the first loras folder: `prefix`, which may include a subfolder, with a number. Creates the
    subfolder. Follows links to folders, as the host's file list does.

    Raises TLoRAError, naming file_name, for a prefix that leaves the folder or that no file or folder can have here.
    """
    parts = _parts(prefix)
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    try:
        for part in parts[:-1]:
            folder = folder / _with_date(part, folder)
            _require_target(prefix, folder)
        path = new_path(folder, parts[-1], EXTENSION)
        os.lstat(path)  # now, because a name that is too long would otherwise only fail when the file is saved
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise _cannot_be_made(prefix, folder, error) from error
    return path


def new_path(folder: Path, name: str, ending: str) -> Path:
    """An unused path in `folder`: `name` with a number and `ending`. Creates the folder if needed. Raises OSError."""
    _, stem, counter, _, _ = folder_paths.get_save_image_path(name, str(folder))
    return folder / f"{stem}_{counter:05}_{ending}"


def _parts(prefix: str) -> list[str]:
    """The names in `prefix`, with "." and ".." resolved. Raises TLoRAError for a prefix that is not a path below a
    folder."""
    wanted = prefix.strip().replace("\\", "/")  # so that a workflow from Windows names the same file
    if not wanted or wanted.endswith(("/", "/.")) or wanted == ".":
        raise TLoRAError(f'file_name is "{prefix}"; give a name such as "tlora/sks_dog".')
    # Resolves names only: a link may lead anywhere, and ".." after a link would lead out of the folder.
    parts = os.path.normpath(wanted).replace("\\", "/").split("/")
    if Path(wanted).anchor or parts[0] in ("..", "."):  # "a/.." is the folder itself
        raise TLoRAError(
            f'file_name is "{prefix}", which leaves the loras folder; give a name such as "tlora/sks_dog".'
        )
    return parts


def _with_date(name: str, folder: Path) -> str:
    """`name` with the host's placeholders, such as %year%, filled in. One name at a time: of a whole path the host
    refuses links."""
    return folder_paths.get_save_image_path(name, str(folder))[1]


def _require_target(prefix: str, folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise TLoRAError(
            f'file_name is "{prefix}", but "{folder}" is a link to "{os.readlink(folder)}", which does not exist; '
            "connect that disk, or choose another folder."
        )


def _cannot_be_made(prefix: str, folder: Path, error: Exception) -> TLoRAError:
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, OSError) and error.errno in REFUSED:
        return refusal(folder, error, LORAS_ADVICE)
    return TLoRAError(
        f'file_name is "{prefix[:300]}", which cannot be created here ({reason}); give a short name such as '
        '"tlora/sks_dog".'
    )


def runs_folder() -> Path:
    """The folder of training runs: tlora_runs in the host's output folder. Raises TLoRAError if it cannot be
    created."""
    folder = Path(folder_paths.get_output_directory()) / "tlora_runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(folder, error, RUNS_ADVICE) from error
    return folder


def save_elsewhere(file_name: str, save: Callable[[Path], object]) -> str:
    """Calls `save` with a path in the output folder or else the temp folder, for a file that could not be saved as
    `file_name` in the loras folder. Returns a sentence that says where it is and what to do."""
    name = as_file_name(PureWindowsPath(file_name).name, "tlora")  # splits at both separators
    for place, until in (
        (folder_paths.get_output_directory(), ""),
        (folder_paths.get_temp_directory(), " before you close ComfyUI, which empties that folder"),
    ):
        try:
            path = new_path(Path(place), name, EXTENSION)
            save(path)
            return f'It is saved as "{path}"; move that file to "{folder_paths.get_folder_paths("loras")[0]}"{until}.'
        except (TLoRAError, OSError) as error:
            logging.warning("[T-LoRA] %s", error)
    return "It could not be saved in the output or temp folder either and is lost; free some space before the next run."


def class_pictures_folder() -> Path:
    """The folder of class pictures for prior preservation: tlora_class_pictures in the host's output folder."""
    return Path(folder_paths.get_output_directory()) / "tlora_class_pictures"


def name_of(path: Path) -> str:
    """The name under which the host's loaders list a file at a `new_lora_path`, with the system's separators."""
    return str(path.relative_to(folder_paths.get_folder_paths("loras")[0]))


def told_of(names: Sequence[str], text: str) -> dict[str, list[str]]:
    """The UI output of a node that saved files: `text` to show, and the names for the page's file lists."""
    return {"tlora_files": [str(lora_path(name)) for name in names], "tlora_names": list(names), "text": [text]}
