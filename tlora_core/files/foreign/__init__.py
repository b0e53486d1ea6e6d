"""LoRA and T-LoRA files of other programs: `load_any` detects the kind of a file and reads it."""

from .load import Loaded, load_any, rescheduled
from .target import Target

__all__ = ["Loaded", "Target", "load_any", "rescheduled"]
