"""The training loop on a toy model, without ComfyUI."""
import math

import pytest
import torch

from tlora_core import LoRAAdapter, TLoRAError
from tlora_core.trainer import SNAPSHOT_EVERY, TrainConfig, TrainingDiverged, train


class Toy:
    """Learns a matrix from noise: error = (B A - target) noise."""

    needs_loss_scaling = False

    def __init__(self, adapter, images=1):
        self.adapter, self.latents, self.rows, self.sigmas = adapter, torch.zeros(images, 1, 4, 6), [], []
        self.target = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))

    def draw_sigmas(self, count, generator):
        return torch.rand(count, generator=generator)

    def output_error(self, rows, noise, sigmas):
        self.rows += rows
        self.sigmas += sigmas.tolist()
        up, down = self.adapter.factors()
        return noise @ (up @ down - self.target).T


def run(config, images=1, on_step=lambda step, loss: None, toy=Toy):
    adapter = LoRAAdapter(6, 6, 4, torch.Generator().manual_seed(0))
    denoiser = toy(adapter, images)
    return train({"layer": adapter}, denoiser, config, on_step), adapter, denoiser


def test_training_reduces_the_loss_and_reports_each_step():
    seen = []
    losses, _, _ = run(TrainConfig(steps=300, learning_rate=0.02, batch_size=4), on_step=lambda *a: seen.append(a))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert seen == list(enumerate(losses, 1))


def test_equal_seeds_train_equal_adapters_and_others_do_not():
    one, two, other = (run(TrainConfig(steps=20, seed=seed))[1] for seed in (3, 3, 4))
    assert torch.equal(one.B, two.B) and torch.equal(one.A, two.A)
    assert not torch.equal(one.B, other.B)


def test_each_round_shows_each_image_once():
    _, _, toy = run(TrainConfig(steps=12, batch_size=2), images=6)
    rounds = [toy.rows[i:i + 6] for i in range(0, 24, 6)]
    assert all(sorted(r) == list(range(6)) for r in rounds) and len({tuple(r) for r in rounds}) > 1


def test_samples_of_a_batch_have_noise_levels_of_their_own():
    _, _, toy = run(TrainConfig(steps=5, batch_size=8))
    assert len(set(toy.sigmas)) == 40


def test_optimizer_is_adamw_with_the_papers_settings(monkeypatch):
    seen = {}

    class Spy(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.update(self.defaults)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run(TrainConfig(steps=1))
    assert (seen["lr"], seen["betas"], seen["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-4)


def test_loss_that_is_no_number_stops_at_the_last_good_state():
    bad_step, states = SNAPSHOT_EVERY + 7, []

    class Breaking(Toy):
        def output_error(self, rows, noise, sigmas):
            error = super().output_error(rows, noise, sigmas)
            states.append(self.adapter.B.detach().clone())
            return error * math.nan if len(states) > bad_step else error

    adapter = LoRAAdapter(6, 6, 4, torch.Generator().manual_seed(0))
    with pytest.raises(TrainingDiverged, match="lower learning_rate") as raised:
        train({"layer": adapter}, Breaking(adapter), TrainConfig(steps=100))
    assert (raised.value.step, raised.value.kept_step) == (bad_step, SNAPSHOT_EVERY)
    assert torch.equal(adapter.B, states[SNAPSHOT_EVERY]) and not torch.equal(adapter.B, states[-1])


@pytest.mark.parametrize("field, value", [("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", math.nan)])
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(TLoRAError, match=field):
        TrainConfig(**{field: value})
