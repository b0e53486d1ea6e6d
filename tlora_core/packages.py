"""Packages that only some choices need."""
import importlib
from types import ModuleType

from .errors import TLoRAError


def required(module: str, what: str) -> ModuleType:
    """The module, or TLoRAError: `what` begins the sentence that says who needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise TLoRAError(
            f"{what} needs the Python package {package} ({error}); install it in ComfyUI's Python: pip install {package}.") from error
