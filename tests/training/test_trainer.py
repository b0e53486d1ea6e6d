"""The training loop on a toy model, without ComfyUI."""

import math

import pytest
import torch
from toy_training import Toy, new_adapter, run

from tlora_core import Adapters, TLoRAError
from tlora_core.method.bank import ortho_bank
from tlora_core.method.random_streams import generator_for
from tlora_core.training.config import TrainConfig
from tlora_core.training.trainer import (
    Batches,
    Trainer,
    orthogonality,
)


def test_training_reduces_the_loss_and_reports_each_step():
    seen = []
    losses, _, _ = run(TrainConfig(steps=300, learning_rate=0.02, batch_size=4), on_step=lambda *a: seen.append(a))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert seen == list(enumerate(losses, 1))


def test_equal_seeds_train_equal_adapters_and_others_do_not():
    one, two, other = (run(TrainConfig(steps=20, seed=seed))[1] for seed in (3, 3, 4))
    assert torch.equal(one.B, two.B) and torch.equal(one.A, two.A)
    assert not torch.equal(one.B, other.B)


def test_each_round_shows_each_image_once_and_shapes_never_mix():
    _, _, toy = run(TrainConfig(steps=12, batch_size=2), buckets=((0, 1, 2, 3), (4, 5)))
    rounds = [toy.rows[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(sum(r, [])) == list(range(6)) for r in rounds) and len({str(r) for r in rounds}) > 1
    assert len({[rows[0] < 4 for rows in r].index(False) for r in rounds}) > 1, (
        "the small bucket's turn is not always the same"
    )
    assert all(set(rows) <= {0, 1, 2, 3} or set(rows) <= {4, 5} for rows in toy.rows)


def test_a_bucket_that_fills_no_batch_begins_again():
    assert Batches([[0]], 4, 0)[7] == [0] * 4
    rows = Batches([[0, 1, 2]], 2, 0)
    assert sorted(set(rows[0] + rows[1])) == [0, 1, 2] and rows[5] == Batches([[0, 1, 2]], 2, 0)[5]


def test_samples_of_a_batch_and_of_each_step_are_drawn_independently():
    _, _, toy = run(TrainConfig(steps=5, batch_size=8))
    assert len(set(toy.drawn)) == 40
    assert not torch.equal(torch.rand(3, generator=generator_for(0, 1)), torch.rand(3, generator=generator_for(1, 1)))


def test_a_true_answer_ends_the_run_after_that_step():
    adapter = new_adapter()
    trainer = Trainer(Adapters({"layer": adapter}), TrainConfig(steps=50))
    assert not trainer.run(Toy(adapter), 50, lambda step, loss: step == 7)
    assert trainer.step == len(trainer.losses) == 7
    assert trainer.run(Toy(adapter), 50) and trainer.losses == run(TrainConfig(steps=50))[0]


def test_accumulated_batches_are_one_large_batch():
    class Fixed(Toy):
        def losses(self, rows, generator):
            up, down = self.adapter.factors()
            yield (torch.tensor(rows, dtype=torch.float32).mean() * (up @ down - self.target)).square().mean()

    buckets = ((1, 2, 3, 4),)
    small = run(TrainConfig(steps=1, batch_size=2, gradient_accumulation=2, learning_rate=0.1), buckets, toy=Fixed)
    assert len(small[2].rows) == 0 and small[0][0] > 0
    adapter = new_adapter()
    trainer = Trainer(Adapters({"layer": adapter}), TrainConfig(steps=1, batch_size=2, gradient_accumulation=2))
    trainer.run(Fixed(adapter, buckets), 1)
    got = adapter.module.B.grad
    other = new_adapter()
    up, down = other.factors()
    rows = Batches(buckets, 2, 0)
    for i in range(2):
        ((torch.tensor(rows[i]).float().mean() * (up @ down - Toy(other).target)).square().mean() / 2).backward(
            retain_graph=True
        )
    torch.testing.assert_close(got, other.module.B.grad)


def test_gradients_are_clipped_to_the_norm():
    adapter = new_adapter()
    trainer = Trainer(Adapters({"layer": adapter}), TrainConfig(steps=1, max_grad_norm=1e-3))
    trainer.run(Toy(adapter), 1)
    assert torch.cat([p.grad.flatten() for p in trainer.parameters]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_orthogonality_is_equation_4():
    A0, B0 = torch.linalg.qr(torch.randn(8, 3))[0].T, torch.linalg.qr(torch.randn(7, 3))[0]
    ortho = ortho_bank([(B0, torch.ones(3), A0)])[0]
    assert orthogonality(Adapters({"x": ortho})).item() == pytest.approx(0, abs=1e-5)
    lora = new_adapter()
    A, B = lora.A.detach().double(), lora.B.detach().double()
    eye = torch.eye(4, dtype=torch.float64)
    expected = (A @ A.T - eye).square().sum() + (B.T @ B - eye).square().sum()
    assert orthogonality(Adapters({"x": lora, "y": ortho})).item() == pytest.approx(expected.item(), rel=1e-5)
    without, with_it = (run(TrainConfig(steps=300, learning_rate=0.01, orthogonality=x))[1] for x in (0.0, 1.0))
    assert orthogonality(Adapters({"x": with_it})) < 0.1 * orthogonality(Adapters({"x": without}))


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("optimizer", "sgd"),
        ("lr_schedule", "up"),
        ("timestep_density", "x"),
        ("ema_decay", 1.0),
        ("noise_from", 1.0),
        ("outside_mask", 2.0),
        ("gradient_accumulation", 0),
        ("min_snr_gamma", -1.0),
        ("orthogonality", math.inf),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(TLoRAError, match=field):
        TrainConfig(**{field: value})
