"""What a check is given, and how it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .sizes import Size


class Failed(Exception):
    """What was found is not as it should be."""


class Skipped(Exception):
    """It cannot be tried here, for the reason given."""


@dataclass
class Run:
    """device: a torch.device. kept: what checks of one process leave for later ones. deadline: of this check, by
    time.monotonic()."""

    device: Any
    size: Size
    kept: dict = field(default_factory=dict)
    deadline: float = float("inf")
    figures: dict[str, Any] = field(default_factory=dict)

    def note(self, **figures: Any) -> None:
        """Keeps figures for the report; those noted before a failure are reported too. Floats keep four digits."""
        self.figures |= {name: _rounded(value) for name, value in figures.items()}

    def require(self, holds: bool, text: str) -> None:
        if not holds:
            raise Failed(text)

    def skip(self, reason: str) -> NoReturn:
        raise Skipped(reason)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def needs(self, gib: float) -> None:
        """Skips the check on a card with less free memory than that."""
        free = self.free_gib()
        if free < gib:
            self.skip(f"needs {gib:g} GiB on the card, where {free:.1f} are free")

    def needs_ram(self, gib: float) -> None:
        """Skips the check on a machine with less free memory than that beside the card's."""
        import psutil

        free = psutil.virtual_memory().available / 2**30
        if free < gib:
            self.skip(f"needs {gib:g} GiB of RAM, of which {free:.1f} are free")

    def free_gib(self) -> float:
        """Of the card; without end on a CPU, where models are small."""
        if not self.on_gpu:
            return float("inf")
        import torch

        return torch.cuda.mem_get_info(self.device)[0] / 2**30


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
