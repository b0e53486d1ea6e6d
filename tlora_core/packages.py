"""Packages that only some choices need."""

import importlib
from pathlib import Path
from types import ModuleType

from .errors import TLoRAError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def required(module: str, what: str) -> ModuleType:
    """The module, or TLoRAError: `what` begins the sentence that says who needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise TLoRAError(
            f"{what} needs the Python package {package} ({error}); install it in ComfyUI's Python: "
            f"pip install {_asked_for(package)}."
        ) from error


def _asked_for(package: str) -> str:
    """With the versions of requirements.txt, if it is there: the newest may move packages that ComfyUI itself needs."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines() if REQUIREMENTS.is_file() else []
    return next((f'"{line}"' for line in lines if line.startswith(package)), package)
