"""Reads the colour of a concept's body, by the world's own rules.

The tiny base's scorer never saw a rim or a core, and takes them for the colour: on rendered concepts it names the
body's colour in 13% to 99% of the pictures, depending on the concept. Here only the outline, rim and core determine the
concept's pose. Then the body is compared with the concept rendered in that pose in each colour. Patterns are neither
read nor asked for: in half of the concepts, rim and core leave too little body.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from tlora_core.tiny import world
from tlora_core.tiny.scorer import SIZE, at_size

COLOURS = (*world.COLOURS, "own")  # own: the concept's own colour, which no prompt names
_COARSE = 32  # side at which the pose is searched


class ColourReader:
    """Reads one concept's body colour. The place is an input, because the tiny base's scorer reads it without error.

    through: a function that passes pictures [B, 64, 64, 3] through the tiny base's autoencoder. It changes the colours
        of thin bodies, and drawn pictures are compared with its output.
    """

    def __init__(
        self, concept: world.Concept, through: Callable[[torch.Tensor], torch.Tensor] = lambda pictures: pictures
    ):
        self.concept, self.through = concept, through
        self.bodies = np.array([*world.COLOURS.values(), concept.body]) / 255
        self.templates = {name: self._search(centre) for name, centre in world.PLACES.items()}

    def read(self, pictures: torch.Tensor, places: Sequence[str]) -> list[str]:
        """The colour, one of COLOURS, of each of `pictures` [B, H, W, 3] in 0..1. `places`: the object's place in
        each."""
        pictures = at_size(pictures.movedim(-1, 1))
        return [COLOURS[self._read(picture, place)] for picture, place in zip(pictures, places)]

    def _read(self, picture, place):
        poses, templates, weights = self.templates[place]
        coarse = avg_pool2d(picture, SIZE // _COARSE).movedim(0, -1).flatten()
        pose = poses[int(((templates - coarse).abs() * weights).sum(1).argmin())]
        scenes = self._scenes(np.repeat(pose[None], len(self.bodies), 0), self.bodies)
        drawn = self.through(torch.from_numpy(world.render(scenes, SIZE))).movedim(-1, 1)
        mask = torch.from_numpy(world.object_mask(scenes, SIZE))[:, None]
        # Both are blurred, so that the autoencoder's blur and an error of a pixel in the pose matter less.
        return int(((_blurred(drawn) - _blurred(picture)).abs() * mask).sum((1, 2, 3)).argmin())

    def _search(self, centre):
        """(poses [P, 4], pictures [P, n], weights [P, n] that are zero on the body and sum to 1) around a place."""
        near = (-0.1, -0.05, 0, 0.05, 0.1)
        poses = np.array(
            [
                (centre[0] + x, centre[1] + y, r, a)
                for x in near
                for y in near
                for r in (0.5, 0.55, 0.6)
                for a in (-0.2, -0.1, 0, 0.1, 0.2)
            ]
        )
        dark, light = (
            world.render(self._scenes(poses, np.full((len(poses), 3), shade)), _COARSE) for shade in (0.0, 1.0)
        )
        mask = world.object_mask(self._scenes(poses, np.zeros((len(poses), 3))), _COARSE)
        weights = torch.from_numpy(mask[..., None] * (1 - (light - dark))).flatten(1)
        return poses, torch.from_numpy((dark + light) / 2).flatten(1), weights / weights.sum(1, keepdim=True)

    def _scenes(self, poses, bodies):
        scenes = world.concept_scenes(self.concept, len(poses), np.random.default_rng(0), background="greywall")
        scenes.centre, scenes.radius, scenes.angle, scenes.colour = poses[:, :2], poses[:, 2], poses[:, 3], bodies
        return scenes


def concept_pictures(
    concept: world.Concept, count: int, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, list[str]]]:
    """Rendered pictures of the concept in its own and in named colours, [count, 64, 64, 3], and their attributes."""
    scenes, index = world.concept_scenes(concept, count, rng), rng.integers(len(COLOURS), size=count)
    named = index < len(world.COLOURS)
    scenes.colour[named] = np.array(list(world.COLOURS.values()))[index[named]] / 255
    backgrounds, places = list(world.BACKGROUNDS), list(world.PLACES)
    shown = {
        "colour": [COLOURS[i] for i in index],
        "background": [backgrounds[i] for i in scenes.background],
        "place": [places[i] for i in scenes.place],
    }
    return torch.from_numpy(world.render(scenes)), shown


def _blurred(pixels):
    return avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
