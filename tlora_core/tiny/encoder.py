"""Sees pictures of the tiny world as CLIP and DINO see others, for the scores of a training; needs no download."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from . import world
from .scorer import AttributeScorer, at_size

SCORER = Path(__file__).parent / "weights" / "scorer.safetensors"
NAME = "tiny world"


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
        return normalize(self.scorer.trunk(_pixels(pictures)), dim=-1)

    @torch.inference_mode()
    def scenes(self, pictures: Tensor, masks: Tensor | None = None) -> Tensor:
        """The square roots of the probabilities of backgrounds and places, so that equal pictures have cosine 1."""
        seen = self._probabilities(pictures)
        return normalize(torch.cat([seen["background"].sqrt(), seen["place"].sqrt()], dim=1), dim=-1)

    @torch.inference_mode()
    def follows(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """The mean probability of the attributes that each prompt names."""
        seen = self._probabilities(pictures)
        return torch.stack(
            [
                torch.stack([seen[name][i, value] for name, value in asked(prompt)] or [torch.tensor(1.0)]).mean()
                for i, prompt in enumerate(prompts)
            ]
        )

    def _probabilities(self, pictures):
        return {name: logits.softmax(1) for name, logits in self.scorer(_pixels(pictures)).items()}


def asked(prompt: str) -> list[tuple[str, int]]:
    """The attributes that a prompt names: (name, index of the value)."""
    phrases = {
        "shape": world.SHAPES,
        "colour": tuple(world.COLOURS),
        "background": tuple(world.BACKGROUNDS.values()),
        "place": tuple(world.PLACE_WORDS.values()),
    }
    text = f" {prompt.lower()} "
    return [(name, i) for name, values in phrases.items() for i, value in enumerate(values) if f" {value} " in text]


def _pixels(pictures):
    return at_size(pictures.float().cpu().movedim(-1, 1)) * 2 - 1
