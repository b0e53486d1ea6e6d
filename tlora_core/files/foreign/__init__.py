"""LoRA and T-LoRA files of other programs: `load_any` reads a file of any kind it knows, without being told which."""

from .load import Loaded, load_any, rescheduled
from .target import Target

__all__ = ["Loaded", "Target", "load_any", "rescheduled"]
