"""The folder of a run, and its record for TensorBoard."""

import pytest
from PIL import Image


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


def test_record_continues_where_the_run_was_resumed(tmp_path):
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
