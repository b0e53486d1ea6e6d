"""The prompts of the study: the paper's kinds of prompts in the words of the tiny world.

Contextual prompts change appearance, background or position; complex prompts change several of these at once. The
neutral prompt is the training prompt: "a photo of a sks heart", with the article, as in the tiny base's own captions.
The scorer of each attribute is independent of the measured model.
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
    """The number of pictures of each kind at each measured step. control: prompts without the concept. of_class:
    prompts of its class without the token."""

    neutral: int
    background: int
    appearance: int
    place: int
    combined: int
    control: int
    of_class: int = 0


@dataclass(frozen=True)
class Prompt:
    """asked: attribute -> name of its value. seed: of the noise from which the picture starts."""

    text: str
    kind: str
    seed: int
    asked: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """The background and place in the training picture; prompts never ask for them."""

    background: str
    place: str


def settings(concept: world.Concept, seed: int, count: int = 1) -> list[Setting]:
    """The settings of `count` training pictures, with different backgrounds and places. The first is the same for every
    count."""
    rng = _rng(concept, seed)
    backgrounds, places = rng.permutation(list(world.BACKGROUNDS)), rng.permutation(list(world.PLACES))
    return [Setting(str(b), str(p)) for b, p in zip(backgrounds[:count], places)]


def prompts(concept: world.Concept, seed: int, draws: Draws, training: Setting) -> list[Prompt]:
    """The prompts of one concept and seed, the same for every method. training: the setting of the first training
    picture."""
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
    """Prompts of other objects, with every attribute that a caption can name."""
    rng = _rng(concept, seed + 2000)
    made = []
    for i in range(count):
        shape, colour, place, background = (
            str(rng.choice([s for s in world.SHAPES if s != concept.shape])),
            *(str(rng.choice(list(names))) for names in (world.COLOURS, world.PLACES, world.BACKGROUNDS)),
        )
        made.append(full_prompt({"shape": shape, "colour": colour, "place": place, "background": background}, i))
    return made


def class_prompts(concept: world.Concept, seed: int, count: int) -> list[Prompt]:
    """Prompts of the concept's class without the token: by turns the class word alone, and with every attribute."""
    rng, made = _rng(concept, seed + 3000), []
    for i in range(count):
        names = {"colour": world.COLOURS, "place": world.PLACES, "background": world.BACKGROUNDS}
        asked = {name: str(rng.choice(list(values))) for name, values in names.items()}
        full = full_prompt({"shape": concept.shape, **asked}, i // 2)
        made.append(full if i % 2 else Prompt(f"a photo of a {concept.shape}", "class", i // 2))
    return made


def full_prompt(asked: dict[str, str], seed: int) -> Prompt:
    """A prompt of an object of the world, with every attribute that a caption can name."""
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
    """The values in random order, endlessly."""
    order = [values[i] for i in rng.permutation(len(values))]
    while True:
        yield from order
