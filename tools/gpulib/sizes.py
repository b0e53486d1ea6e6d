"""The sizes of what is run: as on a card, and in miniature."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model of the host's own class. function: of random_models, with the arguments `make`; latent: side of its
    latents; tokens: of its text; steps: of a sampling; guidance: of it; paper_steps: of a training in the paper."""

    function: str
    make: dict
    latent: int
    tokens: int
    steps: int
    guidance: float
    paper_steps: int = 0


@dataclass(frozen=True)
class Size:
    """small: models for checks of numbers, by kind. real: those for speed and memory. quickstart: training steps of the
    quickstart, those of the training that is interrupted and resumed, and its rank. rank: of T-LoRAs on the small
    models; real_rank: on the others; card_rank: on small cards. rounds: of what is timed; timed: steps in a round."""

    small: dict[str, Shape]
    real: dict[str, Shape]
    quickstart: tuple[int, int, int]
    rank: int
    real_rank: int
    card_rank: int
    rounds: int
    timed: int


# Counted by `bench memory` at rank 64, rounded up, with the half GiB of CUDA itself.
GIB = {
    "sdxl bf16": 13.0,
    "sdxl bf16 checkpointing": 8.0,
    "flux bf16": 50.0,
    "flux bf16 checkpointing": 28.0,
    "flux fp8": 34.5,
    "flux fp8 checkpointing": 16.5,
    "sdxl sampling": 10.0,
    "flux bf16 sampling": 36.0,
    "flux fp8 sampling": 16.0,
}
FULL = Size(
    small={
        "sdxl": Shape("sdxl", {"width": 128, "depths": (0, 1, 2), "context": 512}, 32, 77, 8, 5.0),
        "flux": Shape("flux", {"hidden": 768, "blocks": (2, 4), "context": 512, "vector": 128}, 32, 64, 8, 1.0),
    },
    real={
        "sdxl": Shape("sdxl", {}, 128, 77, 20, 5.0, 800),
        "flux": Shape("flux", {}, 128, 512, 10, 1.0, 500),
    },
    quickstart=(350, 40, 32),
    rank=16,
    real_rank=64,
    card_rank=32,
    rounds=5,
    timed=3,
)
_SDXL = Shape("small", {"family": "ssd-1b"}, 8, 7, 2, 5.0, 8)  # the same class of the host
_FLUX = Shape("small", {"family": "flux"}, 8, 7, 2, 1.0, 5)
MINIATURE = Size(
    small={"sdxl": _SDXL, "flux": _FLUX},
    real={"sdxl": _SDXL, "flux": _FLUX},
    quickstart=(24, 4, 4),
    rank=4,
    real_rank=4,
    card_rank=4,
    rounds=1,
    timed=1,
)
SIZES = {"full": FULL, "miniature": MINIATURE}
