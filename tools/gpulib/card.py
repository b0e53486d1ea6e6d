"""A large card that is a small one for a while, and the least memory that was free on a card."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import comfy.model_management
import torch

from .running import Run

GIB = 2**30
OF_CUDA = 0.5  # GiB that CUDA itself takes on every card


@contextlib.contextmanager
def small_card(run: Run, gib: int) -> Iterator[int]:
    """Within the block, PyTorch and all others get what a card of `gib` GiB has beside CUDA itself. Yields the bytes
    that are taken from them. On a CPU nothing is, and 0.

    PyTorch alone would keep to its limit, but ComfyUI asks the driver how much is free, and its dynamic VRAM allocates
    without PyTorch. So the rest of the card is really taken.
    """
    if not run.on_gpu:
        yield 0
        return
    empty()
    free, total = torch.cuda.mem_get_info(run.device)
    usable = int((gib - OF_CUDA) * GIB)
    if free < usable:
        run.skip(f"a card of {gib} GB needs {usable / GIB:.1f} GiB free, of which {free / GIB:.1f} are there")
    reserved = torch.cuda.memory_reserved(run.device)
    taken = torch.empty(free - usable, dtype=torch.uint8, device=run.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (reserved + free) / total), run.device)
    try:
        yield taken.nbytes
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, run.device)
        del taken
        empty()


def empty() -> None:
    """All models off the card, and what PyTorch keeps for later given back."""
    gc.collect()  # first: a model that is only kept by a cycle would be moved to RAM
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


class LeastFree:
    """Watches within the block how much memory of the card is free, however it is allocated. bytes: the least of it."""

    def __init__(self, run: Run):
        self.run, self.bytes = run, 0
        self._done = threading.Event()

    def __enter__(self):
        if self.run.on_gpu:
            self.bytes = torch.cuda.mem_get_info(self.run.device)[0]
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.bytes = min(self.bytes, torch.cuda.mem_get_info(self.run.device)[0])

    def __exit__(self, *_):
        self._done.set()
        if self.run.on_gpu:
            self._thread.join()
