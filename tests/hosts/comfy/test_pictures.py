"""What a page shows of the training pictures and their masks, from the files of the host's Load Image."""

import base64
import io

import numpy as np
import pytest
import torch
from input_pictures import HIDDEN, IS_SUBJECT, SUBJECT, write_picture
from PIL import Image


@pytest.fixture(scope="module")
def folder(comfy, tmp_path_factory):
    """The host's input folder with a cut-out, one in whose middle a mask was painted, and one without alpha."""
    import folder_paths

    before, path = folder_paths.get_input_directory(), tmp_path_factory.mktemp("root") / "input"
    folder_paths.set_input_directory(str(path))
    write_picture(path / "cut.png", IS_SUBJECT)
    write_picture(path / "clipspace" / "painted.png", ~IS_SUBJECT)
    write_picture(path / "plain.png")
    write_picture(path.parent / "secret.png", IS_SUBJECT)
    (path / "no picture.png").write_text("no picture")
    yield path
    folder_paths.set_input_directory(before)


def asked(*items, framing="centre square", resolution=64):
    from tlora_core.hosts.comfy.routes.pictures import asked_pictures

    items = [{"image": image, "mask": mask} for image, mask in items]
    return asked_pictures({"items": items, "framing": framing, "resolution": resolution})


def mask_of(image, channel="alpha", is_inverted=False):
    return {"image": image, "channel": channel, "is_inverted": is_inverted}


def seen(picture) -> np.ndarray:
    source = picture["source"].removeprefix("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))), np.float32)


def is_near(colour, other) -> bool:
    return bool(np.abs(colour - np.array(other)).max() < 40)


@pytest.mark.parametrize(
    "image, mask, is_masked, warning",
    [
        ("plain.png", None, False, ""),
        ("cut.png", None, False, "transparent"),
        ("clipspace/painted.png [input]", None, False, "painted"),
        ("cut.png", mask_of("cut.png"), True, "border"),
        ("cut.png", mask_of("cut.png", is_inverted=True), True, ""),
        ("plain.png", mask_of("cut.png", is_inverted=True), True, ""),
        ("clipspace/painted.png [input]", mask_of("clipspace/painted.png [input]"), True, ""),
        ("plain.png", mask_of("plain.png", "red"), True, "border"),
        ("plain.png", mask_of("plain.png", "blue"), True, ""),
    ],
)
def test_the_mask_of_load_image_is_judged_before_a_run(folder, image, mask, is_masked, warning):
    answer = asked((image, mask))
    assert answer["count"] == 1
    assert [(p["is_masked"], p["warning"]) for p in answer["pictures"]] == [(is_masked, warning)]


def test_pictures_are_shown_as_the_training_frames_them_and_tinted_outside_the_mask(folder):
    inverted = mask_of("cut.png", is_inverted=True)
    [squared], [kept], [whole], [bare] = (
        asked(("cut.png", mask), framing=framing)["pictures"]
        for framing, mask in (
            ("centre square", inverted),
            ("keep aspect ratio", inverted),
            (None, inverted),
            ("centre square", None),
        )
    )
    assert seen(squared).shape == (64, 64, 3) and seen(kept).shape == (48, 80, 3) and seen(whole).shape == (80, 120, 3)
    assert is_near(seen(squared)[32, 32], SUBJECT) and not is_near(seen(squared)[4, 4], HIDDEN)
    assert is_near(seen(bare)[4, 4], HIDDEN)  # as it would be learnt


def test_a_mask_that_the_training_refuses_is_refused_before_it(folder):
    assert asked(("plain.png", mask_of("plain.png")))["wrong"].startswith("mask 1 is empty")
    assert asked(("cut.png", mask_of("plain.png", is_inverted=True)))["wrong"].startswith("mask has shape [1, 64, 64]")
    assert asked(("cut.png", None), framing="round")["wrong"].startswith('framing is "round"')


@pytest.mark.parametrize(
    "name", ["../secret.png", "../secret.png [input]", "/etc/hostname", "gone.png", "no picture.png", "\0"]
)
def test_only_pictures_in_the_hosts_folders_are_read(folder, name):
    assert asked((name, None)) == asked(("cut.png", mask_of(name))) == {}


@pytest.mark.parametrize("name", ["../secret.png", "clipspace/../../secret.png [input]", "/etc/hostname"])
def test_a_host_that_reads_any_path_is_not_asked_to(folder, monkeypatch, name):
    """As earlier versions did."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_annotated_filepath", lambda asked: str(folder.parent / "secret.png"))
    assert asked((name, None)) == {}
    assert asked(("cut.png", None))["count"] == 1  # what the host then reads


def test_few_of_many_pictures_are_shown_and_all_are_counted(folder):
    from tlora_core.hosts.comfy.page.pictures import MOST_SHOWN

    answer = asked(*[("cut.png", None)] * (MOST_SHOWN + 2))
    assert len(answer["pictures"]) == MOST_SHOWN and answer["count"] == MOST_SHOWN + 2


@pytest.mark.parametrize("is_inverted", [False, True])
def test_a_training_says_that_its_mask_covers_the_border(base, output, monkeypatch, caplog, is_inverted):
    from training_runs import request, run

    from tlora_core.hosts.comfy.page.training import LiveRun
    from tlora_core.training.dataset import training_images

    notes, mask = [], torch.zeros(64, 64)
    mask[20:44, 20:44] = 1
    monkeypatch.setattr(LiveRun, "note", lambda self, text: notes.append(text))
    run(
        base,
        request(steps=1),
        pictures=training_images(torch.rand(1, 64, 64, 3), mask=1 - mask if is_inverted else mask),
    )
    logged = [r.message for r in caplog.records if "covers the border" in r.message]
    assert len(logged) == is_inverted and sum("Invert Mask" in note for note in notes) == is_inverted
