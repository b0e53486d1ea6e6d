"""AdamW with a state of two bytes a parameter: against AdamW, and what it stores."""

import pytest
import torch

from tlora_core.training.adamw8bit import _CHUNK, BLOCK, AdamW8bit, _dither, _root


def steps(make, gradients, start=0.0, **settings):
    """The parameter after a step for each gradient."""
    parameter = torch.nn.Parameter(torch.full_like(gradients[0], start))
    optimizer = make([parameter], lr=1e-3, betas=(0.9, 0.999), **settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def noisy(shape, count, spread=4.0, seed=0):
    """Gradients of one direction and noise, of sizes that differ by powers of ten from value to value."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-spread * torch.rand(shape, generator=generator))
    direction = torch.randn(shape, generator=generator)
    return [size * (direction + torch.randn(shape, generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 20, 1500])
def test_it_moves_parameters_as_adamw_does_whatever_the_sizes_of_their_gradients(count):
    gradients = noisy((4, 300), count)
    (ours, state), (plain, _) = (
        steps(make, gradients, 0.5, weight_decay=0.1) for make in (AdamW8bit, torch.optim.AdamW)
    )
    ours, plain = ours - 0.5, plain - 0.5
    assert float((ours - plain).norm() / plain.norm()) < 0.08
    sizes = torch.stack(gradients).abs().mean(0)
    small, rest = sizes < sizes.quantile(0.1), sizes >= sizes.quantile(0.1)
    for part in (small, rest):
        assert float((ours - plain)[part].norm() / plain[part].norm()) < 0.1


def test_the_second_moment_follows_gradients_that_shrink_though_it_is_rounded_coarsely():
    """Of two values with equal gradients, one's shrink to a hundredth: its steps have to become as large again."""
    gradients = noisy((1, BLOCK), 4000, spread=0)
    for gradient in gradients[1000:]:
        gradient[:, ::2] *= 0.01
    (ours, state), (plain, known) = (steps(make, gradients) for make in (AdamW8bit, torch.optim.AdamW))
    root, expected = _root(state["octave"], state["scales"][:, :1]), known["exp_avg_sq"].sqrt()
    assert (root.log() - expected.log()).abs().max() < 0.6
    assert (root.log() - expected.log()).mean().abs() < 0.02, "rounding favours neither side"


@pytest.mark.parametrize("numel", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_sizes_that_fill_no_block_are_padded(numel):
    gradients = noisy((numel,), 30, spread=0)
    (ours, state), (plain, _) = (steps(make, gradients) for make in (AdamW8bit, torch.optim.AdamW))
    torch.testing.assert_close(ours, plain, rtol=0.1, atol=2e-3)
    assert state["ratio"].shape == (-(-numel // BLOCK), BLOCK)


def test_a_parameter_of_several_chunks_is_updated_like_each_chunk_alone(monkeypatch):
    from tlora_core.training import adamw8bit

    gradients = noisy((5 * BLOCK + 3,), 20)
    whole, _ = steps(AdamW8bit, gradients)
    monkeypatch.setattr(adamw8bit, "_CHUNK", 2 * BLOCK)
    parts, _ = steps(AdamW8bit, gradients)
    assert _CHUNK > 5 * BLOCK and float((whole - parts).norm() / whole.norm()) < 0.04


def test_zero_gradients_change_nothing_and_later_ones_are_followed():
    gradients = [torch.zeros(2, BLOCK)] * 3 + [torch.ones(2, BLOCK)] * 3
    gradients[4] = torch.full((2, BLOCK), 1e-12)
    ours, state = steps(AdamW8bit, gradients)
    still, _ = steps(AdamW8bit, gradients[:3])
    assert torch.equal(still, torch.zeros(2, BLOCK))
    torch.testing.assert_close(ours, steps(torch.optim.AdamW, gradients)[0], rtol=0.03, atol=1e-6)


def test_dither_is_even_over_the_values_of_a_step_and_over_the_steps_of_a_value():
    of_a_step = _dither(torch.empty(64, BLOCK), 7).flatten()
    of_a_value = torch.stack([_dither(torch.empty(1, BLOCK), step)[0, 99] for step in range(1, 1001)])
    for numbers in (of_a_step, of_a_value):
        assert numbers.min() >= 0 and numbers.max() < 1
        share = torch.histc(numbers, 10, 0, 1) / len(numbers)
        assert (share - 0.1).abs().max() < 0.01
