"""The layers to train a T-LoRA on, by what they do when the model is evaluated."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ....method.adapters import Adapters
from ....method.layer_name import LayerName
from ....method.schedule import RankSchedule
from ....training.config import TrainConfig
from ..model.families import ATTENTION, TargetLayer, chosen
from ..model.layers import linear_modules
from ..model.watched import FEED_FORWARD, ROLES, Part, Watched, watched
from .blame import saying_what_failed
from .denoiser import HostDenoiser
from .encode import Sample
from .failure import at_smallest
from .session import blocks, training_session

_SIDES = (16, 32, 64)  # of the small latents, multiples of what any U-Net halves
_SIDES_OF_PIXELS = (64,)  # where a model takes pixels, of which one patch holds up to 32 by 32


class Seen(NamedTuple):
    """layers: by name, a module path, or "path@row" for some rows of a layer. in_words: how many of which kind, and
    which attention over the picture has projections that cannot be trained."""

    layers: dict[LayerName, TargetLayer]
    in_words: str


def seen_layers(model: ModelPatcher, sample: Sample, config: TrainConfig, which: str = ATTENTION) -> Seen:
    """The layers to train a T-LoRA on, from a few evaluations of the model on small latents; see `model.watched`.

    sample: one training picture, for its caption and the kind of its latent. which: see `families.chosen`. Raises like
    that.
    """
    linear = linear_modules(model)
    room = model.memory_required([1, *_shape(sample, max(_sides(sample)))])
    # Not protected, since the trial of a block would be seen as one more call of it.
    with training_session(model, room=room, protected=False):
        denoiser = HostDenoiser(model, Adapters({}), RankSchedule(1, 1), [sample], config)
        with saying_what_failed(denoiser, lambda: 1):
            seen = at_smallest(_sides(sample), lambda side: _watched(denoiser, linear, side, which != ATTENTION))
    attention = [part for part in seen.parts if part.role != FEED_FORWARD]
    feed_forward = [part for part in seen.parts if part.role == FEED_FORWARD]
    layers = chosen(
        which, linear, _layers(attention, linear), _layers(feed_forward, linear), type(model.model).__name__
    )
    return Seen(layers, _in_words(layers, seen.unreached))


def _watched(denoiser: HostDenoiser, linear: Mapping[str, torch.nn.Linear], side: int, feed_forward: bool) -> Watched:
    """What the layers do on latents with this side."""
    shape = _shape(denoiser.samples[0], side)
    # Some models read the text here, once, by layers that no step evaluates.
    latents = denoiser.base.process_latent_in(torch.zeros(1, *shape, device=denoiser.device))
    denoiser.inputs(denoiser.samples, latents)
    network = denoiser.base.diffusion_model
    network = getattr(network, "_orig_mod", network)
    return watched(
        network,
        linear,
        blocks(network),
        lambda number: _evaluate(denoiser, number, latents.shape),
        feed_forward=feed_forward,
    )


def _in_words(layers: Mapping[LayerName, TargetLayer], unreached: list[str]) -> str:
    counts = Counter(layer.role or "other" for layer in layers.values())
    kinds = ", ".join(f"{counts[role]} {role}" for role in (*ROLES, "other") if counts[role])
    words = f"{len(layers)} layers ({kinds})"
    if not unreached:
        return words
    return f"{words}; not trained: what the attention of {', '.join(unreached)} gets from other than linear layers"


def _layers(parts: list[Part], linear: Mapping[str, torch.nn.Linear]) -> dict[LayerName, TargetLayer]:
    found = {}
    for part in parts:
        module = linear[part.path]
        name = LayerName(part.path) if part.rows == module.out_features else LayerName.of_rows(part.path, part.row)
        found[name] = TargetLayer(module, part.row, part.rows, part.role)
    return found


def _sides(sample: Sample) -> tuple[int, ...]:
    return _SIDES_OF_PIXELS if sample.shape[0] == 3 else _SIDES


def _shape(sample: Sample, side: int) -> tuple[int, ...]:
    height, width = sample.shape[-2:]
    return *sample.shape[:-2], min(side, height), min(side, width)


def _evaluate(denoiser: HostDenoiser, number: int, shape: torch.Size) -> None:
    """Evaluates the model in the middle of its noise levels. Not only the noise differs with the number: some models
    start from the picture itself."""
    generator = torch.Generator().manual_seed(number)
    latents, noise = (torch.randn(shape, generator=generator).to(denoiser.device) for _ in ("latent", "noise"))
    sigmas = denoiser.levels.sigmas.float()
    denoiser.output_error(denoiser.samples, latents, noise, sigmas[len(sigmas) // 2].reshape(1))
