"""Class pictures that the model draws for prior preservation: shown, cancelled, and kept for the next training."""

import logging
import os

import pytest
import torch
from training_runs import request, run


def asked(count=2, **changes):
    return request(2, config={"prior_weight": 1.0, "prior_count": count}, **changes)


@pytest.fixture
def drawn(monkeypatch):
    """The seeds of the class pictures that have been drawn, in turn."""
    from tlora_core.hosts.comfy.training import class_pictures

    seeds, draw = [], class_pictures.draw
    monkeypatch.setattr(class_pictures, "draw", lambda *args: (seeds.extend(args[-1]), draw(*args))[1])
    return seeds


def files(output):
    return sorted((output / "tlora_class_pictures").rglob("*.*"))


def test_drawing_is_reported_and_a_cancel_keeps_the_finished_pictures(base, output, monkeypatch, drawn):
    import comfy.model_management
    import comfy.utils

    from tlora_core.hosts.comfy.training import class_pictures

    said, bars = [], []
    monkeypatch.setattr(class_pictures, "say", lambda text, node_id: said.append(text))

    def hook(value, total, preview, node_id=None):
        bars.append((value, total))
        if (value, total) == (3, 4):
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    run(base, asked(2))
    assert said == ["drawing class picture 1 of 2", "drawing class picture 2 of 2", "2 class pictures are ready"]
    assert bars[:3] == [(0, 2), (1, 2), (2, 2)]
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(base, asked(4))
    assert said[3:] == ["drawing class picture 3 of 4", "drawing class picture 4 of 4"] and drawn == [0, 1, 2]
    assert [path.name for path in files(output)] == ["0.png", "1.png", "2.png"] and not list(output.rglob("*.tmp"))


def test_another_training_has_them_at_once_and_goes_the_same(base, output, drawn):
    first = run(base, asked())
    again = run(base, asked(), rerun="restart")
    assert drawn == [0, 1] and again.losses == first.losses
    run(base, asked(rate=0.02))
    assert drawn == [0, 1]
    run(base, asked(class_word="star"))
    run(base, asked(resolution=128))
    patched = base[0].clone()
    patched.add_patches(
        {next(k for k in patched.model.state_dict() if k.endswith("attn1.to_q.weight")): (torch.ones(1),)}, 0.5
    )
    run((patched, *base[1:]), asked())
    assert drawn == [0, 1] * 4 and len({path.parent for path in files(output)}) == 4


def test_damaged_ones_are_drawn_again(base, output, drawn):
    from PIL import Image

    first = run(base, asked(3))
    whole = [path.read_bytes() for path in files(output)]
    cut, other_size = files(output)[:2]
    cut.write_bytes(whole[0][:-40])
    Image.new("RGB", (32, 32)).save(other_size)
    assert run(base, asked(3), rerun="restart").losses == first.losses and drawn == [0, 1, 2, 0, 1]
    assert [path.read_bytes() for path in files(output)] == whole


def test_a_full_disk_and_a_model_that_cannot_be_known_again_keep_none_and_end_no_training(
    base, output, monkeypatch, caplog, drawn
):
    replace = os.replace

    def full(source, target):
        if "tlora_class_pictures" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "replace", full)
        first = run(base, asked())
    assert "A class picture was not saved" in caplog.text and not files(output)
    unknown = base[0].clone()
    unknown.model_options["sampler_cfg_function"] = lambda args: args["cond"]
    run((unknown, *base[1:]), asked())
    assert not files(output)
    assert (
        run(base, asked(), rerun="restart").losses == first.losses and drawn == [0, 1] * 3 and len(files(output)) == 2
    )
