"""The parts of a run, those first that would be missed most if time ran out."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PLAIN, DYNAMIC = "plain", "dynamic"  # how ComfyUI keeps weights: loaded beforehand, or its dynamic VRAM

# How a checkpoint stores its weights. The last five are only tried where the host or the card has them.
FORMATS = ("bf16", "fp16", "fp8", "scaled_fp8", "fp8_fast", "nvfp4", "mxfp8", "int8")
IN_FLOAT64 = ("bf16", "fp16", "fp8", "scaled_fp8")


@dataclass(frozen=True)
class Part:
    """One check. call: the module in `checks` and the function there, which takes a `running.Run` and `arguments`.
    limit: seconds it may take. host: PLAIN or DYNAMIC."""

    name: str
    call: str
    limit: int
    host: str = PLAIN
    arguments: dict[str, str | int] = field(default_factory=dict)


def parts() -> list[Part]:
    """All of them, in order. Neighbours with the same `host` share a process, whose start takes seconds."""
    return [
        Part("machine", "machine:machine", 60),
        Part("quickstart", "quickstart:quickstart", 120),
        *_training(PLAIN),
        *(Part(f"sampling error {w}", "precision:sampling_error", 60, PLAIN, {"weights": w}) for w in IN_FLOAT64),
        *_training(DYNAMIC),
        *_cards(DYNAMIC, ("sdxl", 8), ("flux", 12), ("flux", 8)),
        *_cards(PLAIN, ("sdxl", 8), ("sdxl", 6)),
        *_speed("sdxl", PLAIN),
        *_cards(PLAIN, ("flux", 12), ("flux", 16), ("flux", 8)),
        *_speed("flux", PLAIN),
        *(Part(f"peak {kind}", "memory_use:peak", 90, PLAIN, {"kind": kind}) for kind in ("sdxl", "flux")),
        *_cards(PLAIN, ("sdxl", 12), ("sdxl", 16), ("flux", 6)),
        Part(f"quickstart{_suffix(DYNAMIC)}", "quickstart:quickstart", 120, DYNAMIC),
        *_speed("sdxl", DYNAMIC),
        *_cards(DYNAMIC, ("sdxl", 6), ("flux", 16), ("sdxl", 12), ("sdxl", 16), ("flux", 6)),
    ]


def _training(host: str) -> Iterator[Part]:
    for weights in FORMATS:
        yield Part(f"train {weights}{_suffix(host)}", "formats:training", 60, host, {"weights": weights})


def _cards(host: str, *cards: tuple[str, int]) -> Iterator[Part]:
    """Of (kind of model, GB of the card)."""
    for kind, gib in cards:
        name = f"train {kind} in {gib} GB{_suffix(host)}"
        yield Part(name, "memory_use:small_card", 90, host, {"kind": kind, "gib": gib})


def _speed(kind: str, host: str) -> Iterator[Part]:
    if host == PLAIN:  # the floor is of a model that is there as a whole
        yield Part(f"training speed {kind}", "speed:training_speed", 90, host, {"kind": kind})
    yield Part(f"sampling speed {kind}{_suffix(host)}", "speed:sampling_speed", 90, host, {"kind": kind})


def _suffix(host: str) -> str:
    return "" if host == PLAIN else ", dynamic VRAM"


def chosen(patterns: Sequence[str]) -> list[Part]:
    """The parts whose names match one of the shell patterns; all for none. Raises ValueError for one that matches
    none."""
    every = parts()
    for pattern in patterns:
        if not any(fnmatch.fnmatch(part.name, pattern) for part in every):
            raise ValueError(f"--only {pattern}: no part has such a name; --list shows them.")
    return [p for p in every if not patterns or any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)]
