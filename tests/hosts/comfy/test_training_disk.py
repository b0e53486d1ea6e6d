"""A training run whose disk is full, lacks room or is read-only: what is kept, and what the user is told."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_runs import Wish, cancel, folders, nan_after, record, request, run, same, shown


def test_cancel_and_divergence_end_the_run_even_on_a_full_disk(base, output, monkeypatch):
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
    nan_after(monkeypatch, 27)
    with pytest.raises(TLoRAError, match="lower learning_rate.*the disk is full"):
        run(base, request(60))
    assert (record(output)["state"], LiveRun.states()[-1]["state"]) == ("failed", "failed")


def test_run_state_that_cannot_be_written_ends_no_training(base, output, monkeypatch):
    from tlora_core import TLoRAError
    from tlora_core.training.run_folder import RunFolder

    def full(*args):
        raise TLoRAError("the disk is full.")

    monkeypatch.setattr(RunFolder, "save_state", full)
    assert len(run(base, checkpoint_every=2).losses) == 6


def test_the_file_is_returned_even_if_the_disk_is_full_after_it(base, output, monkeypatch, caplog):
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
def test_stopped_training_whose_file_cannot_be_saved_resumes_as_the_error_says(base, output, monkeypatch, rerun, more):
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
def test_training_that_no_disk_can_store_is_kept_in_the_output_or_temp_folder_and_the_user_is_told(
    base, output, monkeypatch, tmp_path, end, taken
):
    import comfy.model_management
    import folder_paths

    from tlora_core import TLoRAError, TLoRAFile
    from tlora_core.training.run_folder import RunFolder

    def full(*args):
        raise TLoRAError("no run state, the disk is full.")

    temp = tmp_path / "temp"
    monkeypatch.setattr(folder_paths, "temp_directory", str(temp))
    monkeypatch.setattr(RunFolder, "save_state", full)
    no_file(monkeypatch, output / "loras" / "run", *{"output": [], "temp": [output], "none": [output, temp]}[taken])
    wishes = {"stop": lambda live: live.request("stop"), "cancel": cancel}
    if end in wishes:
        Wish(monkeypatch, 3, wishes[end])
    elif end == "divergence":
        nan_after(monkeypatch, 27)
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
def test_sizes_of_file_and_run_state_are_known_before_the_first_step(base, output, monkeypatch, method, config):
    from tlora_core.hosts.comfy.training import found

    asked, told = found._needs, []
    monkeypatch.setattr(found, "_needs", lambda *args: told.extend(asked(*args)) or told)
    forget = []
    monkeypatch.setattr(
        found.RunFolder,
        "remove_state",
        lambda folder: forget.append((folder.path / "checkpoint.pt").stat().st_size),
    )
    done = run(base, request(3, method=method, config=config), checkpoint_every=2)
    file, state = told
    size = (output / "loras" / done.file).stat().st_size
    assert size <= file.size <= 1.02 * size + 200_000
    assert forget[0] <= state.size <= 1.02 * forget[0] + 1_500_000


@pytest.mark.parametrize("place", ["loras", "tlora_runs"])
@pytest.mark.parametrize("lack", ["room", "rights"])
def test_folder_that_cannot_store_the_training_is_reported_before_its_first_step(
    base, output, monkeypatch, place, lack
):
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


@pytest.mark.parametrize("end", ["stop", "cancel"])
def test_stop_and_cancel_save_the_file_even_if_the_run_state_does_not_fit(base, output, monkeypatch, end):
    import comfy.model_management

    from tlora_core import TLoRAError, TLoRAFile
    from tlora_core.training.run_folder import RunFolder

    def full(*args):
        raise TLoRAError("the disk is full.")

    monkeypatch.setattr(RunFolder, "save_state", full)
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
