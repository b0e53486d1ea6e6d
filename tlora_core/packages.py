"""Optional packages, needed by some inputs only."""

import importlib
from pathlib import Path
from types import ModuleType

from .errors import TLoRAError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def required(module: str, what: str) -> ModuleType:
    """The imported module. Raises TLoRAError with a sentence that begins with `what`, the feature that needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise TLoRAError(
            f"{what} needs the Python package {package} ({error}); install it in ComfyUI's Python: "
            f"pip install {_requirement(package)}."
        ) from error


def _requirement(package: str) -> str:
    """The package with requirements.txt's versions, if listed: the newest may change packages that ComfyUI needs."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines() if REQUIREMENTS.is_file() else []
    return next((f'"{line}"' for line in lines if line.startswith(package)), package)
