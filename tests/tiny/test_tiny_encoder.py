"""The tiny world's scorer as an encoder, on rendered pictures."""

import numpy as np
import pytest
import torch

from tlora_core.tiny import world
from tlora_core.tiny.encoder import TinyEncoder, asked

STAR, CROSS = (next(c for c in world.CONCEPTS if c.shape == shape) for shape in ("star", "cross"))


@pytest.fixture(scope="module")
def encoder():
    return TinyEncoder()


def shown(concept, background, place, seed):
    scenes = world.concept_scenes(concept, 1, np.random.default_rng(seed), background, place)
    return torch.from_numpy(world.render(scenes))


def test_the_same_subject_elsewhere_is_more_alike_than_another_in_the_same_scene(encoder):
    first, elsewhere = shown(STAR, "snow", "left", 0), shown(STAR, "night", "bottom", 1)
    another = shown(CROSS, "snow", "left", 0)
    seen = [encoder.subjects(picture) for picture in (first, elsewhere, another)]
    assert (seen[0] @ seen[0].T).item() == pytest.approx(1, abs=1e-5)
    assert (seen[0] @ seen[1].T).item() > (seen[0] @ seen[2].T).item() + 0.1


def test_a_plain_picture_looks_plain_and_grain_hardly_changes_it(encoder):
    plain = torch.full((1, 64, 64, 3), 0.7)
    seen = encoder.subjects(plain).reshape(3, -1)
    assert torch.allclose(seen, seen[:, :1].expand_as(seen), atol=1e-5), "to its rim"
    grain = 0.2 * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:  # the same part of both
        centre = torch.eye(len(world.PLACES))[None, list(world.PLACES).index("centre")]
        patch.setattr(encoder, "_probabilities", lambda pictures: {"place": centre})
        assert (encoder.subjects(plain + grain) @ encoder.subjects(plain).T).item() > 0.97


def test_scenes_are_as_alike_as_what_the_scorer_holds_for_likely(encoder, monkeypatch):
    one, unsure = torch.eye(12)[:1], 0.64 * torch.eye(12)[:1] + 0.36 * torch.eye(12)[1:2]
    seen = []
    for background, place in ((one, one[:, :5]), (unsure, one[:, :5]), (unsure, unsure[:, :5])):
        monkeypatch.setattr(encoder, "_probabilities", lambda _, b=background, p=place: {"background": b, "place": p})
        seen.append(encoder.scenes(torch.zeros(1, 64, 64, 3)))
    cosines = [(seen[0] @ each.T).item() for each in seen]
    assert cosines == pytest.approx([1, (0.8 + 1) / 2, 0.8]), "the roots of the shares that two have in common"


def test_scenes_are_alike_in_background_and_place_whatever_is_in_them(encoder):
    first, another = shown(STAR, "snow", "left", 0), shown(CROSS, "snow", "left", 1)
    seen = encoder.scenes(first)
    same, half, none = (
        (seen @ encoder.scenes(picture).T).item()
        for picture in (another, shown(STAR, "night", "left", 2), shown(STAR, "night", "bottom", 3))
    )
    assert same > 0.9 and 0.4 < half < 0.6 and none < 0.2


def test_pictures_follow_prompts_that_name_their_background_and_place(encoder):
    picture = shown(STAR, "snow", "left", 0)
    prompts = ["a star on the left in the snow", "a red star on the left at night", "a star at night", "a red star"]
    found = encoder.follows(picture.expand(4, -1, -1, -1), prompts).tolist()
    assert found[0] > 0.9 and 0.4 < found[1] < 0.6 and found[2] < 0.1 and np.isnan(found[3])


def test_each_picture_is_held_to_its_own_prompt(encoder):
    pictures = torch.cat([shown(STAR, "snow", "left", 0), shown(STAR, "night", "bottom", 1)])
    prompts = ["a star on the left in the snow", "a star at the bottom at night"]
    assert encoder.follows(pictures, prompts).min() > 0.9 and encoder.follows(pictures, prompts[::-1]).max() < 0.1


def test_prompts_are_read_by_whole_phrases():
    assert asked("a photo of a heart On the left by a brick wall") == [("background", 4), ("place", 0)]
    assert asked("a photo of a red heart") == asked("lost in the snowdrift") == []
