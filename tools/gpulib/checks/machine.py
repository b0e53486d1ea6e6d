"""What card, driver and versions there are."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys

import torch

from tlora_core.version import __version__

from .. import comfyui
from ..running import Run

PACKAGES = ("comfy-kitchen", "comfy-aimdo", "transformers", "safetensors", "numpy", "triton", "prodigyopt")


def machine(run: Run) -> None:
    import psutil

    run.note(device=_device_name(run), pack=__version__, comfyui=comfyui.version(), torch=torch.__version__)
    run.note(python=platform.python_version(), system=platform.platform(), processors=os.cpu_count() or 0)
    run.note(ram_gib=psutil.virtual_memory().total / 2**30, packages=_versions(), backends=_backends())
    if run.on_gpu:
        _card(run)
    product = (
        torch.ones(64, 64, device=run.device, dtype=torch.bfloat16) @ torch.ones(64, 64, device=run.device).bfloat16()
    )
    run.require(float(product[0, 0]) == 64, "the product of two small matrices is wrong")


def _card(run: Run) -> None:
    card = torch.cuda.get_device_properties(run.device)
    free, total = torch.cuda.mem_get_info(run.device)
    run.note(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=_driver())
    run.note(capability=f"{card.major}.{card.minor}", multiprocessors=card.multi_processor_count)
    run.note(vram_gib=total / 2**30, free_gib=free / 2**30, allocator=torch.cuda.get_allocator_backend())
    run.note(**{name: bool(answer) for name, answer in _abilities(run).items()})


def _abilities(run: Run) -> dict[str, bool]:
    """Which formats the host multiplies on this card without unpacking them."""
    import comfy.model_management as management

    asked = {name: getattr(management, f"supports_{name}_compute", None) for name in ("fp8", "nvfp4", "mxfp8", "int8")}
    return {f"{name}_products": ask(run.device) for name, ask in asked.items() if ask is not None}


def _device_name(run: Run) -> str:
    return torch.cuda.get_device_name(run.device) if run.on_gpu else platform.processor() or platform.machine()


def _driver() -> str:
    """As nvidia-smi tells it; "unknown" without that program."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.split("\n")[0].strip() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _backends() -> dict[str, str]:
    """Those of comfy-kitchen, and whether each can be used here."""
    kitchen = sys.modules.get("comfy_kitchen")
    if kitchen is None or not hasattr(kitchen, "list_backends"):
        return {}
    listed = kitchen.list_backends()
    return {
        name: "yes" if each.get("available") else str(each.get("unavailable_reason")) for name, each in listed.items()
    }
