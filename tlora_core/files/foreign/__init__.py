"""LoRA and T-LoRA files of other programs: `load_any` detects the kind of a file and reads it."""

from .load import Loaded, load_any, rescheduled
from .model_description import ModelDescription

__all__ = ["Loaded", "ModelDescription", "load_any", "rescheduled"]
