"""What a study's pictures are asked to show: the paper's kinds of prompts in the words of the tiny world.

Its contextual prompts change appearance, background and position; its complex ones several of these at once; the
neutral one
is the training prompt: "a photo of a sks heart", with the article, as the tiny base's own captions have it. The scorer
of each attribute is independent of the model that is measured.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np

from tlora_core.tiny import world

TOKEN = "sks"
TRAINING = "a photo of a {token} {class_word}"
NEUTRAL, BACKGROUND, APPEARANCE, PLACE, COMBINED = KINDS = ("neutral", "background", "appearance", "place", "combined")


@dataclass(frozen=True)
class Draws:
    """How many pictures of each kind are drawn at a checkpoint, and of `control`: prompts without the concept."""

    neutral: int
    background: int
    appearance: int
    place: int
    combined: int
    control: int


@dataclass(frozen=True)
class Prompt:
    """asked: attribute -> the name of its value. seed: of the noise that the picture starts from."""

    text: str
    kind: str
    seed: int
    asked: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What the training picture shows besides the concept; prompts never ask for it."""

    background: str
    place: str


def settings(concept: world.Concept, seed: int, count: int = 1) -> list[Setting]:
    """Of `count` training pictures, all of different backgrounds and places. The first is the same for every count."""
    rng = _rng(concept, seed)
    backgrounds, places = rng.permutation(list(world.BACKGROUNDS)), rng.permutation(list(world.PLACES))
    return [Setting(str(b), str(p)) for b, p in zip(backgrounds[:count], places)]


def prompts(concept: world.Concept, seed: int, draws: Draws, training: Setting) -> list[Prompt]:
    """The prompts of one concept and seed, the same for every method; `training` is the first training picture's
    setting."""
    rng = _rng(concept, seed + 1000)
    backgrounds = _cycle(rng, [b for b in world.BACKGROUNDS if b != training.background])
    places = _cycle(rng, [p for p in world.PLACES if p != training.place])
    colours = _cycle(rng, list(world.COLOURS))
    made = [_prompt(concept, NEUTRAL, i) for i in range(draws.neutral)]
    for i in range(draws.background):
        made.append(_prompt(concept, BACKGROUND, i, background=next(backgrounds)))
    for i in range(draws.appearance):
        made.append(_prompt(concept, APPEARANCE, i, colour=next(colours)))
    for i in range(draws.place):
        made.append(_prompt(concept, PLACE, i, place=next(places)))
    for i in range(draws.combined):
        made.append(
            _prompt(concept, COMBINED, i, colour=next(colours), place=next(places), background=next(backgrounds))
        )
    return made


def control_prompts(concept: world.Concept, seed: int, count: int) -> list[Prompt]:
    """Prompts of other things, with all that a caption can say."""
    rng = _rng(concept, seed + 2000)
    made = []
    for i in range(count):
        shape, colour, place, background = (
            str(rng.choice([s for s in world.SHAPES if s != concept.shape])),
            *(str(rng.choice(list(names))) for names in (world.COLOURS, world.PLACES, world.BACKGROUNDS)),
        )
        made.append(full_prompt({"shape": shape, "colour": colour, "place": place, "background": background}, i))
    return made


def full_prompt(asked: dict[str, str], seed: int) -> Prompt:
    """A prompt of a thing of the world, with all that a caption can say."""
    words = (
        f"{asked['colour']} {asked['shape']} {world.PLACE_WORDS[asked['place']]} "
        f"{world.BACKGROUNDS[asked['background']]}"
    )
    return Prompt(f"a photo of a {words}", "control", seed, asked)


def _prompt(concept, kind, seed, colour=None, place=None, background=None) -> Prompt:
    asked = {"colour": colour, "place": place, "background": background}
    words = [
        "a photo of a",
        TOKEN,
        colour,
        concept.shape,
        world.PLACE_WORDS.get(place),
        world.BACKGROUNDS.get(background),
    ]
    return Prompt(" ".join(w for w in words if w), kind, seed, {name: value for name, value in asked.items() if value})


def _rng(concept, seed):
    return np.random.default_rng((zlib.crc32(concept.name.encode()), seed))


def _cycle(rng, values):
    """The values in random order, over and over."""
    order = [values[i] for i in rng.permutation(len(values))]
    while True:
        yield from order
