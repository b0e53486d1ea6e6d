"""Measures how reliable the scorers are, on rendered pictures of the concepts, on which none of them was trained."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from tlora_core.tiny import world
from tlora_core.tiny.scorer import AttributeScorer, ConceptMatcher

from .colour import ColourReader, concept_pictures
from .metrics import seen

ATTRIBUTES = ("background", "place", "colour")


def validate(
    scorer: AttributeScorer,
    through: Callable[[torch.Tensor], torch.Tensor],
    count: int = 100,
    concepts: int = len(world.CONCEPTS),
) -> dict:
    """through: passes pictures [B, 64, 64, 3] through the tiny base's autoencoder, like every drawn picture.

    attributes: name -> concept -> accuracy, on `count` pictures of each concept. matcher: mean distances of one picture
        of each concept to its own concept and to others, also for damaged pictures; concepts: the number of matchers.
    """
    accuracy = {name: {} for name in ATTRIBUTES}
    for i, concept in enumerate(world.CONCEPTS):
        pictures, shown = concept_pictures(concept, count, np.random.default_rng((7, i)))
        pictures = through(pictures)
        found = seen(pictures, scorer)
        for row, colour in zip(found, ColourReader(concept, through).read(pictures, [row["place"] for row in found])):
            row["colour"] = colour
        for name in ATTRIBUTES:
            accuracy[name][concept.name] = float(np.mean([shown[name][k] == found[k][name] for k in range(count)]))
    return {"pictures": count, "attributes": accuracy, "matcher": separation(world.CONCEPTS[:concepts])}


def separation(concepts) -> dict[str, float]:
    own = torch.cat([_rendered(concept) for concept in concepts])
    rows, damaged = [], {name: [] for name in ("noise", "blur", "grey", "class")}
    for i, concept in enumerate(concepts):
        picture, matcher = own[i : i + 1], ConceptMatcher(concept)
        rows.append(matcher.distance(own))
        noise = 0.3 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(i))
        blurred = avg_pool2d(picture.movedim(-1, 1), 9, 1, 4, count_include_pad=False).movedim(1, -1)
        grey = picture.mean(-1, keepdim=True).expand_as(picture)
        pictures = torch.cat([(picture + noise).clamp(0, 1), blurred, grey, _rendered(concept, plain=True)])
        for name, distance in zip(damaged, matcher.distance(pictures).tolist()):
            damaged[name].append(distance)
    table = torch.stack(rows)  # [matcher, picture]
    right, others = table.diagonal(), table + torch.diag(torch.full((len(concepts),), torch.inf))
    return {
        "pictures": len(concepts),
        "own": float(right.mean()),
        "nearest_other": float(others.min(0).values.mean()),
        "right": float((right < others.min(0).values).float().mean()),
        **{name: float(np.mean(v)) for name, v in damaged.items()},
    }


def _rendered(concept, plain=False):
    """One picture of the concept, or of its class without rim and core in a colour of the world."""
    rng = np.random.default_rng(11)
    scenes = world.concept_scenes(concept, 1, rng)
    if plain:
        scenes.rim[:], scenes.core[:] = np.nan, np.nan
        scenes.colour[:] = np.array(list(world.COLOURS.values())[rng.integers(len(world.COLOURS))]) / 255
    return torch.from_numpy(world.render(scenes))
