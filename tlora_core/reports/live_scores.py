"""The scores of a training, measured at each validation on the pictures drawn for it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev

from torch import Tensor

from ..errors import TLoRAError
from ..training.dataset import Framed, TrainingImage
from ..training.images import check_images
from .picture_scores import Concept, Encoder, copying, likeness, obedience, require_neutral

MEASURES = ("likeness", "obedience", "copying")


@dataclass(frozen=True)
class Score:
    """A mean over pictures, and its standard error over seeds and prompts; 0 for a single picture."""

    mean: float
    error: float


@dataclass(frozen=True)
class PictureScores:
    """The scores of one picture; None where a measure does not apply to it."""

    likeness: float | None
    obedience: float | None
    copying: float | None


@dataclass(frozen=True)
class StepScores:
    """The scores at one step of a training; a measure is None if it was not measured.

    likeness: of the pictures of the neutral prompt. obedience: of all pictures. copying: of the pictures of the other
    prompts. pictures: the scores of each picture, by prompt and then by seed."""

    step: int
    likeness: Score | None
    obedience: Score | None
    copying: Score | None
    pictures: tuple[tuple[PictureScores, ...], ...]

    @classmethod
    def of(cls, step: int, pictures: Sequence[Sequence[PictureScores]]) -> "StepScores":
        """The means of the scores of pictures."""
        of_each = [picture for of_prompt in pictures for picture in of_prompt]
        means = {name: _mean([getattr(picture, name) for picture in of_each]) for name in MEASURES}
        return cls(step, pictures=tuple(tuple(of_prompt) for of_prompt in pictures), **means)

    def to_json(self) -> dict:
        """Plain values: {"step": int, "pictures": a list for each prompt of {"likeness", "obedience", "copying"}}. The
        means follow from these."""
        return {"step": self.step, "pictures": [[asdict(one) for one in of_prompt] for of_prompt in self.pictures]}

    @classmethod
    def from_json(cls, found: object) -> "StepScores":
        """The inverse of to_json. Raises TLoRAError if `found` is anything else."""
        try:
            return cls.of(_whole(_field(found, "step")), [[_picture(p) for p in r] for r in _field(found, "pictures")])
        except (TypeError, ValueError) as error:
            raise TLoRAError(f"These are not the scores of a training step ({error}); delete their file.") from error


class LiveScorer:
    """Measures a training by the pictures that it draws at its validations.

    concept: the training pictures with their masks, as the user gave them or as framed. prompts: as they are drawn,
    with token and class word in them. neutral_prompt: one of the prompts, whose pictures count for likeness; the others
    ask for other scenes, so their pictures count for copying. Raises TLoRAError if the neutral prompt is missing.
    """

    def __init__(
        self,
        encoder: Encoder,
        concept: Sequence[TrainingImage | Framed],
        prompts: Sequence[str],
        neutral_prompt: str,
        token: str,
    ):
        self.encoder, self.prompts, self.token = encoder, list(prompts), token
        self.is_neutral = require_neutral(prompts, neutral_prompt)
        self.concept = Concept.seen_by(encoder, [one.pixels for one in concept], [one.mask for one in concept])

    @property
    def remark(self) -> str:
        """A sentence for the user on what is not measured; "" if all is."""
        return self.encoder.why_no_text

    def measure(self, step: int, pictures: Sequence[Tensor]) -> StepScores:
        """The scores at a step. pictures: for each prompt a batch [S, H, W, 3] in 0..1, drawn from the same S seeds at
        every step. Raises TLoRAError if they are not batches of equal numbers of pictures, one for each prompt."""
        sizes = {len(check_images(batch, "pictures")) for batch in pictures}
        if len(pictures) != len(self.prompts) or len(sizes) != 1:
            raise TLoRAError(
                f"pictures are {len(pictures)} batches of {sorted(sizes)} pictures for {len(self.prompts)} prompts; "
                "give a batch for each prompt, each with as many pictures as seeds."
            )
        found = zip(pictures, self.prompts, self.is_neutral, strict=True)
        return StepScores.of(step, [self._of_prompt(*one) for one in found])

    def _of_prompt(self, pictures, prompt, is_neutral):
        none = [None] * len(pictures)
        alike = likeness(self.encoder, self.concept, pictures).tolist() if is_neutral else none
        copied = none if is_neutral else copying(self.encoder, self.concept, pictures).tolist()
        obeys = obedience(self.encoder, pictures, prompt, self.token).tolist() if not self.encoder.why_no_text else none
        return [PictureScores(*values) for values in zip(alike, obeys, copied)]


def _mean(values: Sequence[float | None]) -> Score | None:
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    return Score(fmean(measured), stdev(measured) / sqrt(len(measured)) if len(measured) > 1 else 0.0)


def _field(found, name):
    if not isinstance(found, Mapping) or name not in found:
        raise ValueError(f"{name} is missing")
    return found[name]


def _whole(value):
    if type(value) is not int or value < 0:
        raise ValueError(f"step is {value!r}, not a whole number from 0")
    return value


def _picture(found):
    values = {name: _field(found, name) for name in MEASURES}
    for name, value in values.items():
        if value is not None and (type(value) not in (int, float) or not isfinite(value)):
            raise ValueError(f"{name} is {value!r}, not a number")
    return PictureScores(**values)
