"""The further training of the tiny base's decoder: what a batch weighs, its loss and its critic, and how it resumes."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tinylib import decoder
from tinylib.pairs import Pairs

from tlora_core.tiny import WEIGHTS, world

KINDS = list(decoder.SHARES)


def made(seed, *shape, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A work folder with two latents of each kind, whose objects are in the left top corner."""
    monkeypatch.setattr(decoder, "AVERAGE_EVERY", 2)
    for seed, kind in enumerate(KINDS):
        latents = torch.full((2, 16, 8, 8), seed / 8).half()
        weights = torch.zeros(2, 16, 16, dtype=torch.uint8)
        weights[:, 0, :2] = 255
        state = {"latents": latents, "pictures": made(seed, 2, 128, 128, 3), "weights": weights}
        torch.save(state, tmp_path / f"decoder_{kind}.pt")
    return tmp_path


@pytest.fixture
def training(work, monkeypatch):
    """Starts or resumes a training on one picture of each kind."""
    monkeypatch.setattr(decoder, "SHARES", dict.fromkeys(KINDS, 1))
    args = SimpleNamespace(decoder_steps=5, decoder_scenes=4, seed=3, device="cpu", output=WEIGHTS.parent)
    return lambda: decoder.DecoderTraining(work, args)


# --- the loss ---


def test_an_error_counts_by_its_colour_and_by_its_edges_at_both_sizes():
    wanted, seen = torch.zeros(2, 1, 3, 128, 128)
    seen[..., 40, 61] = -0.5
    colours, edges = decoder._errors(seen, wanted)
    assert colours.sum() == colours[..., 40, 61].sum() == 1.5
    fine = torch.zeros(128, 128)
    fine[40, 60:62], fine[39:41, 61] = 0.5, 0.5
    fine[40, 61] = 1  # across and down
    coarse = torch.zeros(128, 128)
    coarse[40:42, 58:62], coarse[38:42, 60:62] = 0.125, 0.125
    coarse[40:42, 60:62] = 0.25
    assert torch.allclose(edges[0], (fine + coarse).expand(3, -1, -1))
    flat = decoder._errors(wanted + 0.3, wanted)
    assert torch.allclose(flat[0], torch.tensor(0.3)) and flat[1].max() < 1e-6, "a shift of all colours has no edges"


def test_steepness_is_the_same_wherever_an_edge_lies_in_its_patch_and_less_where_it_is_wider():
    def edge(at, width):
        ramp = ((torch.arange(128) - at) / width).clamp(0, 1)
        return decoder._steepness(ramp.expand(1, 3, 128, -1)), decoder._steepness(ramp.expand(1, 3, 128, -1).mT)

    sharp, down = edge(41, 1)
    assert sharp.shape == (1, 3, 16, 16) and torch.equal(down, sharp.mT)
    assert torch.allclose(sharp[..., 5], torch.tensor((8 / 64) ** 0.5), atol=1e-4) and sharp[..., 6].max() < 0.01
    assert torch.allclose(edge(44, 1)[0], sharp)
    assert torch.allclose(edge(42, 2)[0][..., 5].square() * 2, sharp[..., 5].square(), atol=1e-4)


# --- the critic ---


def test_the_verdict_pulls_the_pictures_with_a_share_of_the_losss_gradient(training):
    trained = training()
    pictures = torch.rand(2, 2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decoded, wanted = pictures[0].requires_grad_(True), pictures[1]
    loss = (decoded - wanted).square().mean()
    found = trained._with_critic(loss, decoded, wanted)
    verdict, features = trained.critic(decoded)
    apart = sum((a - b).abs().mean() for a, b in zip(features, trained.critic(wanted)[1])) / len(features)
    told = torch.autograd.grad(loss + decoder.FEATURES * apart, decoded, retain_graph=True)[0]
    pulled = found - told
    assert (pulled.norm() / told.norm()).item() == pytest.approx(decoder.CRITIC, rel=1e-3)
    with torch.no_grad():
        towards = decoded - 0.1 * pulled / pulled.abs().max()
        assert trained.critic(towards)[0].mean() > verdict.mean(), "more like a rendered picture"
    assert all(parameter.grad is None for parameter in trained.critic.parameters())


def test_the_critic_learns_to_tell_rendered_pictures_from_decoded_ones(training):
    trained = training()
    rendered, drawn = torch.rand(2, 2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    drawn = torch.nn.functional.avg_pool2d(drawn, 9, 1, 4)
    trained._with_critic(drawn.mean(), drawn.requires_grad_(True), rendered)  # which freezes it
    losses = [trained._teach_critic(drawn.detach(), rendered) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.2
    assert trained.critic(rendered)[0].mean() > trained.critic(drawn)[0].mean()


# --- batches ---


def test_a_batch_has_its_share_of_each_kind_and_weighs_drawn_backgrounds_less(work, training, monkeypatch):
    monkeypatch.setattr(decoder, "SHARES", shares := {kind: i + 1 for i, kind in enumerate(KINDS)})
    trained = training()
    latents, pictures, weights = trained.batch(0)
    kinds = [kind for kind, count in shares.items() for _ in range(count)]
    for i, kind in enumerate(kinds):
        known = torch.load(work / f"decoder_{kind}.pt", weights_only=True)
        shown = known["pictures"].permute(0, 3, 1, 2) / 127.5 - 1
        assert min((pictures[i] - each).abs().max() for each in shown) < 1e-6
        behind = 0.4 if kind in ("drawn", "taught") else 1.0
        assert (weights[i, :, :8, :16] == 1).all(), "the object"
        assert torch.allclose(weights[i, :, 8:], torch.tensor(behind))
        assert torch.allclose(weights[i, :, :, 16:], torch.tensor(behind))
        noise = (latents[i] - known["latents"][0].float()).std().item()
        assert 0 < noise < 0.35 if kind in ("plain", "odd") else noise == 0
    assert len(latents) == len(pictures) == len(weights) == len(kinds)
    assert torch.equal(trained.batch(0)[0], latents) and not torch.equal(trained.batch(1)[0], latents)


def test_what_is_kept_of_a_kind_is_the_picture_of_its_latents_and_where_its_object_is(work, training):
    (work / "decoder_drawn.pt").unlink()
    (work / "pairs").mkdir()
    scenes = world.sample_scenes(3, np.random.default_rng(0))
    Pairs(torch.arange(3.0)[:, None, None, None].expand(3, 16, 8, 8), scenes).save(work / "pairs" / "drawn_000.pt")
    for _ in range(2):  # made, and read
        latents, pictures, weights = training().data["drawn"]
        assert latents[:, 0, 0, 0].tolist() == [0, 1, 2]
        assert np.abs(pictures.numpy() / 255 - world.render(scenes, 128)).max() < 0.01
        covered = torch.from_numpy(world.object_mask(scenes, 128)).reshape(3, 16, 8, 16, 8).amax((2, 4))
        assert (weights[covered == 1] == 255).all() and (weights == 0).any() and weights.shape == (3, 16, 16)
        around = torch.nn.functional.max_pool2d(covered[:, None], 3, 1, 1)[:, 0]
        assert torch.equal(weights, (around * 255).round().to(torch.uint8)), "with a margin"
        (work / "pairs" / "drawn_000.pt").unlink(missing_ok=True)


# --- the run ---


def test_a_step_follows_the_weighed_loss_and_later_the_critic_too(training):
    trained = training()
    for step, share in ((0, 1 / 20), (2, 3 / 22)):
        before, critic = copy.deepcopy(trained.model), copy.deepcopy(trained.critic)
        average = {name: value.clone() for name, value in trained.average.items()}
        told = trained.step(step)
        latents, pictures, weights = trained.batch(step)
        decoded = before.decode(latents)
        colours, edges = ((error * weights).mean() for error in decoder._errors(decoded, pictures))
        steepness = (decoder._steepness(decoded) - decoder._steepness(pictures)).abs()
        steepness = (steepness * torch.nn.functional.avg_pool2d(weights, 8)).mean()
        found = [told[name] for name in ("colours", "edges", "steepness")]
        assert found == pytest.approx([colours.item(), edges.item(), steepness.item()], rel=1e-4)
        loss = colours + decoder.EDGES * edges + decoder.STEEPNESS * steepness
        if step:
            rendered, drawn = critic(pictures)[0], critic(decoded.detach())[0]
            judged = torch.relu(1 - rendered).mean() + torch.relu(1 + drawn).mean()
            assert told["critic"] == pytest.approx(judged.item(), rel=1e-4)
            decoded.backward(trained._with_critic(loss, decoded, pictures))
        else:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(before.decoder.parameters(), 1.0)
        for mine, theirs in zip(before.decoder.parameters(), trained.decoder.parameters(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-4)
        for name, value in trained.decoder.state_dict().items():
            wanted = share * average[name] + (1 - share) * value
            assert torch.allclose(trained.average[name], wanted, atol=1e-6)


def state_of(trained):
    critic = {f"critic.{name}": value for name, value in trained.critic.state_dict().items()}
    average = {f"average.{name}": value for name, value in trained.average.items()}
    return {**trained.decoder.state_dict(), **critic, **average}


def test_a_resumed_training_ends_as_if_it_was_not_stopped(training):
    whole = training()
    start = {name: value.clone() for name, value in state_of(whole).items()}
    losses = [whole.step(step) for step in range(5)]
    ended = state_of(whole)
    assert all(not torch.equal(ended[name], value) for name, value in start.items() if name.endswith("weight"))
    assert "critic" not in losses[0] and all("critic" in each for each in losses[1:])
    parts = training()
    for step in range(3):
        parts.step(step)
    parts.save(2)
    resumed = training()
    assert resumed.first == 3
    resumed.run()
    assert all(torch.equal(value, ended[name]) for name, value in state_of(resumed).items())
    assert training().first == 5


def test_the_average_alone_goes_into_the_models_file_and_all_else_stays(work, training, tmp_path):
    trained = training()
    folder = tmp_path / "weights"
    folder.mkdir()
    before = load_file(WEIGHTS.parent / "tiny_base.safetensors")
    save_file(before, folder / "tiny_base.safetensors")
    trained.average = {name: value + 1 for name, value in trained.average.items()}
    trained.save(4)
    decoder.write_decoder(work, folder)
    after = load_file(folder / "tiny_base.safetensors")
    prefix = decoder.PREFIX + "decoder."
    assert before.keys() == after.keys()
    for name, value in after.items():
        moved = value.float() - before[name].float()
        assert torch.allclose(moved, torch.ones(()), atol=0.01) if name.startswith(prefix) else not moved.any()
        assert value.dtype == before[name].dtype
