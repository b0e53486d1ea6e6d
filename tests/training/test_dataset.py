"""Training pictures: captions, masks, framing."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tlora_core import TLoRAError
from tlora_core.training.dataset import (
    FRAMINGS,
    PROMPT,
    TrainingImage,
    bucket,
    caption_of,
    class_caption_of,
    frame,
    loss_weights,
    training_images,
    training_list,
)
from tlora_core.training.images import square

SQUARE, ASPECT = FRAMINGS


def pictures(count, height, width):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


def test_captions_are_one_for_all_or_one_for_each():
    batch = pictures(2, 20, 30)
    assert [i.caption for i in training_images(batch)] == [PROMPT] * 2
    assert [i.caption for i in training_images(batch, "\n a {token} \n")] == ["a {token}"] * 2
    assert [i.caption for i in training_images(batch, "one\n\ntwo")] == ["one", "two"]
    with pytest.raises(TLoRAError, match="captions has 3 lines for 2 pictures"):
        training_images(batch, "a\nb\nc")
    assert caption_of("a {token}  {class_word}, {token}", "sks", "dog") == "a sks dog, sks"
    assert caption_of(PROMPT, "", "dog") == "a photo of dog"
    assert caption_of("{} in the snow", "sks", "dog") == "sks dog in the snow" and caption_of("{}", "", "dog") == "dog"


def test_masks_are_one_for_all_or_one_for_each():
    batch, mask = pictures(2, 20, 30), torch.zeros(2, 20, 30)
    mask[0, 5:10, 5:10] = mask[1, :3] = 2.0
    one, two = training_images(batch, mask=mask[0]), training_images(batch, mask=mask)
    assert torch.equal(one[1].mask, mask[0] / 2) and torch.equal(two[1].mask, mask[1] / 2)
    assert all(i.mask.shape == (20, 30) and i.mask.max() == 1 for i in one + two)
    with pytest.raises(TLoRAError, match="mask has shape .*same height"):
        training_images(batch, mask=torch.ones(20, 31))
    with pytest.raises(TLoRAError, match="mask has shape"):
        training_images(batch, mask=torch.ones(3, 20, 30))
    with pytest.raises(TLoRAError, match="mask 2 is empty"):
        training_images(batch, mask=torch.stack([torch.ones(20, 30), torch.zeros(20, 30)]))
    with pytest.raises(TLoRAError, match="mask 1 is empty"):
        # The host makes this mask for a picture in which nothing is painted over.
        training_images(batch, mask=torch.zeros(1, 64, 64))


def captions_of(*arguments):
    return [image.caption for image in training_list(*arguments)]


def test_a_list_of_pictures_of_any_sizes_is_one_set_with_captions_as_texts_or_lines():
    listed = [pictures(1, 20, 30), pictures(1, 40, 20), pictures(2, 16, 16)]
    assert [tuple(image.pixels.shape[:2]) for image in training_list(listed)] == [
        (20, 30),
        (40, 20),
        (16, 16),
        (16, 16),
    ]
    assert captions_of(listed) == [PROMPT] * 4 and captions_of(listed, ["a {token}"]) == ["a {token}"] * 4
    assert captions_of(listed, ["a\nb\nc\nd"]) == captions_of(listed, ["a", "b", "c", "d"]) == ["a", "b", "c", "d"]
    assert captions_of(listed, ["a", "b", "c"]) == ["a", "b", "c", "c"] and captions_of(listed, ["a", "b", "c\nd"])[
        2:
    ] == ["c", "d"]
    # The text of a picture's own file: none where there is no file, and one caption whatever its lines.
    assert captions_of(listed, ["a dog,\non grass", "", " ", "d"]) == ["a dog, on grass", PROMPT, PROMPT, "d"]
    assert captions_of(listed[2:], ["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    "captions, words",
    [
        (["a", "b"], "captions has 2 texts for 4 pictures; give one for all or one for each"),
        (["a\nb"], "captions has 2 lines for 4 pictures; give one for all or one for each"),
        (["a", "b\nc", "d\ne\nf"], "captions has 2 lines for 1 picture;"),
    ],
)
def test_captions_that_are_not_as_many_as_the_pictures_of_a_list_are_refused(captions, words):
    with pytest.raises(TLoRAError, match=words):
        training_list([pictures(1, 20, 30), pictures(1, 40, 20), pictures(2, 16, 16)], captions)
    with pytest.raises(TLoRAError, match="image is an empty list"):
        training_list([])


def test_masks_of_a_list_are_one_for_all_or_each_picture_or_each_batch():
    listed, same = [pictures(1, 20, 30), pictures(2, 16, 16)], [pictures(1, 16, 16), pictures(2, 16, 16)]
    first, others = torch.ones(1, 20, 30), torch.stack([torch.full((16, 16), level) for level in (0.25, 0.5)])
    levels = lambda *arguments: [float(image.mask.mean()) for image in training_list(*arguments)]  # noqa: E731
    assert levels(listed, [""], [first, others]) == levels(listed, [""], [first, *others]) == [1, 0.25, 0.5]
    assert levels(listed, [""], [first, others[0]]) == [1, 0.25, 0.25]
    assert levels(same, [""], [others[:1]]) == [0.25] * 3
    with pytest.raises(TLoRAError, match="mask has 4 masks for 3 pictures; connect one for all or one for each"):
        training_list(listed, [""], [first, *others, first])
    with pytest.raises(TLoRAError, match="mask has shape .*same height"):
        training_list(listed, [""], [first])
    with pytest.raises(TLoRAError, match="masks of several sizes for pictures of one size"):
        training_list(same, [""], [others[0], others[1], first])


def test_square_framing_is_the_papers():
    (image,) = training_images(pictures(1, 40, 100))
    framed = frame(image, SQUARE, 32, 8)
    assert torch.equal(framed.pixels, square(image.pixels[None], 32)[0])
    assert (framed.original, framed.crop, framed.size) == ((40, 40), (0, 0), (32, 32))


def test_aspect_framing_keeps_the_shape_and_reports_the_crop():
    (image,) = training_images(pictures(1, 600, 1000))
    framed = frame(image, ASPECT, 1024, 8)
    assert framed.size == (1280, 768) and framed.original == (1000, 600) and framed.crop == (0, 0)
    tall = frame(TrainingImage(pictures(1, 1000, 610)[0]), ASPECT, 1024, 8)
    assert tall.size == (768, 1280) and tall.crop[0] + tall.crop[1] > 0
    assert frame(TrainingImage(pictures(1, 64, 64)[0]), ASPECT, 64, 8).pixels.shape == (64, 64, 3)


@given(st.integers(20, 4000), st.integers(20, 4000), st.sampled_from([64, 512, 1024]))
@example(2191, 3934, 1024)
@example(1600, 425, 512)
@settings(max_examples=40)
def test_aspect_framing_never_asks_for_more_than_the_picture(width, height, resolution):
    picture = torch.zeros(1, 1, 1).expand(height, width, 3)
    framed = frame(TrainingImage(picture), ASPECT, resolution, 8)
    assert framed.size == bucket(width, height, resolution, 8) and min(framed.crop) >= 0


@given(st.integers(16, 5000), st.integers(16, 5000), st.sampled_from([(64, 8), (512, 8), (1024, 8), (1024, 16)]))
def test_buckets_are_whole_cells_of_no_more_pixels_and_near_the_shape(width, height, size):
    resolution, unit = size
    w, h = bucket(width, height, resolution, unit)
    assert w % unit == h % unit == 0 and 0 < w * h <= resolution**2
    if 0.4 < width / height < 2.5:
        assert 0.8 < (w / h) / (width / height) < 1.25 and w * h >= 0.85 * resolution**2


def test_mask_is_framed_with_its_picture():
    pixels, mask = torch.zeros(40, 80, 3), torch.zeros(40, 80)
    pixels[10:30, 50:70], mask[10:30, 50:70] = 1, 1
    for framing in FRAMINGS:
        framed = frame(TrainingImage(pixels, mask=mask), framing, 64, 8)
        assert framed.mask.shape == framed.pixels.shape[:2]
        assert (framed.mask - framed.pixels[..., 0]).abs().mean() < 0.05


def test_weights_of_the_loss_have_mean_one_and_the_floor_outside():
    mask = torch.zeros(16, 16)
    mask[:8, :8] = 1
    weights = loss_weights(mask, (4, 4), 0.25)
    assert weights.mean() == pytest.approx(1) and float(weights[3, 3] / weights[0, 0]) == pytest.approx(0.25)
    assert float(loss_weights(mask, (4, 4), 0.0)[3, 3]) == 0
    with pytest.raises(TLoRAError, match="covers nothing"):
        loss_weights(torch.zeros(16, 16), (4, 4), 0.0)


def test_alpha_is_the_mask_and_limits_a_mask_that_is_given():
    batch, alpha = pictures(2, 20, 30), torch.zeros(2, 20, 30, 1)
    alpha[:, :10] = 1
    alpha[1, :5] = 0.5
    cut_out, mask = torch.cat([batch, alpha], 3), torch.zeros(20, 30)
    mask[4:16] = 1
    plain, limited = training_images(cut_out), training_images(cut_out, mask=mask)
    for image, colours, opaque in zip(plain, batch, alpha[..., 0]):
        assert torch.equal(image.pixels, colours) and torch.equal(image.mask, opaque)
    assert all(torch.equal(image.mask, mask * opaque) for image, opaque in zip(limited, alpha[..., 0]))
    assert [tuple(image.pixels.shape) for image in training_list([cut_out])] == [(20, 30, 3)] * 2
    assert training_images(torch.cat([batch, torch.ones_like(alpha)], 3))[0].mask is None


def test_a_picture_of_which_nothing_is_opaque_is_refused():
    cut_out, below = torch.zeros(1, 20, 30, 4), torch.zeros(20, 30)
    below[15:] = 1
    with pytest.raises(TLoRAError, match="image 1 is transparent in all of it; connect a picture"):
        training_images(cut_out)
    cut_out[:, :10, :, 3] = 1
    with pytest.raises(TLoRAError, match="image 1 is transparent in all of its mask"):
        training_images(cut_out, mask=below)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a photo of {token} {class_word}", "a photo of dog"),
        ("a {} in the snow", "a dog in the snow"),
        ("sks dog, and sksy", "dog, and sksy"),
        ("{token}", ""),
    ],
)
def test_a_caption_of_the_class_is_the_caption_without_the_token(caption, expected):
    assert class_caption_of(caption, "sks", "dog") == expected


def test_a_caption_without_the_token_has_none_of_the_class():
    with pytest.raises(TLoRAError, match='^captions has "a dog" without the token, which preservation_weight would'):
        class_caption_of("a {class_word}", "sks", "dog")
