"""Optimizers and learning rate schedules."""

import pytest
import torch
from toy_training import Toy, new_adapter, one_lora, run

from tlora_core import Adapters, TLoRAError, make_adapters
from tlora_core.training.config import LR_SCHEDULES, OPTIMIZERS, TrainConfig
from tlora_core.training.optimizers import STATE_SIZES
from tlora_core.training.trainer import (
    Trainer,
)


def test_optimizer_is_adamw_with_the_papers_settings(monkeypatch):
    seen = {}

    class Spy(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.update(self.defaults)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run(TrainConfig(steps=1))
    assert (seen["lr"], seen["betas"], seen["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(optimizer):
    rate = 1.0 if optimizer == "prodigy" else 0.02
    losses, _, _ = run(TrainConfig(steps=400, learning_rate=rate, batch_size=4, optimizer=optimizer))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_of_an_optimizer_has_the_stated_size(optimizer):
    adapter = one_lora(640, 64)
    with torch.no_grad():
        adapter.module.B.normal_()  # Prodigy remembers no start of zeros
    trainer = Trainer(Adapters({"layer": adapter}), TrainConfig(optimizer=optimizer))
    for parameter in trainer.parameters:
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    kept = sum(
        value.nbytes
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert kept / sum(p.nbytes for p in trainer.parameters) == pytest.approx(STATE_SIZES[optimizer], abs=0.05)
    assert STATE_SIZES.keys() == set(OPTIMIZERS)


def test_adafactor_moves_factors_as_far_as_adamw_at_the_same_rate():
    moved = {
        name: (run(TrainConfig(steps=50, learning_rate=1e-3, optimizer=name))[1].B).norm()
        for name in ("adamw", "adafactor")
    }
    assert 0.3 < moved["adafactor"] / moved["adamw"] < 3


def test_each_learning_rate_schedule_differs_from_the_rest():
    rates = {}
    for name in LR_SCHEDULES:
        adapter = new_adapter()
        trainer, rates[name] = Trainer(Adapters({"layer": adapter}), TrainConfig(steps=40, lr_schedule=name)), []
        trainer.run(Toy(adapter), 40, lambda *_, t=trainer, r=rates[name]: r.append(t.optimizer.param_groups[0]["lr"]))
    assert len({tuple(each) for each in rates.values()}) == len(LR_SCHEDULES)
    with pytest.raises(TLoRAError, match="above 1e-07"):
        Trainer(Adapters({"layer": new_adapter()}), TrainConfig(learning_rate=1e-8, lr_schedule="polynomial"))


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_learning_rate_follows_its_schedule(name):
    adapter = new_adapter()
    trainer = Trainer(Adapters({"layer": adapter}), TrainConfig(steps=40, lr_schedule=name, warmup_steps=10))
    rates = []
    trainer.run(Toy(adapter), 40, lambda step, loss: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    assert rates[4] == pytest.approx(0.5e-4) and rates[9] == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-4) if name == "constant" else rates[-1] < 0.05e-4


def test_settings_that_an_optimizer_does_not_support_are_refused():
    with pytest.raises(TLoRAError, match="lr_schedule"):
        Trainer(Adapters({"layer": new_adapter()}), TrainConfig(optimizer="schedule_free", lr_schedule="cosine"))


class Scalars(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the numbers that are read out of tensors, for each of which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.read += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_reads_as_many_numbers_for_a_hundred_layers_as_for_two(optimizer):
    read = []
    for layers in (2, 100):
        adapters = make_adapters("tlora", "last_random", {f"layer.{i}": (6, 6) for i in range(layers)}, 4, 0)
        trainer = Trainer(
            adapters, TrainConfig(optimizer=optimizer, learning_rate=1.0 if optimizer == "prodigy" else 0.02)
        )
        for parameter in trainer.parameters:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(2):
            with Scalars() as scalars:
                trainer.optimizer.step()
        read.append(scalars.read)
    assert len(trainer.parameters) == 3 and read[0] == read[1]
