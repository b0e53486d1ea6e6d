"""The scores of a training, measured at each validation on the pictures drawn for it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, isnan, sqrt
from statistics import fmean, stdev

from torch import Tensor

from ..errors import TLoRAError
from ..training.dataset import Framed, TrainingImage
from ..training.images import check_images
from .picture_scores import Concept, Encoder, are_neutral, copying, likeness, obedience

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


IDEAL_COPY = PictureScores(likeness=1.0, obedience=0.0, copying=1.0)


@dataclass(frozen=True)
class StepScores:
    """The scores at one step of a training; a measure is None if it was not measured.

    likeness: of the pictures of the neutral prompt. obedience: of all pictures. copying: of the pictures of the other
    prompts. pictures: the scores of each picture, by prompt and then by seed. copy: what the training picture itself
    would score, drawn whatever the prompt."""

    step: int
    likeness: Score | None
    obedience: Score | None
    copying: Score | None
    pictures: tuple[tuple[PictureScores, ...], ...]
    copy: PictureScores = IDEAL_COPY

    @classmethod
    def of(
        cls, step: int, pictures: Sequence[Sequence[PictureScores]], copy: PictureScores = IDEAL_COPY
    ) -> "StepScores":
        """The means of the scores of pictures."""
        of_each = [picture for of_prompt in pictures for picture in of_prompt]
        means = {name: _mean([getattr(picture, name) for picture in of_each]) for name in MEASURES}
        return cls(step, pictures=tuple(tuple(of_prompt) for of_prompt in pictures), copy=copy, **means)

    def to_json(self) -> dict:
        """Plain values: {"step": int, "pictures": a list for each prompt of {"likeness", "obedience", "copying"},
        "copy": the same}. The means follow from these."""
        pictures = [[asdict(one) for one in of_prompt] for of_prompt in self.pictures]
        return {"step": self.step, "pictures": pictures, "copy": asdict(self.copy)}

    @classmethod
    def from_json(cls, found: object) -> "StepScores":
        """The inverse of to_json. Raises TLoRAError if `found` is anything else."""
        try:
            pictures = [[_picture(one) for one in of_prompt] for of_prompt in _field(found, "pictures")]
            return cls.of(_whole(_field(found, "step")), pictures, _picture(_field(found, "copy")))
        except (TypeError, ValueError) as error:
            raise TLoRAError(f"These are not the scores of a training step ({error}); delete their file.") from error


class LiveScorer:
    """Measures a training by the pictures that it draws at its validations.

    concept: the training pictures with their masks, as the user gave them or as framed. prompts: as they are drawn,
    with token and class word in them. neutral_prompt: one of the prompts, whose pictures count for likeness; the others
    ask for other scenes, so their pictures count for copying. If it is empty, all pictures count for likeness, and none
    for copying. token: a word that the encoder does not know. Raises TLoRAError if the neutral prompt is missing.
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
        self.is_neutral = are_neutral(prompts, neutral_prompt)
        shown = [one.pixels for one in concept]
        self.concept = Concept.seen_by(encoder, shown, [one.mask for one in concept])
        self.copy = self._copy(shown)

    @property
    def remark(self) -> str:
        """A sentence for the user on what is not measured; "" if all is."""
        return self.encoder.why_no_text

    def measure(
        self, step: int, pictures: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> StepScores:
        """The scores at a step. pictures: for each prompt a batch [S, H, W, 3] in 0..1, drawn from the same S seeds at
        every step. masks: where the subject is in them [S or 1, H, W], if that is known. Raises TLoRAError if there is
        not one batch for each prompt."""
        for batch in pictures:
            check_images(batch, "images")
        if len(pictures) != len(self.prompts):
            raise TLoRAError(
                f"images are {len(pictures)} batches and prompts {len(self.prompts)} texts; connect a prompt for each "
                "batch of images."
            )
        found = zip(pictures, self.prompts, self.is_neutral, masks or [None] * len(pictures), strict=True)
        return StepScores.of(step, [self._of_prompt(*one) for one in found], self.copy)

    def _copy(self, concept: Sequence[Tensor]) -> PictureScores:
        """The mean scores of the training pictures [H, W, 3], as if they were drawn for each of the prompts."""
        drawn = [
            self._of_prompt(picture[None], prompt, is_neutral)
            for picture in concept
            for prompt, is_neutral in zip(self.prompts, self.is_neutral)
        ]
        means = StepScores.of(0, drawn)
        return PictureScores(*(score and score.mean for score in (means.likeness, means.obedience, means.copying)))

    def _of_prompt(self, pictures, prompt, is_neutral, masks=None):
        none = [None] * len(pictures)
        alike = likeness(self.encoder, self.concept, pictures, masks).tolist() if is_neutral else none
        copied = none if is_neutral else copying(self.encoder, self.concept, pictures).tolist()
        reads = not self.encoder.why_no_text
        obeys = obedience(self.encoder, pictures, prompt, self.token).tolist() if reads else none
        return [
            PictureScores(*(None if value is None or isnan(value) else value for value in values))
            for values in zip(alike, obeys, copied)
        ]


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
