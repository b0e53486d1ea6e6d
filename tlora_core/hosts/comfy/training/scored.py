"""The validations of a run: the pictures, their scores, and the T-LoRA of the best step so far."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from comfy.model_management import InterruptProcessingException
from comfy.sd import CLIP
from torch import Tensor

from ....errors import TLoRAError
from ....files.tlora_file import TLoRAFile
from ....files.untrusted import one_line
from ....method.adapters import LowRank
from ....reports.live_scores import MEASURES, LiveScorer, StepScores
from ....reports.picture_scores import Encoder
from ....reports.stopping import Verdict, verdict
from ....training.dataset import TrainingImage, caption_of, frame
from ....training.images import thumbnail as make_thumbnail
from ....training.run_folder import Recorder, RunFolder
from ..draw import strip
from ..encoders import VisionEncoder, load_scorer
from ..page.training import LiveRun
from .failure import forget_failed_step, ran_out_of_memory
from .keeping import LAST, STOP_WHEN_PAST, Keeping
from .personalize import Personalization, TrainRequest

# What is drawn for the scores where the user gives no prompts: other scenes, in words that the tiny base knows too.
SCENES = (
    "a photo of {token} {class_word} on the beach",
    "a photo of {token} {class_word} in the snow",
    "a photo of {token} {class_word} by a brick wall",
)

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Kept:
    """The T-LoRA of a step, in float32 on the CPU, and the small picture for its file, if it holds one."""

    step: int
    tlora: TLoRAFile
    thumbnail: bytes | None


def drawn_prompts(keeping: Keeping, request: TrainRequest) -> list[str]:
    """What a validation draws. With scores, the neutral prompt comes first: a photo of the subject."""
    asked = keeping.validation_prompts or (SCENES if keeping.is_scored else ())
    prompts = [caption_of(prompt, request.token, request.class_word) for prompt in asked]
    return list(dict.fromkeys([request.prompt, *prompts])) if keeping.is_scored else prompts


def encoder_of(keeping: Keeping, clip: CLIP) -> Encoder:
    """What sees the pictures for the scores. A folder's encoder stays on the CPU, as it would take the training's
    memory on the card for the few pictures of a validation. Raises TLoRAError."""
    if keeping.clip_vision is None:
        return load_scorer(keeping.scorer, on_cpu=True)
    return VisionEncoder(keeping.clip_vision, clip)


def live_scorer(encoder: Encoder, personalization: Personalization, images: Sequence[TrainingImage], keeping: Keeping):
    """The scorer of a run, which compares with the pictures as they are trained. Raises TLoRAError."""
    request, unit = personalization.request, int(personalization.vae.spacial_compression_encode())
    concept = [frame(image, request.framing, request.resolution, unit) for image in images]
    prompts = drawn_prompts(keeping, request)
    return LiveScorer(encoder, concept, prompts, request.prompt, request.token)


class Validations:
    """Draws the pictures of a run at its validations, scores them where there is a scorer, and keeps the T-LoRA of the
    best step. Where one of these fails, the user is told, and the training goes on."""

    def __init__(
        self,
        personalization: Personalization,
        keeping: Keeping,
        scorer: LiveScorer | None,
        folder: RunFolder,
        recorder: Recorder,
        live: LiveRun,
    ):
        self.personalization, self.keeping, self.scorer = personalization, keeping, scorer
        self.folder, self.recorder, self.live = folder, recorder, live
        self.prompts = drawn_prompts(keeping, personalization.request)
        self.seeds = range(1 if scorer is None else keeping.score_seeds)
        self.scores: list[StepScores] = []
        self.best: Kept | None = None
        self.thumbnail: bytes | None = None  # of the last validation
        self._draws_together = True
        self._show_scores()

    def validate(self) -> None:
        """Draws and scores the pictures of the current step. Lets the host's interrupt through."""
        step = self.personalization.trainer.step
        drawn = self._or_told("validation pictures", self._drawn)
        if drawn is None:
            return
        tlora, pictures = drawn
        scorer = self.scorer
        scores = None if scorer is None else self._or_told("scores", lambda: measured(scorer, step, pictures))
        if self.keeping.thumbnail:
            first = self._first_prompt(pictures)
            self.thumbnail = self._or_told("thumbnail", lambda: make_thumbnail(first))
        self._or_told("validation pictures", lambda: self._show(step, pictures, scores))
        if scores is not None:
            self.scores.append(scores)
            self._keep_if_best(step, tlora)
            self._show_scores()
            self._or_told("record of the scores", self._record_scores)

    def begin(self) -> None:
        """Scores what a run begins with: the bare model, which the verdict compares with; or the step of a run state,
        which is saved before its pictures are drawn."""
        is_due = self.scorer is not None and self.personalization.trainer.step % self.keeping.validate_every == 0
        if is_due and not self._is_scored():
            self.validate()

    def complete(self) -> None:
        """Scores the last step too, so that it can be the best."""
        if self.keeping.keep != LAST and not self._is_scored():
            self.validate()

    def _is_scored(self) -> bool:
        return bool(self.scores) and self.scores[-1].step == self.personalization.trainer.step

    @property
    def verdict(self) -> Verdict | None:
        """On all scores so far; None without any."""
        return verdict(self.scores) if self.scores else None

    @property
    def is_past(self) -> bool:
        """Whether the training is to end here, past its best."""
        found = self.verdict
        return self.keeping.keep == STOP_WHEN_PAST and found is not None and found.past >= self.keeping.patience

    def result(self) -> Kept:
        """What the run's file holds: the best step, or the current one."""
        if self.best is not None:
            return self.best
        return Kept(self.personalization.trainer.step, self.personalization.tlora(), self.thumbnail)

    @property
    def why(self) -> str:
        """Which step the file holds and why, for the user; "" if it is the last in any case."""
        if self.keeping.keep == LAST:
            return ""
        step, found = self.personalization.trainer.step, self.verdict
        if found is None or self.best is None:
            return f"The file holds step {step}, the last one, because no step was scored."
        ended = f"Ended at step {step}: {found.past} validations in a row brought no gain. " if self.is_past else ""
        return f"{ended}The file holds {found.sentence}"

    def state_dict(self) -> dict[str, Any]:
        """For the run state: plain values, bytes and tensors."""
        best = self.best and {
            "step": self.best.step,
            "layers": {str(name): [layer.up, layer.down] for name, layer in self.best.tlora.layers.items()},
            "training": json.dumps(self.best.tlora.training),
            "thumbnail": self.best.thumbnail,
        }
        return {**self._conditions(), "steps": [scores.to_json() for scores in self.scores], "best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a run state. Scores under other conditions cannot be compared with those to come, and are left
        out. Raises TLoRAError for a damaged state."""
        if self.scorer is None or any(state.get(name) != value for name, value in self._conditions().items()):
            return
        self.scores = [StepScores.from_json(scores) for scores in state["steps"]]
        if self.keeping.keep != LAST and state["best"] is not None:
            self.best = self._kept(**state["best"])
        self._show_scores()

    def _kept(self, step: int, layers: Mapping[str, Sequence[Tensor]], training: str, thumbnail: bytes | None) -> Kept:
        tlora = self.personalization.tlora()
        group = next(iter(tlora.layers.values())).group
        read = {name: LowRank(up, down, group) for name, (up, down) in layers.items()}
        return Kept(step, replace(tlora, layers=read, training=json.loads(training)), thumbnail)

    def _conditions(self) -> dict[str, Any]:
        name = None if self.scorer is None else self.scorer.encoder.name
        return {"scorer": name, "prompts": self.prompts, "seeds": list(self.seeds)}

    def _drawn(self) -> tuple[TLoRAFile, list[Tensor]]:
        """The T-LoRA of this step, and for each prompt a batch of a picture for each seed."""
        tlora = self.personalization.tlora()
        if self._draws_together:
            try:
                return tlora, self.personalization.draw(tlora, self.prompts, self.seeds)
            except Exception as error:
                if len(self.seeds) == 1 or not ran_out_of_memory(error):
                    raise
                forget_failed_step(error)
                self._draws_together = False
        singly = [self.personalization.draw(tlora, self.prompts, [seed]) for seed in self.seeds]
        return tlora, [torch.cat(of_prompt) for of_prompt in zip(*singly)]

    def _first_prompt(self, drawn: Sequence[Tensor]) -> Tensor:
        """The pictures of the user's first prompt."""
        request = self.personalization.request
        for prompt in self.keeping.validation_prompts[:1]:
            return drawn[self.prompts.index(caption_of(prompt, request.token, request.class_word))]
        return drawn[0]

    def _keep_if_best(self, step: int, tlora: TLoRAFile) -> None:
        """The best step is always the best before or the newest; see `reports.stopping`. The bare model is none."""
        if self.keeping.keep != LAST and step and verdict(self.scores).best == step:
            self.best = Kept(step, tlora, self.thumbnail)

    def _show(self, step: int, drawn: Sequence[Tensor], scores: StepScores | None) -> None:
        self.live.validation(step, strip([batch[:1] for batch in drawn]), self.prompts, scores and by_prompt(scores))
        picture = strip(drawn, self.prompts)
        self.recorder.picture(step, picture)
        self.folder.save_picture(step, picture, self.prompts)

    def _show_scores(self) -> None:
        if self.scorer is not None:
            self.live.scored(shown(self.scores))

    def _record_scores(self) -> None:
        rows = [row(scores) for scores in self.scores]
        values = {name: value for name, value in rows[-1].items() if name in MEASURES and value is not None}
        self.recorder.scores(self.scores[-1].step, values)
        self.folder.save_scores(rows, {**self._conditions(), "steps": [scores.to_json() for scores in self.scores]})

    def _or_told(self, what: str, do: Callable[[], _Result]) -> _Result | None:
        """What `do` returns; if it fails, None, and the user is told what there is none of."""
        try:
            return do()
        except InterruptProcessingException:
            raise
        except Exception as error:
            step = self.personalization.trainer.step
            logging.warning("[T-LoRA] No %s at step %s: %s", what, step, error)
            self.live.note(f"no {what} at step {step}: {one_line(error)}")
            return None


def measured(scorer: LiveScorer, step: int, drawn: Sequence[Tensor]) -> StepScores:
    """The scores of drawn pictures. Raises TLoRAError if they are no numbers."""
    scores = scorer.measure(step, drawn)
    if not all(math.isfinite(value) for value in row(scores).values() if value is not None):
        raise TLoRAError("the scorer gave NaN or infinite values.")
    return scores


def row(scores: StepScores) -> dict[str, Any]:
    """The step, and mean and standard error of each measure under its name and NAME_error; None where not measured."""
    values: dict[str, Any] = {"step": scores.step}
    for name in MEASURES:
        score = getattr(scores, name)
        values |= {name: score and score.mean, f"{name}_error": score and score.error}
    return values


def scores_of(run: RunFolder) -> list[StepScores]:
    """The scores that a finished run has recorded; [] if there are none that can be read."""
    try:
        return [StepScores.from_json(scores) for scores in run.load_scores().get("steps", [])]
    except TLoRAError as error:
        logging.warning("[T-LoRA] %s: %s", run.path.name, error)
        return []


def shown(scores: Sequence[StepScores]) -> dict[str, Any]:
    """The scores of a run and the verdict on them, for the page."""
    found = verdict(scores) if scores else Verdict(0, False, 0, "")
    return {
        "steps": [row(each) for each in scores],
        "best": found.best if found.is_better else None,
        "sentence": found.sentence,
        "past": found.past,
    }


def by_prompt(scores: StepScores) -> list[dict[str, float | None]]:
    """For each prompt the mean of each measure over its pictures; None where not measured."""
    return [
        {name: _mean([getattr(one, name) for one in of_prompt]) for name in MEASURES} for of_prompt in scores.pictures
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
