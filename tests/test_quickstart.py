"""The quickstart as it ships, with all its steps, on the real server."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlora_core import TLoRAFile

QUICKSTART = Path(__file__).resolve().parents[1] / "workflows" / "quickstart.json"


@pytest.fixture(scope="module")
def result(server):
    return server.run(QUICKSTART)


def pictures(result, folder):
    paths = sorted(image.path for image in result.images if Path(image.path).name.startswith(folder + "_"))
    return [np.asarray(Image.open(path).convert("RGB"), np.int16) for path in paths]


def test_four_scenes_are_drawn_with_and_without_and_the_tlora_changes_each(result):
    with_tlora, without = pictures(result, "with"), pictures(result, "without")
    assert len(with_tlora) == len(without) == 4
    for one, other in zip(with_tlora, without):
        assert one.shape == (128, 128, 3) and one.std() > 10 and np.abs(one - other).mean() > 5


def test_file_is_a_tlora_that_knows_how_it_was_trained(result):
    tlora = TLoRAFile.load(result.tlora_files[0])
    assert (tlora.method, tlora.token, tlora.class_word) == ("tlora", "sks", "flower")
    assert tlora.schedule.min_rank * 2 == tlora.schedule.rank
    assert tlora.training["steps_done"] == tlora.training["steps"] == 250
