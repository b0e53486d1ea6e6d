"""Starts ComfyUI's modules in this process in the order of its main.py, without its server."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path

from .plan import DYNAMIC, PLAIN

REPO = Path(__file__).resolve().parents[2]


class CannotStart(Exception):
    """One sentence for the user."""


def make_importable(comfyui: str, site: str = "") -> None:
    """Puts ComfyUI's folder, or the one that Python finds already if it is "", the pack and its tools on Python's path.
    ComfyUI comes first: its nodes.py must win over the pack's nodes/. Packages in `site` come last: those that Python
    has fit its PyTorch. An embedded Python ignores PYTHONPATH."""
    found = None if comfyui else importlib.util.find_spec("comfy")
    if found is not None and found.submodule_search_locations:
        comfyui = str(Path(next(iter(found.submodule_search_locations))).parent)
    wanted = [folder for folder in (comfyui, str(REPO), str(REPO / "tools"), str(REPO / "benchmarks")) if folder]
    sys.path[:] = wanted + [entry for entry in sys.path if entry not in wanted] + ([site] if site else [])


def start(device: str, host: str):
    """ComfyUI on the device "cuda" or "cpu"; `host`: plan.PLAIN or plan.DYNAMIC. Returns the torch.device. Raises
    CannotStart."""
    if importlib.util.find_spec("comfy") is None:
        raise CannotStart("ComfyUI was not found; name its folder with --comfyui PATH.")
    sys.argv = [sys.argv[0], *_arguments(device, host)]
    import comfy.options

    comfy.options.enable_args_parsing()
    if device == "cuda":
        _before_torch(host)
    try:
        import torch

        # Asked first, since ComfyUI's own import fails where there is none.
        if device == "cuda" and not torch.cuda.is_available():
            raise CannotStart("PyTorch finds no CUDA card here; --device cpu tries the parts themselves, in miniature.")
        return _import(host)
    except ImportError as error:
        text = f"ComfyUI could not be imported ({error}); benchmarks/README.md lists what it needs."
        raise CannotStart(text) from error


def start_as_usual(arguments: list[str]) -> None:
    """Starts ComfyUI's modules with these options of its command line, on the device and with the memory management
    that it chooses itself. Raises CannotStart."""
    if importlib.util.find_spec("comfy") is None:
        raise CannotStart("ComfyUI was not found; name its folder with --comfyui PATH.")
    sys.argv = [sys.argv[0], *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    on_cpu = comfy.cli_args.args.cpu
    wanted = not on_cpu and getattr(comfy.cli_args, "enables_dynamic_vram", lambda: False)()
    if not on_cpu:
        _before_torch(DYNAMIC if wanted else PLAIN)
    _import(PLAIN)
    import comfy.model_management

    if wanted and comfy.model_management.is_nvidia() and not comfy.model_management.is_wsl():
        try:
            _enable_dynamic_vram()
        except CannotStart as error:
            logging.warning("%s; going on without it", error)


def _arguments(device: str, host: str) -> list[str]:
    if device == "cpu":
        return ["--cpu"]
    source = importlib.util.find_spec("comfy.cli_args")
    known = Path(source.origin).read_text(encoding="utf-8") if source and source.origin else ""
    option = "--disable-dynamic-vram"  # older versions have neither it nor what it disables
    return [option] if host != DYNAMIC and option in known else []


def _before_torch(host: str) -> None:
    """What main.py does before PyTorch is imported: it chooses the allocator, and loads what watches the card."""
    if importlib.util.find_spec("cuda_malloc") is not None:
        import cuda_malloc  # noqa: F401
    if host == DYNAMIC and importlib.util.find_spec("comfy_aimdo") is not None:
        import comfy_aimdo.control

        comfy_aimdo.control.init()


def _import(host: str):
    if importlib.util.find_spec("server") is None:
        _stand_in_for_the_server()
    import comfy.model_management
    import comfy.model_patcher

    if host == DYNAMIC:
        _enable_dynamic_vram()
    return comfy.model_management.get_torch_device()


def _stand_in_for_the_server() -> None:
    """Of ComfyUI's server the pack only asks whether it runs."""
    from types import ModuleType

    module = ModuleType("server")
    module.__dict__["PromptServer"] = type("PromptServer", (), {})
    sys.modules["server"] = module


def _enable_dynamic_vram() -> None:
    """What main.py does on an NVIDIA card. Raises CannotStart where this ComfyUI has none, or it does not work."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if dynamic is None or importlib.util.find_spec("comfy_aimdo") is None:
        raise CannotStart("this ComfyUI has no dynamic VRAM")
    import comfy_aimdo.control

    device = comfy.model_management.get_torch_device()
    if not comfy_aimdo.control.init_devices([device.index or 0]):
        raise CannotStart("comfy-aimdo could not be started, so there is no dynamic VRAM")
    comfy.model_patcher.CoreModelPatcher = dynamic
    comfy.memory_management.aimdo_enabled = True


def version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return os.environ.get("TLORA_HOST_VERSION", "unknown")
    return __version__
