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


def test_prompts_are_read_by_whole_phrases():
    assert asked("a photo of a heart On the left by a brick wall") == [("background", 4), ("place", 0)]
    assert asked("a photo of a red heart") == asked("lost in the snowdrift") == []
