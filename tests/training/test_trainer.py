"""The training loop on a toy model, without ComfyUI."""

import io
import itertools
import math

import pytest
import torch
from training_runs import OutOfMemory, train

from tlora_core import Adapters, TLoRAError, make_adapters
from tlora_core.method.bank import ortho_bank
from tlora_core.method.random_streams import generator_for
from tlora_core.training.config import LR_SCHEDULES, OPTIMIZERS, TrainConfig
from tlora_core.training.optimizers import STATE_SIZES
from tlora_core.training.trainer import (
    SNAPSHOT_EVERY,
    Batches,
    Trainer,
    TrainingDiverged,
    divergence,
    orthogonality,
)


class Toy:
    """Learns a matrix from noise: error = (B A - target) noise."""

    device, needs_loss_scaling = torch.device("cpu"), False

    def __init__(self, adapter, buckets=((0,),)):
        self.adapter, self.buckets, self.rows, self.drawn = adapter, buckets, [], []
        self.target = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))

    def losses(self, rows, generator):
        self.rows.append(rows)
        noise = torch.randn(len(rows), 4, 6, generator=generator)
        self.drawn += noise[:, 0, 0].tolist()
        up, down = self.adapter.factors()
        yield (noise @ (up @ down - self.target).T).square().mean()


def one_lora(width, rank, seed=0):
    return make_adapters("lora", "last_random", {"layer": (width, width)}, rank, seed)["layer"]


def new_adapter():
    return one_lora(6, 4)


def run(config, buckets=((0,),), on_step=lambda step, loss: None, toy=Toy):
    adapter = new_adapter()
    denoiser = toy(adapter, buckets)
    return train(Adapters({"layer": adapter}), denoiser, config, on_step), adapter, denoiser


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


def test_samples_of_a_batch_and_of_each_step_are_drawn_anew():
    _, _, toy = run(TrainConfig(steps=5, batch_size=8))
    assert len(set(toy.drawn)) == 40
    assert not torch.equal(torch.rand(3, generator=generator_for(0, 1)), torch.rand(3, generator=generator_for(1, 1)))


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
def test_state_of_an_optimizer_is_as_large_as_said(optimizer):
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


def test_schedules_of_other_names_are_others():
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


HARD = [
    TrainConfig(
        steps=60,
        learning_rate=0.01,
        batch_size=2,
        optimizer="adamw",
        lr_schedule="cosine",
        warmup_steps=5,
        ema_decay=0.9,
        max_grad_norm=0.5,
        gradient_accumulation=2,
    ),
    *[TrainConfig(steps=60, learning_rate=0.01, batch_size=2, optimizer=name) for name in OPTIMIZERS[1:]],
]


@pytest.mark.parametrize("config", HARD, ids=lambda c: c.optimizer)
def test_run_that_was_saved_killed_and_taken_up_is_bit_identical_to_one_never_interrupted(config):
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
def test_update_that_fails_anywhere_can_be_made_again_as_if_it_had_not_or_is_known_to_be_half_made(
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
def test_result_is_the_average_and_training_goes_on_from_the_weights(config):
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


def test_run_that_was_taken_up_and_diverges_is_back_where_it_was_taken_up():
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


def test_what_an_optimizer_cannot_do_is_said():
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
