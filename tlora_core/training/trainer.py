"""The training loop: the paper's, with no knowledge of the model's home.

All randomness of a step follows from the seed and the step's number alone. That is why a run that goes on from a
checkpoint is the run that was never interrupted, bit by bit on a CPU, and why pauses in it (for validation, for a
checkpoint) change nothing.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import TLoRAError
from ..method.adapters import Adapters
from .config import TrainConfig
from .optimizers import STATE_SIZES, make_lr_schedule, make_optimizer

STATE_FORMAT = 2  # of what Trainer.state_dict gives; 1, of version 0.1.0, had the parameters of each layer apart
SNAPSHOT_EVERY = 25  # steps between copies of the adapters, to fall back on when the loss diverges
RUNAWAY = 5.0  # so many times the largest loss of the first steps is no noise any more
_OF_A_TENSOR = 512  # bytes that a tensor of a checkpoint takes beside its values, at most
_FIRST, _LAST = 20, 10  # losses that say what is usual, and what is now


class Denoiser(Protocol):
    """A frozen model with the adapters attached to it, and the pictures it is trained on."""

    device: torch.device
    needs_loss_scaling: bool  # True where gradients pass through float16

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """The pictures' rows, those of one shape together."""
        ...

    def losses(self, rows: list[int], generator: torch.Generator) -> Iterator[Tensor]:
        """The parts of the loss of one batch, scalars; each is made after the one before went backward, to share
        memory. What is random comes from `generator`, on the CPU, so that it is the same on every device."""
        ...


class TrainingDiverged(TLoRAError):
    """The loss was no number or ran away. The adapters are back at `kept_step`, the last state known to be good; 0
    where that is the start, of which there is nothing to keep."""

    def __init__(self, step: int, kept_step: int, what: str):
        # The first loss is the model's own.
        advice = (
            "lower learning_rate"
            if step
            else "nothing was learnt yet, so load model in bfloat16 or float32, or connect another"
        )
        kept = (
            f"The adapters are back at step {kept_step}, the last state known to be good."
            if kept_step
            else "Nothing is saved, as no step is known to be good."
        )
        super().__init__(f"Training stopped at step {step + 1} because the loss {what}; {advice}. {kept}")
        self.step, self.kept_step = step, kept_step


class Trainer:
    """One training run: the adapters it trains in place and all it needs to go on.

    step: updates done. losses: of each of them, mean squared error in the model's own prediction. is_whole: False once
    an update has failed half-way and cannot be taken back.
    """

    def __init__(self, adapters: Adapters, config: TrainConfig):
        self.adapters, self.config = adapters, config
        self.parameters = adapters.parameters()
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(self.parameters, config)
        self.lr_schedule = make_lr_schedule(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.average = [p.detach().clone() for p in self.parameters] if config.ema_decay else None
        self.step, self.is_whole = 0, True
        self.losses: list[float] = []
        self._good = [torch.empty_like(p, device="cpu", requires_grad=False) for p in self.parameters]
        self._good_average = [torch.empty_like(p) for p in self._good] if config.ema_decay else []
        self._keep_as_good()

    def run(
        self, denoiser: Denoiser, until: int, on_step: Callable[[int, float], bool | None] = lambda step, loss: None
    ) -> bool:
        """Train up to step `until`; False when `on_step` ended it before.

        `on_step(step, loss)` is called for each step, counted from 1, and ends the run by returning True; what it
        raises ends it too, and the state is that of a whole step, in which `run` can go on; but see _update. Raises
        TrainingDiverged.
        """
        if not self.is_whole:
            raise TLoRAError(
                f"Step {self.step + 1} failed half-way; go on from the last checkpoint, or train again from the start."
            )
        if self.step == 0:
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=denoiser.needs_loss_scaling)
        batches = Batches(denoiser.buckets, self.config.batch_size, self.config.seed)
        pending: Reading | None = None
        try:
            while self.step < until:
                loss = self._backward(denoiser, batches)
                # A GPU's loss is read while it is at the next step, so that it never waits.
                reading, pending = pending, None
                if reading is not None and self._record(reading.value(), on_step):
                    return False
                if self.step % SNAPSHOT_EVERY == 0 and divergence(self.losses, loss.item()) is None:
                    # Only now, after these very weights gave a loss as it should be.
                    self._keep_as_good()
                self._update()
                pending = Reading(loss)
                if self.device.type == "cpu":
                    reading, pending = pending, None
                    if self._record(reading.value(), on_step):
                        return self.step == until
        finally:
            if pending is not None:
                self._record(pending.value(), on_step)
        return True

    def _backward(self, denoiser: Denoiser, batches: "Batches") -> Tensor:
        """Adds up the gradients of one update; the loss, still on the device."""
        self.optimizer.zero_grad()
        total, accumulation = torch.zeros((), device=self.device), self.config.gradient_accumulation
        for part in range(self.step * accumulation, (self.step + 1) * accumulation):
            for loss in denoiser.losses(batches[part], generator_for(self.config.seed, part)):
                self.scaler.scale(loss / accumulation).backward()
                total += loss.detach() / accumulation
        if self.config.orthogonality:
            self.scaler.scale(self.config.orthogonality * orthogonality(self.adapters)).backward()
        return total

    def _update(self) -> None:
        """Where it fails, as optimizers do that find no memory for their state in the first update, that one changes
        nothing. A later one may end half-way, since there is no second copy of the optimizer's state: `is_whole`
        tells."""
        first = None if any(self.optimizer.state.values()) else {**self.optimizer.state_dict(), "state": {}}
        try:
            if self.config.max_grad_norm:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            self.is_whole = False
            self.scaler.step(self.optimizer)
            if self.average is not None:
                # Rising to its decay, as the start is no weight worth remembering.
                decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10))
                torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            # Last, as these are not taken back.
            self.scaler.update()
            if self.lr_schedule is not None:
                self.lr_schedule.step()
        except Exception:
            self._take_back(first)
            raise
        self.step, self.is_whole = self.step + 1, True

    def _take_back(self, first: Mapping[str, Any] | None) -> None:
        """What an update has changed that failed. first: the optimizer's state before the first one, else None."""
        # The scaler unscales once an update; what it sets on a fused optimizer it would multiply by the next time.
        self._load_scaler(self.scaler.state_dict())
        for name in ("grad_scale", "found_inf"):
            vars(self.optimizer).pop(name, None)
        if first is not None:
            self.optimizer.load_state_dict(first)
            self._write_good()  # which is the start, as nothing was updated since
            self.is_whole = True

    def _record(self, loss: float, on_step) -> bool:
        """Takes note of one step's loss; whether the caller wants to end here."""
        step = len(self.losses)
        what = divergence(self.losses, loss)
        if what is not None:
            self._back_to_good()
            del self.losses[self.step :]
            raise TrainingDiverged(step, self.step, what)
        self.losses.append(loss)
        return bool(on_step(step + 1, loss))

    @contextmanager
    def result(self):
        """Within the block the adapters are what the run is for at this step: the moving average where one is kept, the
        evaluation weights of a schedule-free optimizer. Afterwards they are what training goes on from, to the bit."""
        training = [p.detach().clone() for p in self.parameters]
        free = hasattr(self.optimizer, "eval")
        if free:
            self.optimizer.eval()
        if self.average is not None:
            _write(self.parameters, self.average)
        try:
            yield self.adapters
        finally:
            if free:
                self.optimizer.train()
            _write(self.parameters, training)

    @property
    def state_bytes(self) -> int:
        """About how many bytes `state_dict` takes on disk, and not less, once the optimizer has its state too."""
        own = sum(p.nbytes for p in self.parameters)
        buffers = self.adapters.buffers()
        kept = own * (1 + STATE_SIZES[self.config.optimizer] + (self.average is not None)) + sum(
            b.nbytes for b in buffers
        )
        # Adafactor's rows and columns, next to nothing of a large matrix.
        kept += sum(
            p.element_size() * (p.shape[:-1].numel() + p.shape[:-2].numel() * p.shape[-1]) for p in self.parameters
        )
        tensors = 6 * len(self.parameters) + len(buffers)
        return int(kept) + _OF_A_TENSOR * tensors

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: all that `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "format": STATE_FORMAT,
            "step": self.step,
            "losses": self.losses,
            "parameters": [p.detach() for p in self.parameters],
            "buffers": self.adapters.buffers(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "lr_schedule": None if self.lr_schedule is None else self.lr_schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a run of the same adapters and settings. Raises TLoRAError when the state is another run's."""
        buffers = self.adapters.buffers()
        pairs = [*zip(self.parameters, state["parameters"]), *zip(buffers, state["buffers"])]
        if len(pairs) != len(self.parameters) + len(buffers) or any(a.shape != b.shape for a, b in pairs):
            raise TLoRAError(
                "The checkpoint is of a run with other layers or another rank; train again from the start."
            )
        _write([a for a, _ in pairs], [b for _, b in pairs])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_schedule is not None:
            self.lr_schedule.load_state_dict(state["lr_schedule"])
        if self.average is not None:
            _write(self.average, state["average"])
        if state["scaler"] is not None:
            self._load_scaler(state["scaler"])
        self.step, self.losses, self.is_whole = state["step"], list(state["losses"]), True
        self._keep_as_good()

    def _load_scaler(self, state: Mapping[str, Any]) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=bool(state))
        self.scaler.load_state_dict(state)

    def _keep_as_good(self) -> None:
        _write(self._good, self.parameters)
        _write(self._good_average, self.average or ())
        self._good_step = self.step

    def _write_good(self) -> None:
        _write(self.parameters, self._good)
        _write(self.average or (), self._good_average)

    def _back_to_good(self) -> None:
        self._write_good()
        for parameter, good in zip(self.parameters, self._good):
            if "z" in (
                state := self.optimizer.state[parameter]
            ):  # of schedule_free, whose result lies between it and the parameter
                _write([state["z"]], [good])
        self.step = self._good_step


def train(
    adapters: Adapters,
    denoiser: Denoiser,
    config: TrainConfig,
    on_step: Callable[[int, float], bool | None] = lambda step, loss: None,
) -> list[float]:
    """A whole run at once; returns the loss of each step. See Trainer.run."""
    trainer = Trainer(adapters, config)
    trainer.run(denoiser, config.steps, on_step)
    return trainer.losses


class Batches(Sequence):
    """Rows of the pictures for each batch, without end: each round shows every picture, in an order of its own.
    Pictures of different shapes never meet in a batch; one that a bucket cannot fill begins that bucket again."""

    def __init__(self, buckets: Sequence[Sequence[int]], size: int, seed: int):
        self.buckets, self.size, self.seed = buckets, size, seed
        self.per_round = sum(math.ceil(len(bucket) / size) for bucket in buckets)
        self._round = (-1, [])

    def __len__(self) -> int:
        raise TypeError("batches have no end")

    def __getitem__(self, index: int) -> list[int]:
        number, place = divmod(index, self.per_round)
        if self._round[0] != number:
            self._round = (number, self._shuffled(generator_for(self.seed, f"round {number}")))
        return self._round[1][place]

    def _shuffled(self, generator: torch.Generator) -> list[list[int]]:
        batches = []
        for bucket in self.buckets:
            order = [bucket[i] for i in torch.randperm(len(bucket), generator=generator).tolist()]
            for start in range(0, len(order), self.size):
                batches.append([order[(start + i) % len(order)] for i in range(self.size)])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class Reading:
    """A scalar on its way from the device, without making the device wait."""

    def __init__(self, scalar: Tensor):
        self.copy = scalar
        if scalar.device.type == "cuda":
            self.copy = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self.copy.copy_(scalar, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def value(self) -> float:
        if hasattr(self, "arrived"):
            self.arrived.synchronize()
        return self.copy.item()


def generator_for(seed: int, purpose: int | str) -> torch.Generator:
    """Random numbers of one step, or of another purpose, of the run with that seed; on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def divergence(losses: Sequence[float], loss: float) -> str | None:
    """Why training should stop at this loss, or None."""
    if not math.isfinite(loss):
        return "was no longer a finite number" if losses else "was no finite number"
    if len(losses) >= _FIRST + _LAST:
        usual, now = max(losses[:_FIRST]), statistics.median([*losses[1 - _LAST :], loss])
        if now > RUNAWAY * usual:
            return f"ran away, to {now:.3g} from at most {usual:.3g} in the beginning"
    return None


def orthogonality(adapters: Adapters) -> Tensor:
    """Equation 4 of the paper without its lambda: |A A^T - I|^2 + |B^T B - I|^2, summed over the layers."""
    total = 0.0
    for bank in adapters.modules:
        for gram in (bank.A @ bank.A.mT, bank.B.mT @ bank.B):
            # |G - I|^2 without writing out the difference.
            total = total + gram.square().sum() - 2 * gram.diagonal(dim1=1, dim2=2).sum() + gram.shape[:2].numel()
    return total


@torch.no_grad()
def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)
