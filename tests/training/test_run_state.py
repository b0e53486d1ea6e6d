"""The state of a training: saved and resumed, undone after an error, averaged, and restored after a divergence."""

import io
import itertools
import math

import pytest
import torch
from toy_training import HARD, Toy, new_adapter, one_lora
from training_runs import OutOfMemory

from tlora_core import Adapters, TLoRAError
from tlora_core.training.config import OPTIMIZERS, TrainConfig
from tlora_core.training.trainer import (
    SNAPSHOT_EVERY,
    Trainer,
    TrainingDiverged,
    divergence,
)


@pytest.mark.parametrize("config", HARD, ids=lambda c: c.optimizer)
def test_run_that_was_saved_killed_and_resumed_is_bit_identical_to_an_uninterrupted_one(config):
    buckets = ((0, 1, 2), (3,))
    adapter = new_adapter()
    whole = Trainer(Adapters({"layer": adapter}), config)
    whole.run(Toy(adapter, buckets), config.steps)

    adapter = new_adapter()
    first, saved = Trainer(Adapters({"layer": adapter}), config), io.BytesIO()
    assert first.run(Toy(adapter, buckets), 23)
    with first.result():  # as a validation does
        pass
    torch.save(first.state_dict(), saved)
    first.run(Toy(adapter, buckets), 31)  # steps that are lost

    saved.seek(0)
    torch.manual_seed(99)
    adapter = one_lora(6, 4, 99)
    second = Trainer(Adapters({"layer": adapter}), config)
    second.load_state_dict(torch.load(saved, weights_only=True))
    second.run(Toy(adapter, buckets), config.steps)
    assert second.losses == whole.losses and len(whole.losses) == 60
    with whole.result(), second.result():
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters))


@pytest.mark.parametrize("norm, is_scaled", [(0.5, False), (0.5, True), (0.0, True)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [1, 3])
def test_update_that_fails_anywhere_can_be_repeated_or_is_known_to_be_partial(
    monkeypatch, step, optimizer, norm, is_scaled
):
    config = TrainConfig(
        steps=4, learning_rate=0.01, optimizer=optimizer, warmup_steps=2, max_grad_norm=norm, ema_decay=0.9
    )
    kept = []

    def trained(operation):
        adapter = new_adapter()
        toy, trainer = Toy(adapter), Trainer(Adapters({"layer": adapter}), config)
        toy.needs_loss_scaling = is_scaled
        with monkeypatch.context() as patch:
            shortage = OutOfMemory(patch, step, operation)
            try:
                trainer.run(toy, 4)
            except torch.OutOfMemoryError:
                kept.append(trainer.is_whole)
        if trainer.is_whole:
            trainer.run(toy, 4)
        else:
            with pytest.raises(TLoRAError, match="Step 3 failed half-way"):
                trainer.run(toy, 4)
        return trainer, shortage.happened

    whole, _ = trained(math.inf)
    for operation in itertools.count():
        trainer, happened = trained(operation)
        if not happened:
            break
        if kept[-1]:
            assert trainer.losses == whole.losses and trainer.scaler.state_dict() == whole.scaler.state_dict()
            assert all(
                torch.equal(a, b)
                for a, b in zip([*trainer.parameters, *trainer.average], [*whole.parameters, *whole.average])
            )
    assert len(kept) == operation > 2
    # The first operation clips, where it is asked to; the last are the average's and the scaler's.
    assert all(kept) if step == 1 else (kept[0], kept[-1]) == (norm > 0, False)


@pytest.mark.parametrize("config", [HARD[0], HARD[-1]], ids=lambda c: c.optimizer)
def test_result_is_the_average_and_training_continues_from_the_weights(config):
    adapter = new_adapter()
    trainer = Trainer(Adapters({"layer": adapter}), config)
    trainer.run(Toy(adapter), 30)
    before = [p.detach().clone() for p in trainer.parameters]
    with trainer.result():
        assert not torch.equal(adapter.module.B, before[1])
        if trainer.average is not None:
            assert torch.equal(adapter.module.B, trainer.average[1])
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, before))


def test_average_forgets_the_start_faster_than_later_weights():
    adapter = new_adapter()
    trainer, average = (
        Trainer(Adapters({"layer": adapter}), TrainConfig(steps=5, learning_rate=0.02, ema_decay=0.3)),
        adapter.B.detach().clone(),
    )
    for step in range(5):
        trainer.run(Toy(adapter), step + 1)
        average = torch.lerp(average, adapter.B.detach(), 1 - min(0.3, (step + 1) / (step + 10)))
    torch.testing.assert_close(trainer.average[1][0], average)


class Breaking(Toy):
    """Its loss is multiplied from a step on."""

    def __init__(self, adapter, step, factor):
        super().__init__(adapter)
        self.step, self.factor, self.states = step, factor, []

    def losses(self, rows, generator):
        self.states.append(self.adapter.B.detach().clone())
        for loss in super().losses(rows, generator):
            yield loss * (self.factor if len(self.states) > self.step else 1)


@pytest.mark.parametrize(
    "factor, bad_step", [(math.nan, SNAPSHOT_EVERY + 7), (1e4, SNAPSHOT_EVERY + 7), (math.nan, 2 * SNAPSHOT_EVERY)]
)
def test_loss_that_diverges_stops_at_the_last_good_state(factor, bad_step):
    adapter = new_adapter()
    denoiser, trainer = (
        Breaking(adapter, bad_step, factor),
        Trainer(Adapters({"layer": adapter}), TrainConfig(steps=100)),
    )
    with pytest.raises(TrainingDiverged, match="lower learning_rate") as raised:
        trainer.run(denoiser, 100)
    assert raised.value.kept_step == trainer.step == len(trainer.losses) == SNAPSHOT_EVERY
    assert bad_step <= raised.value.step < bad_step + 8
    assert torch.equal(adapter.B, denoiser.states[SNAPSHOT_EVERY]) and not torch.equal(adapter.B, denoiser.states[-1])


@pytest.mark.parametrize("factor", [math.nan, 1e4])
@pytest.mark.parametrize("config", [{"optimizer": "schedule_free"}, {"ema_decay": 0.9}], ids=str)
def test_result_of_a_run_that_diverged_is_that_of_the_last_good_state(config, factor):
    config = TrainConfig(steps=100, learning_rate=0.01, **config)
    results = []
    for bad_step, steps in ((1000, SNAPSHOT_EVERY), (SNAPSHOT_EVERY + 3, 100)):
        adapter = new_adapter()
        trainer = Trainer(Adapters({"layer": adapter}), config)
        try:
            trainer.run(Breaking(adapter, bad_step, factor), steps)
        except TrainingDiverged as error:
            assert error.kept_step == SNAPSHOT_EVERY
        with trainer.result():
            results.append(adapter.B.detach().clone())
    good, kept = results
    # Of schedule_free what it goes on from is kept, and not its average, which lies near.
    assert (
        kept.isfinite().all()
        and (kept - good).abs().max() < (0.15 if "schedule_free" in str(config) else 1e-6) * good.abs().max()
    )


def test_resumed_run_that_diverges_returns_to_where_it_was_resumed():
    first = new_adapter()
    before = Trainer(Adapters({"layer": first}), TrainConfig(steps=100))
    before.run(Toy(first), 7)
    second = new_adapter()
    after = Trainer(Adapters({"layer": second}), TrainConfig(steps=100))
    after.load_state_dict(before.state_dict())
    with pytest.raises(TrainingDiverged, match="back at step 7"):
        after.run(Breaking(second, 3, math.nan), 100)
    assert torch.equal(second.B, first.B) and after.losses == before.losses


def test_noisy_losses_are_no_divergence():
    noisy = [abs(math.sin(i * i)) * 3 for i in range(500)]
    assert all(divergence(noisy[:i], noisy[i]) is None for i in range(500))
    assert divergence(noisy[:30], 1e6) is None, "one wild step is no divergence"


def test_state_of_another_run_is_refused():
    state = Trainer(Adapters({"layer": new_adapter()}), TrainConfig()).state_dict()
    other = Trainer(Adapters({"layer": one_lora(6, 2)}), TrainConfig())
    with pytest.raises(TLoRAError, match="another rank"):
        other.load_state_dict(state)
