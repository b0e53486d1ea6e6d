"""What a training run shows and saves, and which step its file holds."""

from dataclasses import dataclass
from typing import Any

from ....errors import TLoRAError, require_choice
from ....packages import required
from ..encoders import NONE as NO_SCORER

RERUNS = ("auto", "continue", "restart")
LAST, BEST, STOP_WHEN_PAST = KEEPS = ("last", "best", "stop when past it")


@dataclass(frozen=True)
class Keeping:
    """What a run shows and saves, and which step its file holds. None of it changes what a step learns.

    validation_prompts: drawn every `validate_every` steps (0: never), with {token} and {class_word} filled in.
    checkpoint_every: steps between saves of the run state, from which the run can resume (0: never).
    checkpoint_files: each such save also writes a T-LoRA file.
    save_on_cancel: a cancel saves the run state and a T-LoRA file.
    rerun: what to do if an equal run exists. "auto" uses a finished or stopped run as it is and resumes an unfinished
        one; "continue" also resumes a stopped one; "restart" trains again.
    wandb: also sends the record to Weights & Biases. memory: see personalize.MEMORY.
    thumbnail: stores the first of the last validation pictures in the files, scaled down; never a training picture.
    clip_vision: the host's CLIP_VISION that scores the pictures of each validation, or None. scorer: the name of
        another scorer, or NO_SCORER.
    keep: the step whose T-LoRA the file holds, the last or the best by the scores. "stop when past it" also ends the
        training after `patience` validations without gain.
    score_seeds: pictures of each prompt that are scored.
    """

    validation_prompts: tuple[str, ...] = ()
    validate_every: int = 0
    checkpoint_every: int = 100
    checkpoint_files: bool = False
    save_on_cancel: bool = False
    rerun: str = RERUNS[0]
    wandb: bool = False
    memory: str = "auto"
    thumbnail: bool = True
    clip_vision: Any = None
    scorer: str = NO_SCORER
    keep: str = LAST
    patience: int = 3
    score_seeds: int = 2

    def __post_init__(self) -> None:
        require_choice("rerun", self.rerun, RERUNS)
        require_choice("keep", self.keep, KEEPS)
        for name in ("validate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise TLoRAError(f"{name} is {getattr(self, name)}; set it to a number of steps, or 0 for never.")
        for name in ("patience", "score_seeds"):
            if getattr(self, name) < 1:
                raise TLoRAError(f"{name} is {getattr(self, name)}; set it to 1 or more.")
        self._check_scoring()
        if self.validate_every and not self.validation_prompts and not self.is_scored:
            raise TLoRAError(
                f"validate_every is {self.validate_every}, but validation_prompts is empty; write one prompt per line."
            )
        if self.wandb:
            required("wandb", "The input wandb")

    @property
    def is_scored(self) -> bool:
        """Whether the pictures of each validation are scored."""
        return self.clip_vision is not None or self.scorer != NO_SCORER

    def _check_scoring(self) -> None:
        by = f'scorer is "{self.scorer}"' if self.scorer != NO_SCORER else "clip_vision is connected"
        if self.clip_vision is not None and self.scorer != NO_SCORER:
            raise TLoRAError(f'{by} and clip_vision is connected; disconnect it, or set scorer to "{NO_SCORER}".')
        if self.keep != LAST and not self.is_scored:
            raise TLoRAError(
                f'keep is "{self.keep}", but nothing scores the steps; choose a scorer, connect clip_vision, or set '
                f'keep to "{LAST}".'
            )
        if self.is_scored and not self.validate_every:
            raise TLoRAError(
                f"{by}, but validate_every is 0, so no step is scored; set it to the steps from one score to the next, "
                "such as 50."
            )
