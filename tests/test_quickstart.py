"""The quickstart as it ships, on the real server: the concept is there, in the scenes that the prompts ask for."""
from pathlib import Path

import numpy as np
import pytest
import tiny_gate
import torch
from PIL import Image

from tlora_core import TLoRAFile
from tlora_core.tiny import world

QUICKSTART = Path(__file__).resolve().parents[1] / "workflows" / "quickstart.json"
CONCEPT = world.CONCEPTS[0]
BACKGROUNDS = ["snow", "night", "brick", "sea"]


@pytest.fixture(scope="module")
def result(server):
    return server.run(QUICKSTART)


def pictures(result, folder):
    paths = sorted(image.path for image in result.images if Path(image.path).name.startswith(folder + "_"))
    assert len(paths) == 4
    return torch.from_numpy(np.stack([np.asarray(Image.open(p).convert("RGB"), np.float32) / 255 for p in paths]))


def test_concept_is_recognisable_with_the_tlora_and_absent_without(result):
    distance = tiny_gate.ConceptMatcher(CONCEPT).distance
    with_tlora, without = distance(pictures(result, "with")), distance(pictures(result, "without"))
    assert (with_tlora < without - 0.05).all(), (with_tlora, without)
    assert with_tlora.median() < 0.15, with_tlora


def test_scenes_are_those_of_the_prompts_and_not_of_the_training_picture(result):
    guess = tiny_gate.load_scorer().predict(pictures(result, "with").permute(0, 3, 1, 2) * 2 - 1)["background"]
    seen = [list(world.BACKGROUNDS)[i] for i in guess.tolist()]
    assert sum(a == b for a, b in zip(seen, BACKGROUNDS)) >= 3, seen
    assert "beach" not in seen


def test_file_is_a_tlora_that_knows_how_it_was_trained(result):
    tlora = TLoRAFile.load(result.tlora_files[0])
    assert (tlora.method, tlora.token, tlora.class_word) == ("tlora", "sks", "flower")
    assert tlora.schedule.min_rank * 2 == tlora.schedule.rank
    assert tlora.training["steps_done"] == tlora.training["steps"]
