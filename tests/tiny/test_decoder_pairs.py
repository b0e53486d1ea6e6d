"""The pictures that the tiny base's decoder is trained on: the pose, the look and the background of what was drawn."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tinylib import pairs
from tinylib.pictures import take

from tlora_core.tiny import world

STAR = world.CONCEPTS[1]


@pytest.fixture(scope="module")
def backgrounds():
    return pairs.Backgrounds()


def drawn(scenes):
    return torch.from_numpy(world.render(scenes))


def scenes_of(backgrounds, count=3, seed=0):
    """Maroon stars on backgrounds that are among the known ones."""
    scenes = world.concept_scenes(STAR, count, np.random.default_rng(seed), "snow")
    scenes.background[:] = np.arange(count) + 2  # at night, in the snow, by a brick wall
    scenes.seed = backgrounds.seeds[np.arange(count) * 50 + 7]
    return scenes


def test_the_pose_of_any_look_is_found():
    scenes = world.sample_scenes(2, np.random.default_rng(4))
    scenes.shape[:], scenes.pattern[:] = world.SHAPES.index("heart"), world.PATTERNS.index("striped")
    looks = [pairs.LookMatcher(take(scenes, slice(i, i + 1))) for i in range(2)]
    for i, look in enumerate(looks):
        found, poses = look.fit(drawn(take(scenes, slice(i, i + 1))))
        pose = [*scenes.centre[i], scenes.radius[i], scenes.angle[i]]
        assert found.item() < 0.06 and poses[0].tolist() == pytest.approx(pose, abs=0.06)
    assert looks[0].distance(drawn(take(scenes, slice(1, 2)))).item() > 0.1, "of another colour"


@pytest.mark.parametrize("among", [range(len(world.BACKGROUNDS)), [9, 4, 2, 1]])
@pytest.mark.parametrize("kind", [1, 2, 4, 9])
def test_the_nearest_background_is_found_by_what_is_not_hidden(backgrounds, kind, among):
    scenes = world.sample_scenes(1, np.random.default_rng(0))
    scenes.centre[:], scenes.radius[:] = 3, 1e-3
    scenes.background[:], scenes.seed[:] = kind, backgrounds.seeds[200]
    picture, outside = drawn(scenes)[0].movedim(-1, 0), torch.ones(64, 64)
    picture[:, :, :48], outside[:, :48] = torch.tensor([1.0, 0.9, 0])[:, None, None], 0
    assert backgrounds.nearest(picture, among, outside) == (kind, backgrounds.seeds[200])


def test_a_fitted_scene_shows_the_picture_with_the_look_that_was_asked_for(backgrounds):
    shown = scenes_of(backgrounds)
    asked = world.concept_scenes(STAR, 3, np.random.default_rng(9), "beach", "left")
    before = {name: value.copy() for name, value in asked.__dict__.items()}
    matcher = pairs.LookMatcher(take(asked, slice(0, 1)))
    found = pairs.fitted(drawn(shown), asked, matcher, backgrounds, is_asked=False)
    assert found.background.tolist() == shown.background.tolist() and found.seed.tolist() == shown.seed.tolist()
    assert (drawn(found) - drawn(shown)).abs().mean() < 0.02
    assert all(np.array_equal(value, before[name], equal_nan=True) for name, value in asked.__dict__.items())


def test_what_the_drawn_object_hides_does_not_count_for_its_background():
    shown = world.concept_scenes(STAR, 2, np.random.default_rng(5), "snow", "right")
    asked, seen = world.concept_scenes(STAR, 2, np.random.default_rng(9), "snow", "left"), []
    recorder = SimpleNamespace(nearest=lambda picture, among, outside: seen.append(outside) or (3, 1))
    pairs.fitted(drawn(shown), asked, pairs.LookMatcher(take(asked, slice(0, 1))), recorder, is_asked=True)
    hidden = 1 - torch.stack(seen)
    assert (hidden - torch.from_numpy(world.object_mask(shown))).abs().mean() < 0.02


def test_a_background_that_was_asked_for_stays_the_target_whatever_was_drawn(backgrounds):
    shown = scenes_of(backgrounds)
    asked = take(shown, slice(None))
    asked.background = np.array([0, 5, 3])
    matcher = pairs.LookMatcher(take(asked, slice(0, 1)))
    assert pairs.fitted(drawn(shown), asked, matcher, backgrounds, is_asked=True).background.tolist() == [0, 5, 3]


def pair(count, seed=0):
    rng = np.random.default_rng(seed)
    return pairs.Pairs(
        torch.from_numpy(rng.standard_normal((count, 16, 8, 8))).float(), world.sample_scenes(count, rng)
    )


def same(one, other):
    fields = zip(one.scenes.__dict__.values(), other.scenes.__dict__.values(), strict=True)
    return torch.equal(one.latents, other.latents) and all(np.array_equal(*each, equal_nan=True) for each in fields)


def test_pairs_come_back_as_they_were_kept_and_by_their_kinds(tmp_path):
    (tmp_path / "pairs").mkdir()
    parts = {name: pair(2, seed) for seed, name in enumerate(("drawn_000", "drawn_001", "taught_000"))}
    for name, each in parts.items():
        each.latents = each.latents.half().float()  # as precise as they are kept
        each.save(tmp_path / "pairs" / f"{name}.pt")
    kept = pairs.Pairs.load(tmp_path / "pairs" / "drawn_000.pt")
    assert same(kept, parts["drawn_000"]) and kept.latents.dtype == torch.float32
    kinds = pairs.load_pairs(tmp_path)
    assert list(kinds) == ["drawn", "taught"] and same(kinds["taught"], parts["taught_000"])
    assert same(kinds["drawn"], pairs.Pairs.joined([parts["drawn_000"], parts["drawn_001"]]))
    assert torch.equal(kinds["drawn"].latents[2:], parts["drawn_001"].latents)
    assert kinds["drawn"].scenes.seed[2:].tolist() == parts["drawn_001"].scenes.seed.tolist()
    assert not list((tmp_path / "pairs").glob("*.tmp"))


def test_a_file_of_pairs_with_anything_but_weights_is_not_opened(tmp_path):
    torch.save({"latents": torch.zeros(1, 16, 8, 8), "shape": Path("x")}, tmp_path / "drawn_000.pt")
    with pytest.raises(pickle.UnpicklingError):
        pairs.Pairs.load(tmp_path / "drawn_000.pt")


def test_a_part_that_is_kept_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "Backgrounds", lambda: None)
    maker, made = pairs.Maker(tmp_path, None), []
    monkeypatch.setattr(maker, "drawn", lambda number, calls: made.append((number, calls)) or pair(1))
    for number in (3, 3, 4):
        maker.part("drawn", number, 2)
    assert made == [(3, 2), (4, 2)] and len(pairs.load_pairs(tmp_path)["drawn"].latents) == 2


def test_concepts_for_the_pairs_have_all_shapes_and_are_none_of_the_held_out_ones():
    concepts = pairs.odd_concepts(16, np.random.default_rng((pairs.STREAM, 3)))
    assert [concept.shape for concept in concepts] == [*world.SHAPES] * 2
    held_out = {(concept.body, concept.rim, concept.core) for concept in world.CONCEPTS}
    assert len({(each.body, each.rim, each.core) for each in concepts} - held_out) == 16
