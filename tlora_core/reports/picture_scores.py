"""How much drawn pictures look like the subject, follow their prompts, and copy the rest of the training pictures.

One measurement for the scores during a training and for T-LoRA Evaluate. What "looks like" means is an encoder's
business: CLIP, DINO, or the tiny world's own scorer.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import TLoRAError

MASKED = 0.5  # grey value of what does not count
MIDDLE = 0.6  # side of the box that stands for the subject of a picture without a mask, as a share of the picture's


class Encoder(Protocol):
    """What sees pictures. name: tells encoders apart, as only scores of one and the same can be compared. why_no_text:
    "" if it can tell how well pictures follow their prompts; otherwise why not, as a sentence for the user."""

    name: str
    why_no_text: str

    def subjects(self, pictures: Tensor, masks: Tensor | None = None) -> Tensor:
        """What the subjects look like: unit vectors [N, d], float32 on the CPU, of pictures [N, H, W, 3] in 0..1.
        masks [N or 1, H, W] in 0..1: where the subjects are, if that is known."""
        ...

    def scenes(self, pictures: Tensor, masks: Tensor | None = None) -> Tensor:
        """What is not the subjects: unit vectors in the same form. Without masks, all of the pictures may count."""
        ...

    def follows(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """How well each of the pictures [N, H, W, 3] follows its prompt: [N]; 1 is the most, NaN where the prompt asks
        for nothing that can be seen. Only without why_no_text."""
        ...


class WholePictureEncoder(ABC):
    """An encoder of whole pictures, for which the part of a picture that does not count becomes grey."""

    _last: tuple[Tensor, Tensor] | None = None  # pictures and what was seen in them, as all measures ask for the same

    @abstractmethod
    def images(self, pictures: Tensor) -> Tensor:
        """Unit vectors [N, d], float32 on the CPU, of pictures [N, H, W, 3] in 0..1."""

    def seen(self, pictures: Tensor) -> Tensor:
        """`images`, computed once for the same tensor asked for again and again."""
        if self._last is None or self._last[0] is not pictures:
            self._last = pictures, self.images(pictures)
        return self._last[1]

    def subjects(self, pictures: Tensor, masks: Tensor | None = None) -> Tensor:
        return self.seen(masked(pictures, masks))

    def scenes(self, pictures: Tensor, masks: Tensor | None = None) -> Tensor:
        return self.seen(masked(pictures, None if masks is None else 1 - masks.clamp(0, 1)))


@dataclass(frozen=True, eq=False)
class Concept:
    """The training pictures as an encoder sees them: unit vectors [M, d] of the subjects, and of all the rest."""

    subjects: Tensor
    scenes: Tensor

    @classmethod
    def seen_by(cls, encoder: Encoder, pictures: Sequence[Tensor], masks: Sequence[Tensor | None]) -> "Concept":
        """pictures: each [H, W, 3] in 0..1. masks: the subject [H, W] in each, or None; without one the whole picture
        counts as the subject, and what surrounds its middle is the rest."""
        subjects, scenes = [], []
        for picture, mask in zip(pictures, masks, strict=True):
            subjects.append(encoder.subjects(picture[None], None if mask is None else mask[None]))
            scenes.append(encoder.scenes(picture[None], (middle(picture) if mask is None else mask)[None]))
        return cls(torch.cat(subjects), torch.cat(scenes))


def masked(pictures: Tensor, masks: Tensor | None) -> Tensor:
    """`pictures`, grey outside the masks [N or 1, H, W], on their device."""
    if masks is None:
        return pictures
    weight = masks.to(pictures.device).clamp(0, 1).unsqueeze(-1)
    return pictures * weight + MASKED * (1 - weight)


def middle(picture: Tensor) -> Tensor:
    """A mask [H, W] of the middle of a picture [H, W, 3]."""
    height, width = picture.shape[:2]
    mask = torch.zeros(height, width)
    top, left = round(height * (1 - MIDDLE) / 2), round(width * (1 - MIDDLE) / 2)
    mask[top : height - top, left : width - left] = 1
    return mask


def likeness(encoder: Encoder, concept: Concept, pictures: Tensor, masks: Tensor | None = None) -> Tensor:
    """How much each of the pictures [N, H, W, 3] looks like the subject: the mean cosine with the training pictures,
    [N]. masks [N or 1, H, W]: where the subject is in the drawn pictures, if that is known."""
    return (encoder.subjects(pictures, masks) @ concept.subjects.T).mean(1)


def copying(encoder: Encoder, concept: Concept, pictures: Tensor) -> Tensor:
    """How much each of the pictures [N, H, W, 3], whose prompts ask for another scene, looks like what is not the
    subject in the training pictures: the cosine with the nearest of them, [N]."""
    return (encoder.scenes(pictures) @ concept.scenes.T).amax(1)


def obedience(encoder: Encoder, pictures: Tensor, prompt: str, token: str) -> Tensor:
    """How well each of the pictures [N, H, W, 3] follows the prompt without its token, [N]."""
    return encoder.follows(pictures, [without_token(prompt, token)] * len(pictures))


def without_token(prompt: str, token: str) -> str:
    """The prompt without the token: "a sks dog in the snow" becomes "a dog in the snow"."""
    if not token.strip():
        return prompt
    return re.sub(r"\s+", " ", re.sub(rf"(?<!\w){re.escape(token.strip())}(?!\w)", "", prompt)).strip()


def are_neutral(prompts: Sequence[str], neutral_prompt: str) -> list[bool]:
    """Which of the prompts are the neutral one; all if it is empty. Raises TLoRAError if none is."""
    if not neutral_prompt.strip():
        return [True] * len(prompts)
    found = [prompt.strip() == neutral_prompt.strip() for prompt in prompts]
    if not any(found):
        raise TLoRAError(
            f'neutral_prompt is "{neutral_prompt}", which is not one of the prompts; add it to them, or leave it empty.'
        )
    return found
