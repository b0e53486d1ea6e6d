"""A training run's validation pictures, the thumbnail in its files, and its records for TensorBoard and W&B."""

import csv
import io

import pytest
import torch
from PIL import Image
from training_runs import PROMPTS, folders, record, request, run, same


def test_last_validation_pictures_put_no_finished_training_at_risk(base, output, monkeypatch):
    import comfy.model_management

    from tlora_core.hosts.comfy.training.personalize import Personalization

    def cancelled(*args):
        raise comfy.model_management.InterruptProcessingException

    for draw, name in ((cancelled, "run/cancelled"), (lambda *args: 1 / 0, "run/failed")):
        with monkeypatch.context() as patch:
            patch.setattr(Personalization, "draw", draw)
            try:
                run(base, file_name=name, rerun="restart", validation_prompts=PROMPTS, validate_every=6)
            except comfy.model_management.InterruptProcessingException:
                assert draw is cancelled
        assert (
            record(output)["state"] == "done"
            and record(output)["step"] == 6
            and list((output / "loras").glob(f"{name}*"))
        )
        assert not list(output.rglob("checkpoint.pt"))


def test_validation_pictures_that_fail_end_no_training(base, output, monkeypatch, caplog):
    from tlora_core import TLoRAError
    from tlora_core.training.run_folder import RunFolder

    def full(*args):
        raise TLoRAError("the disk is full.")

    monkeypatch.setattr(RunFolder, "save_picture", full)
    assert len(run(base, validation_prompts=PROMPTS, validate_every=2).losses) == 6
    assert sum("No validation pictures" in r.message for r in caplog.records) == 3


def test_validation_changes_nothing_and_is_kept(base, output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = run(base, file_name="run/plain", rerun="restart")
    watched = run(
        base, rerun="restart", validation_prompts=PROMPTS, validate_every=4, checkpoint_every=3, checkpoint_files=True
    )
    assert watched.losses == plain.losses and same(watched.tlora, plain.tlora)
    folder = folders(output)[-1]
    pictures = sorted((folder / "validation").iterdir())
    assert [p.name for p in pictures] == ["step_000004.png", "step_000006.png"]
    width, height = Image.open(pictures[0]).size  # two columns, and captions of one line or more
    assert width == 256 and 128 + 11 < height < 128 + 4 * 14 and pictures[0].read_bytes() != pictures[1].read_bytes()
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(plain.losses, rel=1e-6)
    assert [e.step for e in events.Images("validation")] == [4, 6]
    with open(folder / "loss.csv") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == plain.losses
    from tlora_core import TLoRAFile

    (saved,) = (output / "loras" / "run").glob("heart_step000003*")
    assert TLoRAFile.load(saved).training["steps_done"] == 3


def colour_of_thumbnail(path):
    """Of its middle, or None where the file holds none."""
    from tlora_core.files.card import read_thumbnail

    content = read_thumbnail(path)
    return None if content is None else Image.open(io.BytesIO(content)).getpixel((128, 128))


@pytest.fixture
def grey_by_step(monkeypatch):
    """Validation pictures are as grey as their step, those of the second prompt black."""
    from tlora_core.hosts.comfy.training.personalize import Personalization

    monkeypatch.setattr(
        Personalization,
        "draw",
        lambda self, tlora, prompts, seeds: [
            torch.full((len(seeds), 64, 64, 3), 0.0 if number else self.trainer.step / 10)
            for number in range(len(prompts))
        ],
    )


def is_of_step(path, step):
    return (
        colour_of_thumbnail(path) is not None
        and max(abs(level - 25.5 * step) for level in colour_of_thumbnail(path)) <= 2
    )


@pytest.mark.usefixtures("grey_by_step")
def test_files_hold_the_last_validation_picture_where_the_user_agrees(base, output):
    watch = {"validation_prompts": PROMPTS, "validate_every": 2, "checkpoint_every": 2, "checkpoint_files": True}
    shown = run(base, **watch)
    files = {path.name: path for path in (output / "loras" / "run").iterdir()}
    assert is_of_step(output / "loras" / shown.file, 6)
    assert is_of_step(files["heart_step000002_00001_.safetensors"], 2) and is_of_step(
        files["heart_step000004_00001_.safetensors"], 4
    )
    hidden = run(base, thumbnail=False, **watch)  # found, not trained again
    assert (
        len(folders(output)) == 1
        and colour_of_thumbnail(output / "loras" / hidden.file) is None
        and same(hidden.tlora, shown.tlora)
    )
    assert run(base, thumbnail=False, **watch).file == hidden.file and run(
        base, file_name="run/other", **watch
    ).file.startswith("run/other")
    assert len(folders(output)) == 1 and is_of_step(output / "loras" / shown.file, 6)


@pytest.mark.usefixtures("grey_by_step")
def test_without_validation_or_consent_no_picture_is_in_a_file(base, output):
    for keeping in ({}, {"thumbnail": False, "validation_prompts": PROMPTS, "validate_every": 2}):
        assert colour_of_thumbnail(output / "loras" / run(base, rerun="restart", **keeping).file) is None


@pytest.mark.usefixtures("grey_by_step")
def test_a_finished_file_without_room_for_its_last_picture_is_whole_and_found_again(base, output, monkeypatch):
    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.training import run as training_run

    def full(path, write):
        raise TLoRAError("the disk is full.")

    watch = {"validation_prompts": PROMPTS, "validate_every": 4}
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "write_whole", full)
        done = run(base, **watch)
    assert (
        is_of_step(output / "loras" / done.file, 4)
        and run(base, **watch).file == done.file
        and len(folders(output)) == 1
    )


def test_weights_and_biases_gets_the_loss_and_the_drawings_when_asked(base, output, monkeypatch):
    """Offline, by the real package where it is installed."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(base, request(4), wandb=True, validation_prompts=PROMPTS[:1], validate_every=2)
    assert wandb.run is None and list(folders(output)[-1].rglob("*.wandb"))
