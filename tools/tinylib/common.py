"""What all stages of the tiny base's training share."""

import time
from pathlib import Path

import numpy as np
import torch

from tlora_core.tiny import world

SIZE = 64


class Progress:
    """Prints one line at most every ten seconds and says when a minute has passed since the last save."""

    def __init__(self, what, total, start=0):
        self.what, self.total, self.first = what, total, start
        self.began = self.printed = self.saved = time.time()

    def step(self, i, **numbers):
        now = time.time()
        if now - self.printed > 10 or i + 1 == self.total:
            self.printed = now
            rate = (i + 1 - self.first) / (now - self.began)
            values = " ".join(f"{k}={v:.4f}" for k, v in numbers.items())
            print(f"{self.what} {i + 1}/{self.total} {rate:.2f}/s {values}", flush=True)
        if now - self.saved > 60:
            self.saved = now
            return True
        return False


def save_state(path: Path, **state):
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def to_tensor(pictures, device):
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def warm_stable_decay(step: int, total: int, peak: float, warmup: int = 300) -> float:
    """A constant learning rate between a warm-up and a linear fall to zero over the last third. A run that is shortened
    or extended before its fall is therefore still the same run."""
    return peak * min(1, (step + 1) / warmup) * min(1, (total - step) / (total / 3))


def set_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def captions(scenes, rows, rng):
    """A tenth are empty, which is what classifier-free guidance needs."""
    return ["" if rng.random() < 0.1 else world.caption(scenes, i, rng) for i in rows]


def load_scenes(work: Path) -> world.Scenes:
    return world.Scenes(**np.load(work / "scenes.npz"))
