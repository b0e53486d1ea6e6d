"""Sees pictures of the tiny world as CLIP and DINO see others, for the scores of a training; needs no download."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, normalize

from . import world
from .scorer import AttributeScorer, at_size

SCORER = Path(__file__).parent / "weights" / "scorer.safetensors"
NAME = "tiny world"
SIDE, REACH = 24, 0.45  # pixels and half-widths of the part of a picture that shows its object
GREY = 0.5


class TinyEncoder:
    """The tiny world's own scorer as an encoder; see `reports.picture_scores.Encoder`. What it says of pictures from
    elsewhere means nothing."""

    name = NAME
    why_no_text = ""

    def __init__(self):
        self.scorer = AttributeScorer()
        weights = load_file(SCORER)
        self.scorer.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        self.scorer.eval()

    @torch.inference_mode()
    def subjects(self, pictures: Tensor, masks: Tensor | None = None) -> Tensor:
        """The blurred picture around the place at which the scorer sees the object, as differences from grey. The
        object fills it, so masks change nothing. Of what was tried on trainings of concepts that no comparison uses,
        this follows the distance of `ConceptMatcher` best."""
        pixels = pictures.float().cpu().movedim(-1, 1)
        found = self._probabilities(pictures)["place"] @ torch.tensor(list(world.PLACES.values()))
        return normalize((_blurred(_around(pixels, found)) - GREY).flatten(1), dim=-1)

    @torch.inference_mode()
    def scenes(self, pictures: Tensor, masks: Tensor | None = None) -> Tensor:
        """The square roots of the probabilities of backgrounds and places, so that a cosine is the mean of what two
        pictures have in common of each."""
        seen = self._probabilities(pictures)
        return normalize(torch.cat([seen["background"].sqrt(), seen["place"].sqrt()], dim=1), dim=-1)

    @torch.inference_mode()
    def follows(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """The mean probability of the background and the place that each prompt names; NaN if it names none. Shapes and
        colours do not count, as the scorer does not know those of a subject with a rim and a core."""
        seen = self._probabilities(pictures)
        named = [[seen[name][i, value] for name, value in asked(prompt)] for i, prompt in enumerate(prompts)]
        return torch.stack([torch.stack(found).mean() if found else torch.tensor(torch.nan) for found in named])

    def _probabilities(self, pictures):
        return {name: logits.softmax(1) for name, logits in self.scorer(_pixels(pictures)).items()}


def asked(prompt: str) -> list[tuple[str, int]]:
    """The background and the place that a prompt names: (name of the attribute, index of its value)."""
    phrases = {
        "background": tuple(world.BACKGROUNDS.values()),
        "place": tuple(world.PLACE_WORDS.values()),
    }
    text = f" {prompt.lower()} "
    return [(name, i) for name, values in phrases.items() for i, value in enumerate(values) if f" {value} " in text]


def _around(pixels: Tensor, centres: Tensor) -> Tensor:
    """[N, 3, SIDE, SIDE]: the part of `pixels` [N, 3, H, W] around the centres [N, 2] in half-widths."""
    axis = ((torch.arange(SIDE) + 0.5) / SIDE * 2 - 1) * REACH
    offsets = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    return grid_sample(pixels, centres[:, None, None] + offsets, padding_mode="border", align_corners=False)


def _blurred(pixels):
    return avg_pool2d(pixels, 5, 1, 2, count_include_pad=False)


def _pixels(pictures):
    return at_size(pictures.float().cpu().movedim(-1, 1)) * 2 - 1
