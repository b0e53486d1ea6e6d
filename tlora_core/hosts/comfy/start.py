"""Makes ComfyUI's modules usable in a process without its server."""

import sys
from pathlib import Path


def start() -> None:
    """Does what ComfyUI's main.py does before it imports its own modules: chooses the CPU where there is no
    accelerator, and reads extra_model_paths.yaml. Does nothing in a process that has imported them."""
    if "comfy.model_management" in sys.modules:
        return
    import torch
    from comfy.cli_args import args

    kinds = torch.cuda, torch.backends.mps, getattr(torch, "xpu", None)
    if not any(kind is not None and kind.is_available() for kind in kinds):
        args.cpu = True
    import folder_paths
    import utils.extra_config

    config = Path(folder_paths.__file__).parent / "extra_model_paths.yaml"
    if config.is_file():
        utils.extra_config.load_extra_path_config(str(config))
