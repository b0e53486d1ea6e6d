"""Counts how far a reader has to go: the pack's functions, classes and files in one training step and in one
evaluation.

    python3 tools/host.py bench walks [--list]

Counted on the tiny base with Python's profiler hook, including the backward pass and the optimizer, after everything
that is prepared once exists. docs/ARCHITECTURE.md describes the two walks.
"""

import argparse
import sys
import threading
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT / "tools")]


class Walk:
    """The pack's functions that run between `begin` and `end`, by file."""

    def __init__(self):
        self.functions: dict[str, set[str]] = defaultdict(set)

    def begin(self) -> None:
        threading.setprofile(self._note)  # autograd may run the backward pass in its own threads
        sys.setprofile(self._note)

    def end(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame, event, _):
        code = frame.f_code
        if event == "call" and f"{ROOT}/tlora_core/" in code.co_filename:
            name = code.co_qualname.replace(".<locals>", "")
            if "<" not in name.rpartition(".")[2]:  # no lambdas, generators and comprehensions
                self.functions[str(Path(code.co_filename).relative_to(ROOT / "tlora_core"))].add(name)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Functions, classes, files."""
        names = [(file, name) for file, names in self.functions.items() for name in names]
        classes = {(file, name.split(".")[0]) for file, name in names if name[0].isupper() or name.startswith("_")}
        return len(names), len({each for each in classes if each[1].lstrip("_")[:1].isupper()}), len(self.functions)


def training_step(model, clip, vae) -> Walk:
    """The third step of a training with the quickstart's ranks."""
    import torch

    from tlora_core.hosts.comfy.training.personalize import Personalization, TrainRequest
    from tlora_core.training.config import TrainConfig
    from tlora_core.training.dataset import training_images

    request = TrainRequest("sks", "circle", rank=32, min_rank=16, resolution=64, config=TrainConfig(steps=3))
    personalization = Personalization(model, clip, vae, training_images(torch.rand(1, 64, 64, 3)), request)
    walk = Walk()
    personalization.train(3, lambda step, loss: walk.begin() if step == 2 else walk.end() if step == 3 else None)
    return walk


def sampling_evaluation(model, clip, vae) -> Walk:
    """The third evaluation of a sampling with a T-LoRA of the same ranks, folded as memory allows."""
    import random_models
    import tiny_gate

    from tlora_core.hosts.comfy.sampling import apply_tlora

    adapted = apply_tlora(model, random_models.random_tlora(model, 32, 16))
    walk = Walk()
    ends = {1: walk.begin, 2: walk.end}
    sampler = tiny_gate.HostSampler(model, clip, vae)
    sampler.latents("a photo of sks circle", 0, adapted, steps=4, callback=lambda step, *_: ends.get(step, int)())
    return walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the functions")
    args = parser.parse_args()
    import tiny_gate

    tiny_gate.parse_host_arguments("cpu")
    from tlora_core.tiny import comfy as tiny_base

    parts = tiny_base.load(str(tiny_gate.WEIGHTS / "tiny_base.safetensors"))
    walks = {"training step": training_step(*parts), "sampling evaluation": sampling_evaluation(*parts)}
    for title, walk in walks.items():
        functions, classes, files = walk.counts
        print(f"{title}: {functions} functions and {classes} classes in {files} files")
        if args.list:
            for file, names in sorted(walk.functions.items()):
                print(f"  {file}: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
