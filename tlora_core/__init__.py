"""T-LoRA (Soboleva et al. 2025) in plain torch: adapters, their orthogonal starts, the rank schedule, the file."""

from .adapters import METHODS, Adapter, LoRAAdapter, LowRank, Method, OrthoAdapter, make_adapters
from .errors import TLoRAError
from .file import TLoRAFile
from .masking import low_rank_delta
from .orthogonal import DEFAULT_START, STARTS, orthogonal_start, orthogonal_starts
from .schedule import RankSchedule
from .version import __version__

__all__ = [
    "DEFAULT_START",
    "METHODS",
    "STARTS",
    "Adapter",
    "LoRAAdapter",
    "LowRank",
    "Method",
    "OrthoAdapter",
    "RankSchedule",
    "TLoRAError",
    "TLoRAFile",
    "__version__",
    "low_rank_delta",
    "make_adapters",
    "orthogonal_start",
    "orthogonal_starts",
]
