"""What a training run shows and saves."""

from dataclasses import dataclass

from ....errors import TLoRAError, require_choice
from ....packages import required

RERUNS = ("auto", "continue", "restart")


@dataclass(frozen=True)
class Keeping:
    """What a run shows and saves; none of it changes the result.

    validation_prompts: drawn every `validate_every` steps (0: never), with {token} and {class_word} filled in.
    checkpoint_every: steps between saves of the run state, from which the run can resume (0: never).
    checkpoint_files: each such save also writes a T-LoRA file.
    save_on_cancel: a cancel saves the run state and a T-LoRA file.
    rerun: what to do if an equal run exists. "auto" uses a finished or stopped run as it is and resumes an unfinished
        one; "continue" also resumes a stopped one; "restart" trains again.
    wandb: also sends the record to Weights & Biases. memory: see personalize.MEMORY.
    thumbnail: stores the first of the last validation pictures in the files, scaled down; never a training picture.
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

    def __post_init__(self) -> None:
        require_choice("rerun", self.rerun, RERUNS)
        for name in ("validate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise TLoRAError(f"{name} is {getattr(self, name)}; set it to a number of steps, or 0 for never.")
        if self.validate_every and not self.validation_prompts:
            raise TLoRAError(
                f"validate_every is {self.validate_every}, but validation_prompts is empty; write one prompt per line."
            )
        if self.wandb:
            required("wandb", "The input wandb")
