"""A training run on the tiny base as the Train node makes it: checkpoints, stop, cancel, resume, and their record."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from places import REPO
from training_runs import folders, record, request, run, same

PROMPTS = ("a photo of {token} {class_word} on snow", "a photo of a heart")


def test_a_run_is_named_like_its_file_without_the_number_that_was_added(comfy):
    from tlora_core.hosts.comfy.training.run import _without_counter

    assert [_without_counter(name) for name in ("dog_v1.5_00001_", "sks_dog2_00012_", "dog_123456_", "v2_0")] == [
        "dog_v1.5",
        "sks_dog2",
        "dog",
        "v2_0",
    ]


class Wish:
    """Does something when a run has made a step."""

    def __init__(self, monkeypatch, step, do):
        from tlora_core.hosts.comfy.page.training import LiveRun

        self.runs, report = [], LiveRun.report

        def reporting(live, at, loss):
            self.runs.append(live)
            report(live, at, loss)
            if at == step and len(set(self.runs)) == 1:
                do(live)

        monkeypatch.setattr(LiveRun, "report", reporting)


def cancel(live):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()


def shown():
    """What the page says of the last run: its state and the message."""
    from tlora_core.hosts.comfy.page.training import LiveRun

    last = LiveRun.states()[-1]
    return last["state"], last["message"]


def test_white_space_in_token_and_class_word_is_that_of_captions_and_what_cannot_be_shown_is_refused_before_any_work(
    base, output
):
    from tlora_core import TLoRAError, TLoRAFile
    from tlora_core.hosts.comfy.training.personalize import TrainRequest

    plain = request(2, token="sks", class_word="red heart")
    asked = request(2, token="\u3000sks\xa0", class_word="red\u2003 heart\t")
    assert asked == plain and asked.prompt == "a photo of sks red heart"
    saved = TLoRAFile.load(output / "loras" / run(base, asked).file)
    assert (saved.token, saved.class_word) == ("sks", "red heart")
    for name, hidden in (("token", "\u200d"), ("class_word", "\ufeff"), ("class_word", "\x00")):
        shown = hidden.encode("unicode_escape").decode()
        with pytest.raises(TLoRAError) as raised:
            TrainRequest(**{"token": "sks", "class_word": "dog", name: f"a{hidden}b"})
        assert str(raised.value) == f"{name} is 'a{shown}b'; it must be one line of text, without {shown}."
    with pytest.raises(TLoRAError, match="both empty"):
        request(token="\u3000", class_word="\t")


def test_stop_keeps_what_was_learnt_and_continue_goes_on(base, output, monkeypatch):
    whole = run(base, file_name="run/whole", rerun="restart")
    with monkeypatch.context() as patch:
        Wish(patch, 3, lambda live: live.request("stop"))
        stopped = run(base, rerun="restart")
    assert (
        len(stopped.losses) == 3 and stopped.tlora.training["steps_done"] == 3 and record(output)["state"] == "stopped"
    )
    assert run(base, file_name="run/heart").file == stopped.file, "a stopped run is taken as it is"
    assert shown() == ("found", "Stopped at step 3 of 6; set rerun to continue to resume.")
    went_on = run(base, rerun="continue")
    assert went_on.losses == whole.losses and same(went_on.tlora, whole.tlora)
    run(base)
    assert shown() == ("found", "")


@pytest.mark.parametrize("save", [False, True])
def test_cancel_leaves_the_last_checkpoint_or_saves_when_asked(base, output, monkeypatch, save):
    import comfy.model_management

    whole = run(base, file_name="run/whole", rerun="restart")
    with monkeypatch.context() as patch:
        Wish(patch, 5, cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(base, rerun="restart", checkpoint_every=2, save_on_cancel=save)
    saved = [p for p in (output / "loras" / "run").iterdir() if "heart" in p.name]
    cancelled = next(f for f in folders(output) if json.loads((f / "run.json").read_text())["state"] == "cancelled")
    assert len(saved) == save and json.loads((cancelled / "run.json").read_text())["step"] == (5 if save else 4)
    done = run(base, checkpoint_every=2)
    assert done.losses == whole.losses and same(done.tlora, whole.tlora)
    assert not (cancelled / "checkpoint.pt").exists() and not list(output.rglob("*.tmp"))


def no_number_after(monkeypatch, steps):
    """The loss is none from then on."""
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser

    losses, calls = HostDenoiser.losses, []

    def failing(denoiser, rows, generator):
        calls.append(rows)
        for loss in losses(denoiser, rows, generator):
            yield loss * (float("nan") if len(calls) > steps else 1)

    monkeypatch.setattr(HostDenoiser, "losses", failing)


def test_cancel_and_divergence_end_the_run_where_the_disk_takes_nothing_too(base, output, monkeypatch):
    import comfy.model_management

    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.page.training import LiveRun
    from tlora_core.hosts.comfy.training.run import TrainingRun

    def full(*args):
        raise TLoRAError("the disk is full.")

    monkeypatch.setattr(TrainingRun, "_save", full)
    with monkeypatch.context() as patch:
        Wish(patch, 2, cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(base, rerun="restart", save_on_cancel=True)
    assert (record(output)["state"], LiveRun.states()[-1]["state"]) == ("cancelled", "cancelled")
    assert "not saved: the disk is full." in record(output)["message"]
    no_number_after(monkeypatch, 27)
    with pytest.raises(TLoRAError, match="lower learning_rate.*the disk is full"):
        run(base, request(60))
    assert (record(output)["state"], LiveRun.states()[-1]["state"]) == ("failed", "failed")


def test_a_long_name_makes_a_folder_that_is_found_again(tmp_path):
    from tlora_core.training.run_folder import RunFolder

    made = RunFolder.create(tmp_path, "名" * 80, "0" * 32, 9, {})
    assert len(made.path.name.encode()) < 255 and RunFolder.find(tmp_path, "0" * 32).path == made.path


def test_record_on_a_full_disk_ends_and_holds_nothing_up(tmp_path, caplog, monkeypatch):
    resource = pytest.importorskip("resource")

    from tlora_core.training import run_folder as runs

    monkeypatch.setattr(runs, "FLUSH_EVERY", -1.0)
    recorder = runs.Recorder(runs.RunFolder.create(tmp_path, "run", "0" * 32, 999, {}), 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # of any file, in bytes
    try:
        for step in range(1, 200):
            recorder.loss(step, 0.5)
        recorder.picture(200, Image.new("RGB", (64, 64)))
        recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len([r for r in caplog.records if "record of this run" in r.message]) == 1


def test_record_goes_on_where_the_run_was_taken_up(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tlora_core.training.run_folder import Recorder, RunFolder

    folder = RunFolder.create(tmp_path, "run", "0" * 32, 9, {})
    for first, steps, loss in ((0, (1, 2, 3, 4), 0.5), (2, (3, 4, 5), 0.25)):
        recorder = Recorder(folder, first)
        for step in steps:
            recorder.loss(step, loss)
        recorder.close()
        for file in folder.path.glob("events*"):
            file.rename(file.with_name(f"{file.name}.{first}"))  # the second begins within the same second
    shown = EventAccumulator(str(folder.path)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in shown] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25)]


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


def test_error_leaves_a_run_that_can_be_taken_up(base, output, monkeypatch):
    from tlora_core import TLoRAError

    def full(*args):
        raise TLoRAError("the device is gone.")

    with monkeypatch.context() as patch:
        Wish(patch, 3, full)
        with pytest.raises(TLoRAError, match="device is gone"):
            run(base, checkpoint_every=2)
    assert record(output)["state"] == "failed" and record(output)["message"] == "the device is gone."
    assert len(run(base, checkpoint_every=2).losses) == 6
    assert len(folders(output)) == 1


def test_checkpoint_that_cannot_be_written_ends_no_training(base, output, monkeypatch):
    from tlora_core import TLoRAError
    from tlora_core.training.run_folder import RunFolder

    def full(*args):
        raise TLoRAError("the disk is full.")

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    assert len(run(base, checkpoint_every=2).losses) == 6


def test_the_file_is_handed_on_where_the_disk_takes_nothing_after_it(base, output, monkeypatch, caplog):
    replace, record_path = os.replace, []

    def full(source, target):
        if record_path and Path(target).parent == record_path[0]:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        Wish(patch, 6, lambda live: record_path.append(folders(output)[-1]))
        done = run(base)
    assert shown() == ("done", "") and len(done.losses) == 6 and (output / "loras" / done.file).exists()
    assert "loss.csv" in caplog.text and "run.json" in caplog.text and not list(output.rglob("*.tmp"))
    record_path.clear()
    again = run(base)
    assert again.losses == done.losses and same(again.tlora, done.tlora) and len(folders(output)) == 2


def test_training_whose_file_cannot_be_saved_is_kept_and_the_next_run_only_writes_the_file(base, output, monkeypatch):
    from tlora_core.errors import TLoRAError
    from tlora_core.files.tlora_file import TLoRAFile
    from tlora_core.hosts.comfy.training.personalize import Personalization

    straight = run(base, request(config={"seed": 1}))
    (output / "loras" / straight.file).unlink()

    def full(*args):
        raise TLoRAError("the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(TLoRAFile, "save", full)
        with pytest.raises(TLoRAError, match="the disk is full. The training is kept in .* press Run again"):
            run(base, request(config={"seed": 1}), checkpoint_every=0)
    folder = folders(output)[-1]
    assert record(output)["state"] == "failed"
    assert len((folder / "loss.csv").read_text().splitlines()) == 7

    trained = []
    monkeypatch.setattr(Personalization, "train", lambda *args: trained.append(args))
    again = run(base, request(config={"seed": 1}), checkpoint_every=0)
    assert not trained and same(again.tlora, straight.tlora) and again.losses == straight.losses
    assert record(output)["state"] == "done" and not (folder / "checkpoint.pt").exists()


def no_file(monkeypatch, *folders):
    """Files are not saved in these folders, but may be in folders below them; the room there was enough before."""
    from tlora_core.errors import TLoRAError
    from tlora_core.files.tlora_file import TLoRAFile

    save = TLoRAFile.save

    def full(file, path, *args):
        if path.parent in folders:
            raise TLoRAError("the disk is full.")
        save(file, path, *args)

    monkeypatch.setattr(TLoRAFile, "save", full)


@pytest.mark.parametrize("rerun, more", [("auto", 0), ("continue", 3), ("restart", 0)])
def test_stopped_training_whose_file_cannot_be_saved_is_taken_up_as_the_error_says(
    base, output, monkeypatch, rerun, more
):
    from tlora_core.errors import TLoRAError
    from tlora_core.hosts.comfy.training.personalize import Personalization

    with monkeypatch.context() as patch:
        no_file(patch, output / "loras" / "run")
        Wish(patch, 3, lambda live: live.request("stop"))
        does = "resumes at step 3" if more else "only writes the file"
        press = '"auto" and press' if rerun == "restart" else "press"
        with pytest.raises(
            TLoRAError, match=f"the disk is full. The training is kept in .*{press} Run again: it {does}.$"
        ):
            run(base, rerun=rerun)
    trained, train = [], Personalization.train
    monkeypatch.setattr(Personalization, "train", lambda *args: (trained.append(args), train(*args))[1])
    again = run(base, rerun="continue" if more else "auto")
    assert len(again.losses) == 3 + more and bool(trained) == bool(more)
    assert again.tlora.training["steps_done"] == 3 + more and (output / "loras" / again.file).exists()
    assert record(output)["state"] == ("done" if more else "stopped") and len(folders(output)) == 1
    assert len(run(base, rerun="continue").losses) == 6, "a stopped one that was saved goes on when asked, as always"


@pytest.mark.parametrize("taken", ["output", "temp", "none"])
@pytest.mark.parametrize("end", ["done", "stop", "cancel", "divergence"])
def test_training_that_no_disk_takes_is_kept_in_the_output_or_temp_folder_and_the_user_is_told(
    base, output, monkeypatch, tmp_path, end, taken
):
    import comfy.model_management
    import folder_paths

    from tlora_core import TLoRAError, TLoRAFile
    from tlora_core.training.run_folder import RunFolder

    def full(*args):
        raise TLoRAError("no checkpoint, the disk is full.")

    temp = tmp_path / "temp"
    monkeypatch.setattr(folder_paths, "temp_directory", str(temp))
    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    no_file(monkeypatch, output / "loras" / "run", *{"output": [], "temp": [output], "none": [output, temp]}[taken])
    wishes = {"stop": lambda live: live.request("stop"), "cancel": cancel}
    if end in wishes:
        Wish(monkeypatch, 3, wishes[end])
    elif end == "divergence":
        no_number_after(monkeypatch, 27)
    with pytest.raises(
        comfy.model_management.InterruptProcessingException if end == "cancel" else TLoRAError
    ) as raised:
        run(base, request(60 if end == "divergence" else 6), rerun="restart", save_on_cancel=True)
    state, message = shown()
    assert state == record(output)["state"] == ("cancelled" if end == "cancel" else "failed")
    assert end == "cancel" or str(raised.value) in message
    kept = [*output.glob("*.safetensors"), *temp.glob("*.safetensors")]
    if taken == "none":
        assert not kept and "and is lost; free some space" in message
        return
    (path,) = kept
    assert path == (output if taken == "output" else temp) / "heart_00001_.safetensors"
    told = f'It is saved as "{path}"; move that file to "{output / "loras"}"'
    assert told + ("." if taken == "output" else " before you close ComfyUI, which empties that folder.") in message
    assert TLoRAFile.load(path).training["steps_done"] == {"done": 6, "divergence": 25}.get(end, 3)


@pytest.mark.parametrize("method", ["tlora", "vanilla_tlora", "oft", "svdiff"])
@pytest.mark.parametrize(
    "config", [{}, {"optimizer": "prodigy", "ema_decay": 0.9}, {"optimizer": "adafactor"}], ids=str
)
def test_sizes_of_file_and_checkpoint_are_known_before_the_first_step(base, output, monkeypatch, method, config):
    from tlora_core.hosts.comfy.training import run as training_run

    asked, told = training_run._needs, []
    monkeypatch.setattr(training_run, "_needs", lambda *args: told.extend(asked(*args)) or told)
    forget = []
    monkeypatch.setattr(
        training_run.RunFolder,
        "forget_checkpoint",
        lambda folder: forget.append((folder.path / "checkpoint.pt").stat().st_size),
    )
    done = run(base, request(3, method=method, config=config), checkpoint_every=2)
    file, checkpoint = told
    size = (output / "loras" / done.file).stat().st_size
    assert size <= file.size <= 1.02 * size + 200_000
    assert forget[0] <= checkpoint.size <= 1.02 * forget[0] + 1_500_000


@pytest.mark.parametrize("place", ["loras", "tlora_runs"])
@pytest.mark.parametrize("lack", ["room", "rights"])
def test_place_that_will_not_take_the_training_is_told_before_its_first_step(base, output, monkeypatch, place, lack):
    from tlora_core.errors import TLoRAError
    from tlora_core.hosts.comfy import room
    from tlora_core.hosts.comfy.training.personalize import Personalization

    make, usage = room.tempfile.NamedTemporaryFile, room.shutil.disk_usage

    def is_there(folder):
        return place in Path(folder).parts

    def refused(dir, **options):
        if is_there(dir):
            raise PermissionError(13, "Permission denied")
        return make(dir=dir, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Personalization, "train", lambda *args: pytest.fail("it trains"))
        if lack == "rights":
            patch.setattr(room.tempfile, "NamedTemporaryFile", refused)
            wanted = f'^The folder "{output}/{place}.* cannot be written to .Permission denied.; make it writable, or '
        else:
            patch.setattr(
                room.shutil, "disk_usage", lambda path: (10**9, 10**9, 65536) if is_there(path) else usage(path)
            )
            # Two disks.
            patch.setattr(
                room, "os", SimpleNamespace(fsync=os.fsync, stat=lambda path: SimpleNamespace(st_dev=is_there(path)))
            )
            wanted = (
                f'^The disk of "{output}/{place}.* has 64 KiB free, but the training needs [0-9.]+ [KM]iB there '
                f"for .*; free some space, or "
            )
        advice = {
            "loras": "choose another folder with file_name.$",
            "tlora_runs": "(set checkpoint_every to 0|start ComfyUI with another --output-directory).$",
        }[place]
        with pytest.raises(TLoRAError, match=wanted + advice):
            run(base, checkpoint_every=2)
    assert not list(output.rglob("run.json")) and not list(output.rglob("*.tmp"))
    assert run(base, checkpoint_every=2).file


@pytest.mark.parametrize("missing", ["clip", "vae"])
def test_checkpoint_file_without_clip_or_vae_is_told_before_any_step(base, output, missing):
    from tlora_core.errors import TLoRAError

    model, clip, vae = base
    # What the host's Load Checkpoint gives for a file without them: None, and a VAE without a network.
    parts = (model, None, vae) if missing == "clip" else (model, clip, SimpleNamespace())
    with pytest.raises(
        TLoRAError, match=f"^{missing} is empty.*connect the {missing} of a Load {missing.upper()} node"
    ):
        run(parts)
    assert not (output / "tlora_runs").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_saved_files_have_the_permissions_that_the_umask_leaves(base, output):
    before = os.umask(0o027)
    try:
        made = run(base)
    finally:
        os.umask(before)
    made_file = output / "loras" / made.file
    assert made_file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in made_file.parent.iterdir()) == [made_file.name]


def test_both_separators_of_a_file_name_make_folders_on_every_system(output):
    from tlora_core.errors import TLoRAError
    from tlora_core.hosts.comfy.files import new_lora_path

    assert new_lora_path("a\\b/dog") == new_lora_path("a/b/dog")
    assert new_lora_path("a\\b\\dog").parent == output / "loras" / "a" / "b"
    for climbing in ("..\\dog", "a\\..\\..\\dog"):
        with pytest.raises(TLoRAError, match="leaves the loras folder"):
            new_lora_path(climbing)


def test_a_link_to_another_disk_is_saved_to_as_the_list_reads_it(output, tmp_path_factory):
    import folder_paths

    from tlora_core.errors import TLoRAError
    from tlora_core.hosts.comfy.files import lora_path, name_of, new_lora_path

    disk, loras = tmp_path_factory.mktemp("disk"), output / "loras"
    (loras / "tlora").symlink_to(disk, target_is_directory=True)
    (loras / "own").mkdir()
    (loras / "own" / "deep").symlink_to(disk, target_is_directory=True)
    for name, place in (("tlora/dog", disk), ("tlora/a/dog", disk / "a"), ("own/deep/cat", disk)):
        path = new_lora_path(name)
        path.write_bytes(b"x")
        assert (place / path.name).read_bytes() == b"x"
        listed = folder_paths.recursive_search(str(loras))[0]
        assert name_of(path) in listed and lora_path(name_of(path)) == path
        assert new_lora_path(name).name.endswith("_00002_.safetensors")
    # ".." is of the name, not of the disk behind the link.
    assert new_lora_path("tlora/../dog").parent == loras
    for climbing in ("tlora/../../dog", "../dog", str(disk / "dog"), "own/../../dog"):
        with pytest.raises(TLoRAError, match="leaves the loras folder"):
            new_lora_path(climbing)
    (loras / "gone").symlink_to(disk / "unplugged")
    with pytest.raises(
        TLoRAError, match='"gone/dog", but ".*gone" is a link to ".*unplugged", which does not exist; connect that disk'
    ):
        new_lora_path("gone/dog")
    assert not (disk / "unplugged").exists() and not (disk.parent / "dog_00001_.safetensors").exists()


def test_dates_in_a_file_name_are_filled_in_folder_by_folder(output):
    from tlora_core.hosts.comfy.files import new_lora_path

    path = new_lora_path("%year%/x%year%/dog")
    year = path.parent.parent.name
    assert year.isdecimal() and path.relative_to(output / "loras").parts == (year, f"x{year}", "dog_00001_.safetensors")


@pytest.mark.parametrize("end", ["stop", "cancel"])
def test_stop_and_cancel_keep_the_file_where_the_disk_takes_no_checkpoint(base, output, monkeypatch, end):
    import comfy.model_management

    from tlora_core import TLoRAError, TLoRAFile
    from tlora_core.training.run_folder import RunFolder

    def full(*args):
        raise TLoRAError("the disk is full.")

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    Wish(monkeypatch, 3, cancel if end == "cancel" else lambda live: live.request("stop"))
    if end == "stop":
        assert run(base, rerun="restart").tlora.training["steps_done"] == 3
    else:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(base, rerun="restart", save_on_cancel=True)
    (saved,) = [p for p in (output / "loras" / "run").iterdir() if "heart" in p.name]
    assert TLoRAFile.load(saved).training["steps_done"] == 3
    assert shown()[0] == record(output)["state"] == {"stop": "stopped", "cancel": "cancelled"}[end]
    assert shown()[1].endswith("The run state of step 3 was not saved: the disk is full.")


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
    assert Image.open(pictures[0]).size == (128, 78) and pictures[0].read_bytes() != pictures[1].read_bytes()
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(plain.losses, rel=1e-6)
    assert [e.step for e in events.Images("validation")] == [4, 6]
    with open(folder / "loss.csv") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == plain.losses
    from tlora_core import TLoRAFile

    (checkpoint,) = (output / "loras" / "run").glob("heart_step000003*")
    assert TLoRAFile.load(checkpoint).training["steps_done"] == 3


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
        lambda self, prompts, seed=0: torch.stack(
            [torch.full((64, 64, 3), 0.0 if number else self.trainer.step / 10) for number in range(len(prompts))]
        ),
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


def test_checkpoint_now_makes_a_file_and_the_training_goes_on(base, output, monkeypatch):
    Wish(monkeypatch, 2, lambda live: live.request("checkpoint"))
    assert len(run(base, checkpoint_every=0).losses) == 6
    assert len(list((output / "loras" / "run").glob("heart_step000002*"))) == 1


def test_loss_that_runs_away_keeps_the_last_good_state(base, output, monkeypatch):
    from tlora_core import TLoRAError, TLoRAFile

    no_number_after(monkeypatch, 27)
    with pytest.raises(TLoRAError, match="lower learning_rate.*saved as run/heart") as raised:
        run(base, request(60))
    assert str(raised.value).count("\n") == 0 and record(output)["state"] == "failed"
    (path,) = (output / "loras" / "run").iterdir()
    assert TLoRAFile.load(path).training["steps_done"] == 25


@pytest.mark.parametrize(
    "steps, rate, message",
    [
        (
            None,
            1e30,
            "Training stopped at step 2 because the loss became NaN or infinite; lower learning_rate. Nothing was "
            "saved",
        ),
        (
            0,
            0.01,
            "Training stopped at step 1 because the loss was NaN or infinite; training had not changed anything yet, "
            "so load model in bfloat16 or ",
        ),
    ],
)
def test_loss_of_nan_before_any_good_state_saves_nothing_and_says_so(base, output, monkeypatch, steps, rate, message):
    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.page.training import LiveRun

    if steps is not None:
        no_number_after(monkeypatch, steps)
    with pytest.raises(TLoRAError, match=message) as raised:
        run(base, request(60, rate=rate))
    assert str(raised.value).count("\n") == 0 and str(raised.value).endswith(
        "Nothing was saved: no good state had been recorded yet."
    )
    assert record(output)["state"] == LiveRun.states()[-1]["state"] == "failed" and record(output)["message"] == str(
        raised.value
    )
    assert not record(output)["files"] and not list((output / "loras").rglob("*.safetensors"))


def test_patch_that_cannot_be_trained_through_is_named_and_not_taken_for_another_models(base, output):
    """As of IP-Adapter, whose tensors were made by its node."""
    from tlora_core import TLoRAError

    patched = base[0].clone()
    with torch.inference_mode():
        scale = torch.full((1,), 1.1)
    patched.set_model_attn2_output_patch(lambda output, options: output * scale)
    with pytest.raises(
        TLoRAError,
        match="patch that cannot be trained through: .* of .*test_training_run, .* connect the model from before",
    ):
        run((patched, *base[1:]))
    assert run(base).file


@pytest.mark.parametrize("broken", ["vae", "clip"])
def test_what_vae_or_clip_cannot_compute_is_told_of_them_before_any_step(base, output, monkeypatch, broken):
    from tlora_core import TLoRAError

    _, clip, vae = base
    encode, encode_text = vae.first_stage_model.encode, clip.cond_stage_model.encode_token_weights
    if broken == "vae":
        monkeypatch.setattr(vae.first_stage_model, "encode", lambda pixels: encode(pixels) * float("nan"))
        message = (
            "vae encodes a picture into NaN or infinite values; start ComfyUI with --fp32-vae, or connect another VAE."
        )
    else:
        monkeypatch.setattr(
            clip.cond_stage_model,
            "encode_token_weights",
            lambda tokens: [x * float("inf") for x in encode_text(tokens)],
        )
        message = (
            'clip encodes "a photo of sks heart" into NaN or infinite values; start ComfyUI with '
            "--fp32-text-enc, or connect another CLIP."
        )
    with pytest.raises(TLoRAError) as raised:
        run(base)
    assert str(raised.value) == message and not list(output.rglob("run.json"))


KILLED = """
import sys
sys.argv[1:] = ["--cpu", "--base-directory", sys.argv[1]]
import comfy.options
comfy.options.enable_args_parsing()
import folder_paths
import utils.extra_config  # as main.py does, before what old ComfyUIs put on the path hides it
import torch
torch.set_num_threads(1)
from tlora_core.hosts.comfy.training import run as training_run
from tlora_core.hosts.comfy.training.personalize import TrainRequest
from tlora_core.training.config import TrainConfig
from tlora_core.training.dataset import training_images
from tlora_core.tiny import comfy as tiny_base, world
from pathlib import Path
pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(5))
config = TrainConfig(steps=12, learning_rate=0.01)
asked = TrainRequest("sks", "heart", rank=4, min_rank=2, resolution=64, config=config)
with torch.inference_mode():
    base = tiny_base.load(str(Path(world.__file__).parent / "weights" / "tiny_base.safetensors"))
    report = training_run.LiveRun.report
    training_run.LiveRun.report = lambda live, step, loss: (report(live, step, loss), print("step", step, flush=True))
    keeping = training_run.Keeping(checkpoint_every=2)
    done = training_run.train_or_find(*base, training_images(pixels), asked, keeping, "heart")
print("done", done.losses, flush=True)
"""


def test_kill_at_any_moment_loses_at_most_the_steps_since_the_checkpoint(host, tmp_path):
    # The core alone: beside it lies `nodes/`, which would hide the host's module of that name.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tlora_core").symlink_to(REPO / "tlora_core")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(host.comfyui), str(tmp_path / "site")]),
    }

    def start(folder):
        (folder / "models" / "loras").mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], env=environment, cwd=folder, stdout=subprocess.PIPE, text=True
        )

    def lines(process):
        return [line.strip() for line in process.stdout]

    process = start(tmp_path / "killed")
    for line in process.stdout:
        if line.strip() == "step 7":
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    second = lines(start(tmp_path / "killed"))
    whole = lines(start(tmp_path / "whole"))
    steps = [line for line in second if line.startswith("step")]
    assert steps[:7] == [f"step {i}" for i in range(1, 8)], "the curve so far is shown again, then step 7 is made anew"
    assert [line for line in second if line.startswith("done")] == [line for line in whole if line.startswith("done")]
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_record_says_what_was_trained_with(base, output):
    run(base)
    told = record(output)
    assert (
        told["settings"]["config"]["learning_rate"] == 0.01
        and told["settings"]["rank"] == 4
        and told["versions"]["torch"]
    )
    assert told["step"] == told["steps"] == 6 and str(output) not in json.dumps(told)


@pytest.mark.parametrize(
    "kind, folder, name",
    [
        (PureWindowsPath, r"C:\ComfyUI\models\loras", r"tlora\sks dog_00001_.safetensors"),
        (PurePosixPath, "/ComfyUI/models/loras", "tlora/sks dog_00001_.safetensors"),
    ],
)
def test_a_files_name_is_written_as_the_hosts_list_has_it(comfy, monkeypatch, kind, folder, name):
    import folder_paths

    from tlora_core.hosts.comfy.files import name_of

    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [folder])
    assert name_of(kind(folder, name)) == name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"validate_every": -1}, "validate_every"),
        ({"checkpoint_every": -5}, "checkpoint_every"),
        ({"rerun": "x"}, "rerun"),
        ({"validate_every": 5}, "validation_prompts is empty"),
    ],
)
def test_keeping_that_cannot_be_is_refused(comfy, changes, message):
    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.training.run import Keeping

    with pytest.raises(TLoRAError, match=message):
        Keeping(**changes)


def test_missing_packages_are_named_before_anything_is_trained(comfy, monkeypatch):
    from tlora_core import TLoRAError, make_adapters
    from tlora_core.hosts.comfy.training.run import Keeping
    from tlora_core.training.config import TrainConfig
    from tlora_core.training.trainer import Trainer

    for package in ("wandb", "prodigyopt", "diffusers.optimization"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TLoRAError, match="input wandb needs the Python package wandb .* pip install wandb.$"):
        Keeping(wandb=True)
    with pytest.raises(TLoRAError, match="optimizer prodigy needs the Python package prodigyopt"):
        Trainer(make_adapters("lora", "last_random", {"x": (4, 4)}, 2, 0), TrainConfig(optimizer="prodigy"))
    with pytest.raises(
        TLoRAError,
        match='lr_schedule cosine needs the Python package diffusers .* pip install "diffusers>=[0-9.]+,<[0-9.]+".$',
    ):
        Trainer(make_adapters("lora", "last_random", {"x": (4, 4)}, 2, 0), TrainConfig(lr_schedule="cosine"))


def test_weights_and_biases_gets_the_loss_and_the_drawings_when_asked(base, output, monkeypatch):
    """Offline, by the real package where it is installed."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(base, request(4), wandb=True, validation_prompts=PROMPTS[:1], validate_every=2)
    assert wandb.run is None and list(folders(output)[-1].rglob("*.wandb"))
