"""The paper's training loop, independent of the model's host.

All randomness of a step depends only on the seed and the step's number. A run resumed from its saved state therefore
equals an uninterrupted one, bit for bit on a CPU, and pauses (to validate or to save) have no effect.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import TLoRAError
from ..method.adapters import Adapters
from ..method.random_streams import generator_for
from .config import TrainConfig
from .optimizers import STATE_SIZES, make_lr_schedule, make_optimizer

STATE_FORMAT = 3  # of Trainer.state_dict; format 1, of version 0.1.0, held each layer's parameters separately
SNAPSHOT_EVERY = 25  # steps between copies of the adapters, which are restored when the loss diverges
RUNAWAY = 5.0  # a loss of this many times the largest early loss counts as diverged
_TENSOR_OVERHEAD = 512  # largest number of bytes that torch.save adds to a tensor's values
_FIRST, _LAST = 20, 10  # number of losses for the usual level and for the current level


class Denoiser(Protocol):
    """A frozen model with its attached adapters, and the training pictures."""

    device: torch.device
    needs_loss_scaling: bool  # True if gradients pass through float16

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """Indices of the pictures, grouped by shape."""
        ...

    def losses(self, indices: list[int], generator: torch.Generator, /) -> Iterator[Tensor]:
        """The scalar parts of one batch's loss. Each part is computed after the backward pass of the one before, to
        reuse its memory. Random numbers come from `generator` on the CPU, so they are equal on every device."""
        ...


class TrainingDiverged(TLoRAError):
    """The loss was NaN or infinite, or diverged. The adapters are restored to `kept_step`, the last good state; 0 is
    the start of the training, where there is nothing to keep."""

    def __init__(self, step: int, kept_step: int, what: str):
        # The first loss depends on the frozen model only.
        advice = (
            "lower learning_rate"
            if step
            else "training had not changed anything yet, so load model in bfloat16 or float32, or connect another"
        )
        kept = (
            f"The adapters are back at step {kept_step}, the last good state."
            if kept_step
            else "Nothing was saved: no good state had been recorded yet."
        )
        super().__init__(f"Training stopped at step {step + 1} because the loss {what}; {advice}. {kept}")
        self.step, self.kept_step = step, kept_step


class Trainer:
    """One training run: the adapters, which it trains in place, and all of its state.

    step: number of updates done. losses: one for each update, the mean squared error of the model's prediction.
    is_whole: False after an update failed half-way and could not be undone.
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
        """Trains up to step `until`; returns False if `on_step` ended the run before.

        `on_step(step, loss)` is called for each step, counted from 1, and ends the run by returning True. An exception
        from it ends the run too and leaves the state of a complete step, from which `run` can continue; see _update
        for the exception. Raises TrainingDiverged.
        """
        if not self.is_whole:
            raise TLoRAError(
                f"Step {self.step + 1} failed half-way; resume from the last run state, or train again from the start."
            )
        if self.step == 0:
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=denoiser.needs_loss_scaling)
        batches = Batches(denoiser.buckets, self.config.batch_size, self.config.seed)
        pending: Reading | None = None
        try:
            while self.step < until:
                loss = self._backward(denoiser, batches)
                # A GPU's loss is read while the GPU computes the next step, so that it never waits.
                reading, pending = pending, None
                if reading is not None and self._record(reading.value(), on_step):
                    return False
                if self.step % SNAPSHOT_EVERY == 0 and divergence(self.losses, loss.item()) is None:
                    # The current weights have just given a normal loss.
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
        """Accumulates the gradients of one update; returns the loss, still on the device."""
        self.optimizer.zero_grad()
        total, accumulation = torch.zeros((), device=self.device), self.config.gradient_accumulation
        for part in range(self.step * accumulation, (self.step + 1) * accumulation):
            for loss in denoiser.losses(batches[part], generator_for(self.config.seed, part)):
                self.scaler.scale(loss / accumulation).backward()
                total += loss.detach() / accumulation
                del loss  # what its graph holds of the model would live on while the next part is computed
        if self.config.orthogonality:
            self.scaler.scale(self.config.orthogonality * orthogonality(self.adapters)).backward()
        return total

    def _update(self) -> None:
        """Applies one update. A failed first update changes nothing: optimizers allocate their state there and may run
        out of memory. A later one may leave a partial update, as the optimizer's state has no copy; `is_whole` is then
        False."""
        first = None if any(self.optimizer.state.values()) else {**self.optimizer.state_dict(), "state": {}}
        try:
            if self.config.max_grad_norm:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            self.is_whole = False
            self.scaler.step(self.optimizer)
            if self.average is not None:
                # The decay rises to its value, so that the average forgets the start.
                decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10))
                torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            # Last, as these cannot be undone.
            self.scaler.update()
            if self.lr_schedule is not None:
                self.lr_schedule.step()
        except Exception:
            self._undo(first)
            raise
        self.step, self.is_whole = self.step + 1, True

    def _undo(self, first: Mapping[str, Any] | None) -> None:
        """Undoes a failed update. first: the optimizer's state before the first update, else None."""
        # The scaler unscales once per update. Its attributes on a fused optimizer would scale the next update too.
        self._load_scaler(self.scaler.state_dict())
        for name in ("grad_scale", "found_inf"):
            vars(self.optimizer).pop(name, None)
        if first is not None:
            self.optimizer.load_state_dict(first)
            self._write_good()  # the start, as there was no update since
            self.is_whole = True

    def _record(self, loss: float, on_step) -> bool:
        """Records one step's loss; returns whether the caller ends the run."""
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
        """Within the block, the adapters hold the run's result at this step: the moving average if there is one, or a
        schedule-free optimizer's evaluation weights. Afterwards they hold the training weights again, bit for bit."""
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
        """An upper estimate of the bytes of `state_dict` on disk, including the optimizer's full state."""
        own = sum(p.nbytes for p in self.parameters)
        buffers = self.adapters.buffers()
        kept = own * (1 + STATE_SIZES[self.config.optimizer] + (self.average is not None)) + sum(
            b.nbytes for b in buffers
        )
        # Adafactor's rows and columns, which are negligible for a large matrix.
        kept += sum(
            p.element_size() * (p.shape[:-1].numel() + p.shape[:-2].numel() * p.shape[-1]) for p in self.parameters
        )
        tensors = 6 * len(self.parameters) + len(buffers)
        return int(kept) + _TENSOR_OVERHEAD * tensors

    def state_dict(self) -> dict[str, Any]:
        """The run state as tensors and plain values; `load_state_dict` continues from it as if uninterrupted."""
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
        """Resumes a run of the same adapters and settings. Raises TLoRAError when the state belongs to another run."""
        buffers = self.adapters.buffers()
        pairs = [*zip(self.parameters, state["parameters"]), *zip(buffers, state["buffers"])]
        if len(pairs) != len(self.parameters) + len(buffers) or any(a.shape != b.shape for a, b in pairs):
            raise TLoRAError("The run state is of a run with other layers or another rank; train again from the start.")
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
            state = self.optimizer.state[parameter]
            if "z" in state:  # schedule_free's result lies between z and the parameter
                _write([state["z"]], [good])
        self.step = self._good_step


class Batches(Sequence):
    """An endless sequence of batches, each a list of picture indices. Each round shows every picture in a new random
    order. A batch holds pictures of one shape; if a bucket runs out, the batch starts the bucket again."""

    def __init__(self, buckets: Sequence[Sequence[int]], size: int, seed: int):
        self.buckets, self.size, self.seed = buckets, size, seed
        self.per_round = sum(math.ceil(len(bucket) / size) for bucket in buckets)
        self._round = (-1, [])

    def __len__(self) -> int:
        raise TypeError("the batches are endless")

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
    """A scalar copied from the device asynchronously, so that the device does not wait."""

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


def divergence(losses: Sequence[float], loss: float) -> str | None:
    """Why training should stop at this loss, as a predicate of "the loss"; or None."""
    if not math.isfinite(loss):
        return "became NaN or infinite" if losses else "was NaN or infinite"
    if len(losses) >= _FIRST + _LAST:
        usual, now = max(losses[:_FIRST]), statistics.median([*losses[1 - _LAST :], loss])
        if now > RUNAWAY * usual:
            return f"diverged: it is {now:.3g}, from at most {usual:.3g} in the first steps"
    return None


def orthogonality(adapters: Adapters) -> Tensor:
    """Equation 4 of the paper without its lambda: |A A^T - I|^2 + |B^T B - I|^2, summed over the layers."""
    total = 0.0
    for bank in adapters.modules:
        for gram in (bank.A @ bank.A.mT, bank.B.mT @ bank.B):
            # |G - I|^2 without storing the difference.
            total = total + gram.square().sum() - 2 * gram.diagonal(dim1=1, dim2=2).sum() + gram.shape[:2].numel()
    return total


@torch.no_grad()
def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)
