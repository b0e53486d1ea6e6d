"""What a batch's child processes do with ComfyUI: trainings in this process, a workflow on the real server, and the
process with a server of its own."""

import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from batchlib import train_child, workflow_child
from batchlib.local import Local
from batchlib.worker import Lost
from hostlib import commands

INPUTS = {"class_word": "heart", "method": "tlora", "rank": "4", "min_rank": "2", "steps": "8", "learning_rate": "0.01"}


class Told:
    """The child's side of child.Talk, without a worker."""

    def __init__(self):
        self.events, self.cancelled = [], threading.Event()

    def tell(self, event, **what):
        self.events.append((event, what))


def write_picture(path, seed=5):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def named(path):
    """What a batch names a run's file after its name."""
    return f"{path}_00001_.safetensors"


# --- trainings ---


@pytest.fixture
def trainer(comfy, output, tmp_path):
    return train_child.Runner(Told(), tmp_path / "results", verbose=False)


def asked(path, name="row", parts=None, **inputs):
    files = {"image": [str(write_picture(path))]}
    return {"parts": parts or {"model": "tiny"}, "files": files, "inputs": {**INPUTS, **inputs}, "name": name}


def test_a_row_is_what_train_makes_and_the_next_finds_the_model_loaded(trainer, tmp_path, monkeypatch):
    import tlora_core
    from tlora_core.hosts.comfy.training import headless

    calls, load = [], headless.load_checkpoint
    monkeypatch.setattr(headless, "load_checkpoint", lambda name: calls.append(name) or load(name))
    first = trainer.run(asked(tmp_path / "heart.png", "a"))
    second = trainer.run(asked(tmp_path / "heart.png", "b", seed="1", steps="3"))
    third = trainer.run(asked(tmp_path / "heart.png", "c", rerun="restart"))
    assert [end["state"] for end in (first, second, third)] == ["done"] * 3 and calls == ["tiny"]
    plain = {**INPUTS, "file_name": "alone", "rerun": "restart"}
    alone = tlora_core.train("tiny", str(tmp_path / "heart.png"), save_on_cancel=True, **plain)
    results = {path.name: digest(path) for path in trainer.results.glob("*.safetensors")}
    assert results[named("a")] == results[named("c")] == digest(alone.path) != results[named("b")]
    assert first["seconds"] > 0 and first["first_step"] == 0 and 0 < first["loss"] < 10
    assert (first["peak_ram_gib"] or not sys.platform.startswith("linux")) and first["peak_vram_gib"] is None
    steps = [what["step"] for event, what in trainer.talk.events if event == "progress"]
    assert steps and steps[0] == 0


def test_a_cancelled_row_keeps_its_state_and_goes_on(trainer, tmp_path):
    import training_runs

    mine = asked(tmp_path / "heart.png", checkpoint_every="0")
    with pytest.MonkeyPatch.context() as patch:
        training_runs.Wish(patch, 3, lambda live: trainer.talk.on_cancel())
        end = trainer.run(mine)
    assert end["state"] == "cancelled" and list((tmp_path / "tlora_runs").glob("*/checkpoint.pt"))
    end = trainer.run(mine)
    assert end["state"] == "done" and end["first_step"] >= 3
    trainer.talk.cancelled.set()
    assert trainer.run(asked(tmp_path / "heart.png", steps="4"))["state"] == "cancelled"


@pytest.mark.parametrize(
    "inputs, parts, said",
    [
        ({"rnak": 4}, {"model": "tiny"}, 'There is no input "rnak"'),
        ({"rank": "four"}, {"model": "tiny"}, "rank is 'four'; give a whole number."),
        ({}, {"model": "gone.safetensors"}, 'model is "gone.safetensors"'),
        ({}, {"unet": "u.safetensors", "clip": ["c.sft"], "clip_type": "flux"}, 'unet is "u.safetensors"'),
    ],
)
def test_the_first_wrong_row_is_named_before_anything_is_loaded(comfy, inputs, parts, said):
    right = {"row": 1, "inputs": dict(INPUTS), "parts": {"model": "tiny"}}
    found = train_child.check([right, {"row": 2, "inputs": {**INPUTS, **inputs}, "parts": parts}])
    assert found["row"] == 2 and said in found["error"] and train_child.check([right]) == {}


# --- a workflow ---


MINI = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "none.png"}, "_meta": {"title": "Picture"}},
    "2": {
        "class_type": "ImageScale",
        "inputs": {"image": ["1", 0], "upscale_method": "bilinear", "width": 8, "height": 8, "crop": "disabled"},
    },
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "row"}},
}


def row(number, files=None, **sets):
    sets = {name.replace("__", "."): value for name, value in sets.items()}
    return {"row": number, "sets": sets, "files": files or {}}


def test_a_workflow_runs_with_a_rows_inputs_and_its_picture(server, tmp_path):
    from PIL import Image

    runner = workflow_child.Runner(server, MINI, Told(), tmp_path / "results")
    path = write_picture(tmp_path / "mine.png")
    mine = row(1, {"Picture.image": [str(path)]}, Picture__image="mine.png", ImageScale__width="32")
    assert runner.check([mine]) == {"uploads": ["Picture.image"]}
    end = runner.run(mine)
    assert (end["state"], end["error"]) == ("done", "") and end["seconds"] > 0
    [made] = (tmp_path / "results").iterdir()
    assert Image.open(made).size == (32, 8)
    given = list((server.workspace / "input" / workflow_child.UPLOADS).iterdir())
    assert [digest(each) for each in given] == [digest(path)]
    wrong = row(2, Picture__image="gone.png")
    assert runner.check([mine, wrong])["row"] == 2 and runner.check([mine, wrong])["column"] == "Picture.image"
    assert "give a whole number" in runner.check([row(3, ImageScale__width="wide")])["error"]


def test_a_failing_row_says_what_the_node_said(server, tmp_path):
    runner = workflow_child.Runner(server, MINI, Told(), tmp_path / "results")
    (tmp_path / "text.png").write_text("no picture")
    end = runner.run(row(1, {"1.image": [str(tmp_path / "text.png")]}, **{"1__image": "text.png"}))
    assert end["state"] == "failed" and end["error"].startswith("Picture (LoadImage), node 1: ")
    assert not (tmp_path / "results").exists()


# --- the process ---


def servers_of(child):
    """The processes that the child has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == child and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks processes up in /proc")
def test_the_childs_server_writes_into_its_own_folder_and_ends_with_the_child(host, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "workspace_of", lambda host: tmp_path / "workspace")
    engine = Local({"comfyui": str(host.comfyui), "python": sys.executable, "workflow": MINI, "verbose": False})
    files = {"1.image": [("p.png", write_picture(tmp_path / "p.png").read_bytes())]}
    mine = {**row(1, files, **{"1__image": "p.png"}), "name": "row"}
    try:
        assert engine.check([row(1, {"1.image": 1}, **{"1__image": "p.png"})])["uploads"] == ["1.image"]
        events = list(engine.worker.run(mine))
        assert [event["event"] for event in events][-2:] == ["file", "end"] and events[-1]["state"] == "done"
        assert not list((tmp_path / "workspace" / "output").iterdir())
        child = engine.worker._process.pid
        [server] = servers_of(child)
        os.kill(child, signal.SIGKILL)
        with pytest.raises(Lost, match="status -9"):
            list(engine.worker._events(engine.worker._process))
        deadline = time.monotonic() + 60
        while Path(f"/proc/{server}/stat").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        engine.close()
