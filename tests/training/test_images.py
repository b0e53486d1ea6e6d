"""Pictures for training."""

import numpy as np
import pytest
import torch
from PIL import Image

from tlora_core import RankSchedule, TLoRAError
from tlora_core.reports.plot import _round_ticks, loss_curve, schedule_curve
from tlora_core.training.images import check_images, resized, square, to_tensor


@pytest.mark.parametrize(
    "images, words",
    [
        (None, "empty"),
        (torch.zeros(0, 64, 64, 3), "empty"),
        (torch.zeros(1, 64, 64, 4), "4 channels"),
        (torch.zeros(1, 1, 1, 3), "1x1 pixels"),
        (torch.full((1, 64, 64, 3), torch.nan), "contains NaN"),
    ],
)
def test_image_that_cannot_work_is_refused_in_a_sentence(images, words):
    with pytest.raises(TLoRAError, match=words) as raised:
        check_images(images)
    assert str(raised.value).startswith("image ") and str(raised.value).endswith(".")


def test_crop_is_the_centre_square():
    image = torch.zeros(1, 40, 100, 3)
    image[:, :, 30:70] = 1
    assert torch.equal(square(image, 40), torch.ones(1, 40, 40, 3))


@pytest.mark.parametrize(("height", "width"), [(96, 160), (161, 96), (97, 97)])
def test_a_picture_that_is_not_square_is_cut_before_it_is_resized(height, width):
    """Like the reference. Otherwise pixels beyond the cut would show at the border."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    side, picture = min(height, width), Image.fromarray(pixels)
    left, top = (width - side) // 2, (height - side) // 2
    wanted = picture.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.LANCZOS)
    got = square(torch.from_numpy(pixels / 255)[None].float(), 64)
    assert torch.equal(got, to_tensor(wanted))
    mask = torch.zeros(height, width)
    mask[top : top + side, left : left + side] = 1
    assert resized(mask, (left, top, side, side), (64, 64), Image.Resampling.BOX).min() == 1


def test_a_box_of_broken_pixels_keeps_its_place():
    ramp = torch.linspace(0, 1, 101)[None, :, None].expand(50, 101, 3)
    half = resized(ramp, (10.5, 0.25, 60.0, 49.5), (30, 25))
    middle = (10.5 + 30) / 101 - 0.5 / 101  # a pixel's middle is half a pixel from its edge
    assert half.mean().item() == pytest.approx(middle * 101 / 100, abs=0.003)
    assert resized(ramp, (0, 0, 101, 50.000000001), (10, 5)).shape == (5, 10, 3)


def test_resize_keeps_range_and_mean():
    image = torch.rand(2, 96, 64, 3, generator=torch.Generator().manual_seed(0))
    small = square(image, 32)
    assert small.shape == (2, 32, 32, 3) and small.min() >= 0 and small.max() <= 1
    assert small.mean() == pytest.approx(image[:, 16:80].mean().item(), abs=0.01)


def colours(picture):
    return {tuple(c) for c in np.asarray(picture).reshape(-1, 3).tolist()}


def test_loss_curve_is_drawn_for_any_number_of_steps():
    empty, one, many = (loss_curve(losses) for losses in ([], [0.5], [1 / (i + 1) for i in range(500)]))
    line = (100, 180, 255)
    assert line not in colours(empty) and line in colours(many)
    assert one.size == many.size and to_tensor(many).shape == (1, many.height, many.width, 3)


def test_schedule_picture_marks_the_samplers_steps():
    schedule = RankSchedule(64, 32)
    mark = (255, 176, 80)
    assert mark not in colours(schedule_curve(schedule))
    assert mark in colours(schedule_curve(schedule, [(0.5, 48)]))


@pytest.mark.parametrize("top", [1e-9, 0.0999, 0.1, 1, 5.4, 16.2, 60, 99.99, 100, 123456])
def test_ticks_of_bars_are_few_and_round(top):
    ticks = _round_ticks(top)
    assert 3 <= len(ticks) <= 6 and ticks[0] == (0, "0") and ticks[-1][0] <= top
    # One digit, 1, 2 or 5, is all there is to the distance.
    assert f"{ticks[1][0]:e}"[0] in "125" and float(f"{ticks[1][0]:.0e}") == pytest.approx(ticks[1][0])
