"""Makes ComfyUI's modules usable in a process without its server."""

import sys
from pathlib import Path


def start() -> None:
    """Does what ComfyUI's main.py does before it imports its own modules, where that is still possible: chooses the CPU
    if there is no accelerator, and reads extra_model_paths.yaml. Does nothing in a process whose server runs."""
    if getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None) is not None:
        return
    import comfy.cli_args

    comfyui = str(Path(comfy.cli_args.__file__).parents[1])
    # First, as its nodes.py must win over the pack's nodes/.
    sys.path[:] = [comfyui, *(entry for entry in sys.path if entry != comfyui)]
    if "comfy.model_management" not in sys.modules and not _has_accelerator():
        comfy.cli_args.args.cpu = True
    import utils.extra_config

    config = Path(comfyui) / "extra_model_paths.yaml"
    if config.is_file():
        utils.extra_config.load_extra_path_config(str(config))


def _has_accelerator() -> bool:
    import torch

    kinds = torch.cuda, torch.backends.mps, getattr(torch, "xpu", None)
    return any(kind is not None and kind.is_available() for kind in kinds)
