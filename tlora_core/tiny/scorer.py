"""Scorers for pictures of the tiny world, independent of the model that made them.

`AttributeScorer` is a small classifier trained on rendered pictures only. `ConceptMatcher` renders a concept by the
world's rules and needs no training.
"""

import itertools

import numpy as np
import torch
from torch import nn

from . import world

SIZE = 64  # pictures are scored at this size

HEADS = {
    "shape": len(world.SHAPES),
    "colour": len(world.COLOURS),
    "pattern": len(world.PATTERNS),
    "background": len(world.BACKGROUNDS),
    "place": len(world.PLACES),
}


def at_size(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] averaged down to the scorers' input size."""
    return nn.functional.adaptive_avg_pool2d(pixels, SIZE)


class AttributeScorer(nn.Module):
    """Classifies the shape, colour, pattern, background and place in a picture."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 3 * width, 4 * width]
        blocks = []
        for a, b in zip(widths, widths[1:]):
            blocks += [
                nn.Conv2d(a, b, 3, stride=2, padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * width * 16, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, count) for name, count in HEADS.items()})

    def forward(self, pixels):
        """Logits [B, values] of each attribute for `pixels` [B, 3, 64, 64] in -1..1."""
        features = self.trunk(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, pixels) -> dict[str, torch.Tensor]:
        """Index of the most likely value of each attribute, [B] each, for `pixels` [B, H, W, 3] in 0..1."""
        return {name: logits.argmax(1) for name, logits in self(at_size(pixels.movedim(-1, 1)) * 2 - 1).items()}


class ConceptMatcher:
    """The distance of a picture from a concept: the mean absolute RGB error over the object's pixels in the best pose,
    0 (the concept itself) to 1. The pose is searched on a coarse grid of place, size and angle, then on finer grids
    around the best pose."""

    def __init__(self, concept: world.Concept):
        self.concept = concept
        place, radii, angles = np.linspace(-0.48, 0.48, 13), (0.5, 0.55, 0.6), np.linspace(-0.3, 0.3, 5)
        self.coarse = self._templates(np.array(list(itertools.product(place, place, radii, angles))), SIZE // 2)

    def _templates(self, poses, size=SIZE):
        """The concept in each pose: (poses [P, 4], pictures [P, n], weights [P, n] that sum to 1)."""
        scenes = self.scenes(len(poses))
        scenes.centre, scenes.radius, scenes.angle = poses[:, :2], poses[:, 2], poses[:, 3]
        pictures = torch.from_numpy(world.render(scenes, size)).flatten(1)
        mask = torch.from_numpy(world.object_mask(scenes, size)).unsqueeze(-1).expand(-1, -1, -1, 3).flatten(1)
        return poses, pictures, mask / mask.sum(1, keepdim=True)

    def scenes(self, count: int) -> world.Scenes:
        """`count` scenes with the concept's look; the poses are set afterwards."""
        return world.concept_scenes(self.concept, count, np.random.default_rng(0), background="greywall")

    def distance(self, pictures: torch.Tensor) -> torch.Tensor:
        """The distances [B] of `pictures` [B, H, W, 3] in 0..1."""
        return self.fit(pictures)[0]

    def fit(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(distances [B], best poses [B, 4]: x and y of the centre and radius in half-widths of the picture, angle in
        radians)."""
        pictures = at_size(pictures.movedim(-1, 1))
        found = [self._fit(picture) for picture in pictures]
        return torch.stack([error for error, _ in found]), torch.from_numpy(np.stack([pose for _, pose in found]))

    def _fit(self, picture):
        """(error, best pose) of `picture` [3, SIZE, SIZE]."""
        half = nn.functional.avg_pool2d(picture, 2)
        pose = _best(half.movedim(0, -1).flatten(), self.coarse)[1]
        for steps in _FINE:
            near = pose + np.array(list(itertools.product(*steps)))
            error, pose = _best(picture.movedim(0, -1).flatten(), self._templates(near))
        return error, pose


# Offsets from the best pose so far: first of place and size, then of place and angle.
_FINE = (
    ((-0.04, -0.02, 0, 0.02, 0.04), (-0.04, -0.02, 0, 0.02, 0.04), (-0.03, 0, 0.03), (0,)),
    ((-0.02, 0, 0.02), (-0.02, 0, 0.02), (0,), (-0.1, -0.05, 0, 0.05, 0.1)),
)


def _best(picture, templates):
    """(error, pose) of the best template."""
    poses, pictures, weights = templates
    errors = ((picture - pictures).abs() * weights).sum(1)
    return errors.min(), poses[int(errors.argmin())]
