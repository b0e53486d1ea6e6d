"""Training from each format of weights: right, the same after a sampling, and without a change to the weights."""

from __future__ import annotations

import math

import torch

from .. import models, sample, train
from ..running import Run

# The largest relative error of the adapters' gradient against float32 with weights of the same worth. It may hold no
# more than the rounding of activations, to 16 bits in the first three and to 8 or 4 in the others: 0.03, 0.15 and 0.4
# on a CPU that was told to round them as a card does. Packed bytes taken for weights give 1 or more.
LARGEST_ERROR = {
    "bf16": 0.1,
    "fp16": 0.05,
    "fp8": 0.1,
    "scaled_fp8": 0.3,
    "fp8_fast": 0.3,
    "nvfp4": 0.7,
    "mxfp8": 0.3,
    "int8": 0.3,
}
STEPS = 2


def training(run: Run, weights: str) -> None:
    for kind in run.size.small:
        _train(run, kind, weights)


def _train(run: Run, kind: str, weights: str) -> None:
    shape = run.size.small[kind]
    built = models.build_small(run, kind, weights)
    before = models.stored_bytes(built.model)
    start = train.setup(built.model, shape, run.size.rank, moved=0.02)
    first = train.losses(built.model, start, STEPS)
    found = train.gradient(built.model, start)
    sample.latent(built.model, shape)
    again = train.losses(built.model, start, STEPS)
    unchanged = models.same_bytes(before, models.stored_bytes(built.model))
    exact = models.reference(run, kind, built.worth, torch.float32)
    error = train.relative_error(found, train.gradient(exact, train.setup(exact, shape, run.size.rank, moved=0.02)))
    run.note(**{f"{kind}_gradient_error": error, f"{kind}_losses": first, f"{kind}_losses_after_sampling": again})
    run.require(all(map(math.isfinite, [*first, *again])), f"{kind}: a loss is not finite: {first}, {again}")
    run.require(unchanged, f"{kind}: training changed the model's weights")
    same = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(first, again))
    run.require(same, f"{kind}: after a sampling the losses are {again}, before it {first}")
    bound = LARGEST_ERROR[weights]
    run.require(error < bound, f"{kind}: the gradient's error is {error:.3g}, more than {bound} by rounding")
