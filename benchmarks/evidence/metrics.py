"""Measures drawn pictures. The results keep raw values; `analysis` computes figures from them.

IS is based on `ConceptMatcher`: the colour error over the object's own pixels in the best-fitting pose, so the
background is masked. TS is the share of asked attributes that a scorer finds. The place and the background that a
scorer sees, and the matcher's pose, give diversity and copying.
"""

from collections.abc import Sequence

import torch

from tlora_core.tiny import world
from tlora_core.tiny.scorer import AttributeScorer, ConceptMatcher

from .colour import ColourReader
from .prompts import NEUTRAL, Prompt

NAMES = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "background": tuple(world.BACKGROUNDS),
    "place": tuple(world.PLACES),
}


def seen(pictures: torch.Tensor, scorer: AttributeScorer) -> list[dict[str, str]]:
    """The tiny base's scorer on each of `pictures` [B, H, W, 3] in 0..1: attribute -> name of the value. Shape and
    colour are reliable only for the world's own objects."""
    found = scorer.predict(pictures)
    return [{name: NAMES[name][int(found[name][i])] for name in NAMES} for i in range(len(pictures))]


def measure(
    pictures: torch.Tensor,
    prompts: Sequence[Prompt],
    matcher: ConceptMatcher,
    reader: ColourReader,
    scorer: AttributeScorer,
) -> list[dict]:
    """A row for each picture: its prompt's kind and text, what was asked and what is seen; for neutral pictures also
    distance and pose."""
    rows = [
        {
            "kind": p.kind,
            "prompt": p.text,
            "asked": p.asked,
            "seen": {name: s[name] for name in ("background", "place")},
        }
        for p, s in zip(prompts, seen(pictures, scorer))
    ]
    coloured = [i for i, prompt in enumerate(prompts) if "colour" in prompt.asked]
    for i, colour in zip(coloured, reader.read(pictures[coloured], [rows[i]["seen"]["place"] for i in coloured])):
        rows[i]["seen"]["colour"] = colour
    neutral = [i for i, prompt in enumerate(prompts) if prompt.kind == NEUTRAL]
    distances, poses = matcher.fit(pictures[neutral])
    for i, distance, pose in zip(neutral, distances.tolist(), poses.tolist()):
        rows[i] |= {"distance": round(distance, 5), "pose": [round(v, 3) for v in pose]}
    return rows


def measure_class(
    pictures: torch.Tensor, prompts: Sequence[Prompt], matcher: ConceptMatcher, scorer: AttributeScorer
) -> list[dict]:
    """A row for each picture of the class: what was asked, what is seen, and the distance to the concept."""
    if not prompts:
        return []
    distances = [round(distance, 5) for distance in matcher.distance(pictures).tolist()]
    return [{"asked": p.asked, "seen": s, "distance": d} for p, s, d in zip(prompts, seen(pictures, scorer), distances)]
