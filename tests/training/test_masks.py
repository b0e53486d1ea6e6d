"""Which masks look inverted, and how masked pictures are shown."""

import pytest
import torch

from tlora_core.training.dataset import FRAMINGS, TrainingImage, frame
from tlora_core.training.masks import MOST_SIDE, covers_border, tinted


def box(height, width, top, bottom, left, right):
    """A mask [height, width] of a rectangle, in fractions of the picture."""
    mask = torch.zeros(height, width)
    mask[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 1
    return mask


MIDDLE = box(90, 160, 0.3, 0.7, 0.3, 0.7)
WITH_A_HOLE = torch.ones(64, 64)
WITH_A_HOLE[30:34, 30:34] = 0


@pytest.mark.parametrize(
    "mask, covers",
    [
        (MIDDLE, False),
        (1 - MIDDLE, True),
        (torch.ones(64, 64), False),
        (WITH_A_HOLE, False),  # within what an edge or a hole may leave out
        (box(64, 64, 0, 1, 0.4, 0.6), False),  # from edge to edge
        (box(64, 64, 0, 0.2, 0, 1), True),
        (0.5 * MIDDLE, False),
        (0.5 * (1 - MIDDLE), True),
        (torch.ones(2, 2), False),
    ],
)
def test_a_mask_that_covers_more_of_the_border_than_of_the_middle_is_told(mask, covers):
    assert covers_border(mask) is covers


def test_a_mask_is_judged_as_it_is_framed():
    """What is near the middle of a wide picture may be at the side of its centre square."""
    mask = box(64, 256, 0, 1, 0.375, 0.45)
    image = TrainingImage(torch.zeros(64, 256, 3), mask=mask)
    squared, whole = (frame(image, framing, 64, 8).mask for framing in FRAMINGS)
    assert covers_border(squared) and not covers_border(whole)


def test_only_what_is_outside_the_mask_is_tinted_and_large_pictures_are_shrunk():
    pixels = torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(0))
    mask = box(20, 30, 0.25, 0.75, 0.2, 0.8)
    shown, inside = tinted(pixels, mask), mask.bool()
    assert torch.equal(shown[inside], pixels[inside])
    assert (shown[~inside][:, 0] > shown[~inside][:, 1] + 0.3).all()  # magenta has little green
    assert torch.equal(tinted(pixels, None), pixels)
    assert tinted(torch.zeros(1000, 2000, 3), None).shape == (MOST_SIDE // 2, MOST_SIDE, 3)
