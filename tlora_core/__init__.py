"""T-LoRA (Soboleva et al. 2025) in plain torch: adapters, their orthogonal starts, the rank schedule, the file."""

from .errors import TLoRAError
from .files.tlora_file import TLoRAFile
from .hosts.diffusers import apply, load
from .hosts.scripts import train
from .layers.beside import add_low_rank
from .method.adapters import METHODS, Adapter, Adapters, LowRank, Method
from .method.factory import make_adapters
from .method.schedule import RankSchedule
from .method.starts import DEFAULT_START, STARTS, orthogonal_start, orthogonal_starts
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
    "train",
]
