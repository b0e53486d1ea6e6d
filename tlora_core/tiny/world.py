"""The procedural picture world that the tiny base model is trained on.

A scene is one outlined object on one background. All attributes in captions (shape, colour, pattern, place, background)
come from the short lists below, so that a scorer can check a generated picture against its prompt. `CONCEPTS` are
objects that the base model never sees: body colours outside `COLOURS`, with a rim and a core that no training object
has. They are the subjects for personalisation.

Pictures are float32 RGB in 0..1, shape [B, H, W, 3], the host's IMAGE convention.
"""

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "flower", "cross", "moon")
COLOURS = {
    "red": (215, 38, 44),
    "orange": (245, 140, 28),
    "yellow": (250, 222, 60),
    "green": (50, 165, 70),
    "blue": (45, 90, 215),
    "purple": (130, 60, 175),
    "pink": (248, 150, 195),
    "white": (245, 245, 245),
}
PATTERNS = ("plain", "striped", "dotted")
BACKGROUNDS = {
    "beach": "on the beach",
    "meadow": "in a meadow",
    "night": "at night",
    "snow": "in the snow",
    "brick": "by a brick wall",
    "checker": "on a checkered floor",
    "sunset": "at sunset",
    "sea": "under the sea",
    "redwall": "on a plain red background",
    "bluewall": "on a plain blue background",
    "yellowwall": "on a plain yellow background",
    "greywall": "on a plain grey background",
}
PLACES = {
    "left": (-0.36, 0.0),
    "right": (0.36, 0.0),
    "top": (0.0, -0.36),
    "bottom": (0.0, 0.36),
    "centre": (0.0, 0.0),
}
PLACE_WORDS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
OUTLINE, OUTLINE_WIDTH = (28, 26, 36), 0.044  # in half-widths of the picture


@dataclass(frozen=True)
class Concept:
    """A held-out object: `shape` is its class word; body, rim and core are RGB 0..255."""

    name: str
    shape: str
    body: tuple
    rim: tuple
    core: tuple


CONCEPTS = (
    Concept("teal flower", "flower", (0, 140, 135), (250, 225, 90), (225, 40, 140)),
    Concept("maroon star", "star", (120, 20, 50), (120, 225, 225), (245, 190, 60)),
    Concept("olive heart", "heart", (120, 125, 30), (245, 245, 245), (215, 60, 40)),
    Concept("navy moon", "moon", (20, 30, 100), (245, 200, 70), (110, 230, 160)),
    Concept("tan cross", "cross", (200, 160, 110), (90, 40, 120), (30, 150, 160)),
    Concept("mint square", "square", (140, 230, 180), (200, 60, 90), (60, 50, 130)),
    Concept("rust triangle", "triangle", (165, 75, 25), (160, 215, 250), (245, 240, 150)),
    Concept("lime circle", "circle", (170, 225, 30), (110, 20, 90), (30, 90, 160)),
    Concept("plum flower", "flower", (95, 25, 90), (150, 235, 120), (250, 200, 170)),
    Concept("cyan star", "star", (60, 205, 225), (150, 40, 20), (250, 250, 210)),
    Concept("brown heart", "heart", (105, 65, 35), (250, 170, 200), (90, 215, 220)),
    Concept("peach circle", "circle", (250, 190, 150), (20, 95, 90), (150, 30, 60)),
)


@dataclass
class Scenes:
    """A batch of scenes as arrays of length B; indices point into the tuples above."""

    shape: np.ndarray
    colour: np.ndarray  # [B, 3] body colour, 0..1
    colour_index: np.ndarray
    pattern: np.ndarray
    background: np.ndarray
    place: np.ndarray
    centre: np.ndarray  # [B, 2] x, y in -1..1
    radius: np.ndarray  # in half-widths of the picture
    angle: np.ndarray  # radians
    rim: np.ndarray  # [B, 3], NaN for objects without a rim
    core: np.ndarray  # [B, 3], NaN for objects without a core
    seed: np.ndarray  # for the background's details

    def __len__(self):
        return len(self.shape)


def sample_scenes(count: int, rng: np.random.Generator) -> Scenes:
    """Draws `count` scenes uniformly over shapes, colours, places and backgrounds, with random poses; half have no
    pattern."""
    names = list(COLOURS)
    colour_index = rng.integers(len(names), size=count)
    body = np.array([COLOURS[n] for n in names])[colour_index] / 255 + rng.normal(0, 0.02, (count, 3))
    place = rng.integers(len(PLACES), size=count)
    none = np.full((count, 3), np.nan)
    return Scenes(
        shape=rng.integers(len(SHAPES), size=count),
        colour=body.clip(0, 1),
        colour_index=colour_index,
        pattern=np.maximum(rng.integers(-1, len(PATTERNS), size=count), 0),
        background=rng.integers(len(BACKGROUNDS), size=count),
        place=place,
        centre=_centres(place, rng),
        radius=rng.uniform(0.5, 0.6, count),
        angle=rng.uniform(-0.2, 0.2, count),
        rim=none,
        core=none.copy(),
        seed=rng.integers(2**31, size=count),
    )


def concept_scenes(concept: Concept, count: int, rng: np.random.Generator, background=None, place=None) -> Scenes:
    """`count` scenes of `concept`, optionally with a fixed background and place (names)."""
    scenes = sample_scenes(count, rng)
    scenes.shape[:] = SHAPES.index(concept.shape)
    scenes.pattern[:] = PATTERNS.index("plain")
    scenes.colour_index[:] = -1
    scenes.colour[:] = np.array(concept.body) / 255
    scenes.rim[:] = np.array(concept.rim) / 255
    scenes.core[:] = np.array(concept.core) / 255
    if background is not None:
        scenes.background[:] = list(BACKGROUNDS).index(background)
    if place is not None:
        scenes.place[:] = list(PLACES).index(place)
        scenes.centre = _centres(scenes.place, rng)
    return scenes


def _centres(place, rng):
    return np.array(list(PLACES.values()))[place] + rng.uniform(-0.05, 0.05, (len(place), 2))


def caption(scenes: Scenes, i: int, rng: np.random.Generator, drop: float = 0.15) -> str:
    """The caption of scene `i`. Each attribute is omitted with probability `drop`. A rare word without meaning is added
    at times, so that a token like "sks" is known to the text encoder but has no meaning."""
    keep = lambda: rng.random() >= drop  # noqa: E731
    words = ["a photo of a"]
    if rng.random() < 0.25:
        words.append(RARE_WORDS[rng.integers(len(RARE_WORDS))])
    if scenes.pattern[i] and keep():
        words.append(PATTERNS[scenes.pattern[i]])
    if keep():
        words.append(list(COLOURS)[scenes.colour_index[i]])
    words.append(SHAPES[scenes.shape[i]] if keep() else "thing")
    if rng.random() < 0.7:
        words.append(list(PLACE_WORDS.values())[scenes.place[i]])
    if keep():
        words.append(list(BACKGROUNDS.values())[scenes.background[i]])
    return " ".join(words)


RARE_WORDS = tuple(
    f"{a}{b}" for a in ("sk", "zw", "oh", "ru", "ke", "vo") for b in ("s", "x", "wx", "m", "p", "tu", "la", "q")
)


def render(scenes: Scenes, size: int = 64) -> np.ndarray:
    """Renders the scenes. Returns float32 [B, size, size, 3] in 0..1."""
    image = np.empty((len(scenes), size, size, 3), np.float32)
    for b, name in enumerate(BACKGROUNDS):
        for i in np.flatnonzero(scenes.background == b):
            image[i] = _background(name, size, np.random.default_rng(scenes.seed[i]))
    distance, u, v = _object_distance(scenes, size)
    edge = 2.0 / size  # one pixel, in half-widths
    cover = lambda d: np.clip(0.5 - d / edge, 0, 1)[..., None]  # noqa: E731 - coverage of a pixel by {d < 0}
    image = _over(image, np.array(OUTLINE) / 255, cover(distance - OUTLINE_WIDTH))
    image = _over(image, scenes.colour[:, None, None], cover(distance))
    image = _paint_pattern(image, scenes, distance, u, v, cover)
    chosen = np.isfinite(scenes.rim[:, 0])
    if chosen.any():
        rim, core, radius = (values[chosen][:, None, None] for values in (scenes.rim, scenes.core, scenes.radius))
        distance, u, v = distance[chosen], u[chosen], v[chosen]
        ringed = _over(image[chosen], rim, cover(np.abs(distance + 0.06) - 0.06))
        # A crescent's body is off centre.
        shift = np.where(scenes.shape[chosen] == SHAPES.index("moon"), -0.58, 0.0)[:, None, None]
        disc = (np.hypot(u - shift, v) - 0.27) * radius
        image[chosen] = _over(ringed, core, cover(np.maximum(disc, distance)))
    return image.astype(np.float32)


def object_mask(scenes: Scenes, size: int = 64) -> np.ndarray:
    """Coverage of each pixel by the object with its outline, [B, size, size] in 0..1."""
    edge = 2.0 / size
    distance, _, _ = _object_distance(scenes, size)
    return np.clip(0.5 - (distance - OUTLINE_WIDTH) / edge, 0, 1).astype(np.float32)


def _over(image, colour, alpha):
    return image * (1 - alpha) + colour * alpha


def _grid(size):
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    return np.meshgrid(axis, axis)  # x to the right, y down


def _object_distance(scenes, size):
    """Signed distance to each object's edge in half-widths (negative inside), and its own coordinates u, v (v up)."""
    x, y = _grid(size)
    single = lambda a: a.astype(np.float32)[:, None, None]  # noqa: E731 - float32 halves the rendering time
    dx, dy = x[None] - single(scenes.centre[:, 0]), y[None] - single(scenes.centre[:, 1])
    c, s, radius = single(np.cos(scenes.angle)), single(np.sin(scenes.angle)), single(scenes.radius)
    u, v = (c * dx + s * dy) / radius, -(-s * dx + c * dy) / radius
    distance = np.empty_like(u)
    for k, name in enumerate(SHAPES):
        chosen = scenes.shape == k
        if chosen.any():
            distance[chosen] = _SDF[name](u[chosen], v[chosen])
    return distance * radius, u, v


def _box(u, v, a, b):
    return np.maximum(np.abs(u) - a, np.abs(v) - b)


def _star(u, v):
    angle = np.abs((np.arctan2(u, v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    r = np.hypot(u, v)
    tip, notch = np.array([1.1, 0.0]), 0.5 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    along = notch - tip
    normal = np.array([-along[1], along[0]]) / np.hypot(*along)
    return (
        -((r * np.cos(angle) - tip[0]) * normal[0] + (r * np.sin(angle) - tip[1]) * normal[1]) * np.sign(normal[0]) * -1
    )


def _heart(u, v):
    v = v + 0.1
    a = 0.55
    lobes = np.hypot(np.abs(u) - a * 0.7071, v - a * 0.7071) - a
    diamond = (np.abs(u) + np.abs(v)) * 0.7071 - a
    return np.minimum(lobes, diamond)


_SDF = {
    "circle": lambda u, v: np.hypot(u, v) - 0.9,
    "square": lambda u, v: _box(u, v, 0.78, 0.78),
    "triangle": lambda u, v: np.maximum(0.866 * np.abs(u) + 0.5 * (v + 0.15), -(v + 0.15)) - 0.56,
    "star": _star,
    "heart": _heart,
    "flower": lambda u, v: (np.hypot(u, v) - (0.76 + 0.2 * np.cos(6 * np.arctan2(u, v)))) * 0.75,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.92, 0.32), _box(u, v, 0.32, 0.92)),
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 0.92, 0.74 - np.hypot(u - 0.5, v)),
}


def _paint_pattern(image, scenes, distance, u, v, cover):
    """Stripes or dots in a contrasting tone, inside the body only."""
    for name in PATTERNS[1:]:
        chosen = scenes.pattern == PATTERNS.index(name)
        if not chosen.any():
            continue
        colour, radius = scenes.colour[chosen], scenes.radius[chosen][:, None, None]
        light = colour.mean(1) > 0.75
        tone = np.where(light[:, None], colour * 0.45, 0.25 * colour + 0.75)[:, None, None]
        pitch = 0.26 / radius  # the same pitch in the picture for objects of any size
        cell_u, cell_v = (u[chosen] / pitch) % 1 - 0.5, (v[chosen] / pitch) % 1 - 0.5
        marks = (np.abs(cell_u) - 0.22 if name == "striped" else np.hypot(cell_u, cell_v) - 0.27) * pitch * radius
        image[chosen] = _over(image[chosen], tone, cover(np.maximum(marks, distance[chosen])))
    return image


def _enlarged(values, size):
    """Values [n, n], each repeated to make up [size, size]."""
    times = -(-size // len(values))
    return values.repeat(times, 0).repeat(times, 1)[:size, :size]


def _background(name, size, rng):
    """One background, [size, size, 3] in 0..1; `rng` only varies its details."""
    x, y = _grid(size)
    flat = {
        "redwall": (200, 70, 65),
        "bluewall": (80, 125, 205),
        "yellowwall": (235, 205, 90),
        "greywall": (140, 140, 145),
    }
    rgb = lambda *c: np.array(c, float) / 255  # noqa: E731
    mix = lambda a, b, t: a + (b - a) * np.clip(t, 0, 1)[..., None]  # noqa: E731
    shade = rng.uniform(0.94, 1.06)
    if name in flat:
        return np.clip(mix(rgb(*flat[name]), rgb(*flat[name]) * 0.86, (y + 1) / 2) * shade, 0, 1)
    horizon = rng.uniform(-0.15, 0.15)
    ground = np.clip((y - horizon) * size * 0.25 + 0.5, 0, 1)
    grain = _enlarged(rng.random((64, 64)), size)
    if name == "beach":
        sky = mix(rgb(130, 200, 245), rgb(205, 235, 250), (y + 1) / (1 + horizon))
        sea = rgb(40, 140, 190)
        wet = ((y > horizon - 0.28) & (y <= horizon))[..., None]
        picture = mix(np.where(wet, sea, sky), rgb(238, 214, 160), ground)
    elif name == "meadow":
        picture = mix(mix(rgb(120, 190, 245), rgb(215, 240, 255), (y + 1) / 1.2), rgb(95, 175, 65), ground)
        picture = np.where((grain < 0.03)[..., None] & (y > horizon)[..., None], rgb(60, 130, 45), picture)
    elif name == "night":
        picture = mix(rgb(12, 14, 45), rgb(40, 35, 85), (y + 1) / 2)
        picture = np.where((grain < 0.01)[..., None], rgb(200, 200, 180), picture)
    elif name == "snow":
        picture = mix(rgb(175, 200, 222), rgb(240, 246, 252), ground)
    elif name == "brick":
        x, y = _grid(min(size, 64))  # joints are as wide in larger pictures as at 64 pixels
        row = np.floor((y + 1) * 4)
        mortar = (((y + 1) * 4 % 1) < 0.16) | (((x + 1 + rng.random()) * 2 + 0.5 * (row % 2)) % 1 < 0.08)
        mortar = _enlarged(mortar, size)
        picture = np.where(mortar[..., None], rgb(205, 195, 185), rgb(158, 78, 58))
    elif name == "checker":
        shift = rng.random(2)
        odd = (np.floor((x + shift[0]) * 2) + np.floor((y + shift[1]) * 2)) % 2
        picture = np.where(odd[..., None] > 0, rgb(60, 60, 66), rgb(225, 222, 214))
    elif name == "sunset":
        picture = mix(rgb(95, 45, 120), rgb(255, 150, 60), (y + 1) / (1 + horizon))
        picture = mix(picture, rgb(70, 35, 60), ground)
    elif name == "sea":
        wave = 0.5 + 0.5 * np.sin(x * 5 + 3 * y + rng.uniform(0, 6.28))
        picture = mix(mix(rgb(25, 170, 185), rgb(8, 60, 110), (y + 1) / 2), rgb(90, 215, 215), wave * 0.22)
    return np.clip(picture * shade, 0, 1)
