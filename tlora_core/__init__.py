"""T-LoRA (Soboleva et al. 2025) in plain torch: adapters, their orthogonal starts, the rank schedule, the file."""

from .adapters import METHODS, Adapter, Adapters, LowRank, Method
from .errors import TLoRAError
from .factory import make_adapters
from .file import TLoRAFile
from .masking import add_low_rank
from .orthogonal import DEFAULT_START, STARTS, orthogonal_start, orthogonal_starts
from .pipelines import apply, load
from .schedule import RankSchedule
from .version import __version__

__all__ = [
    "DEFAULT_START",
    "METHODS",
    "STARTS",
    "Adapter",
    "Adapters",
    "LowRank",
    "Method",
    "RankSchedule",
    "TLoRAError",
    "TLoRAFile",
    "__version__",
    "add_low_rank",
    "apply",
    "load",
    "make_adapters",
    "orthogonal_start",
    "orthogonal_starts",
]
