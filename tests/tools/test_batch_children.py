"""What a batch's child processes do with ComfyUI: trainings in this process, a workflow on the real server, and the
process with a server of its own."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from batchlib import train_child, workflow_child
from batchlib.local import Local
from batchlib.worker import Lost, Worker, _packed
from hostlib import commands
from hostlib.errors import HostError
from places import REPO

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
    second = trainer.run(asked(tmp_path / "heart.png", "b", seed="1", steps="3", file_name="own"))
    third = trainer.run(asked(tmp_path / "heart.png", "c", rerun="restart"))
    assert [end["state"] for end in (first, second, third)] == ["done"] * 3 and calls == ["tiny"]
    plain = {**INPUTS, "file_name": "alone", "rerun": "restart"}
    alone = tlora_core.train("tiny", str(tmp_path / "heart.png"), save_on_cancel=True, **plain)
    results = {path.name: digest(path) for path in trainer.results.glob("*.safetensors")}
    assert results[named("a")] == results[named("c")] == digest(alone.path) != results[named("own")]
    assert first["seconds"] > 0 and first["first_step"] == 0 and 0 < first["loss"] < 10
    assert (first["peak_ram_gib"] or not sys.platform.startswith("linux")) and first["peak_vram_gib"] is None
    steps = [what["step"] for event, what in trainer.talk.events if event == "progress"]
    assert steps and steps[0] == 0


def test_another_model_takes_the_place_of_the_loaded_one(trainer, monkeypatch):
    from tlora_core.hosts.comfy.training import headless

    calls = []
    monkeypatch.setattr(headless, "loaded", lambda **parts: calls.append(parts["model"]) or (parts["model"],) * 3)
    asked_for = [{"model": name} for name in ("a", "a", "b", "a")]
    assert [trainer._parts(parts)["model"] for parts in asked_for] == ["a", "a", "b", "a"] and calls == ["a", "b", "a"]


def test_a_rows_end_tells_what_the_report_needs_and_its_own_peak_of_memory(trainer, monkeypatch):
    told = {name: name for name in ("state", "error", "message", "loss", "scores", "kept_step")}
    forgotten = []
    monkeypatch.setattr(train_child.training, "outcome", lambda job, watch, load: {**told, "file": "left out"})
    monkeypatch.setattr(train_child.memory, "forget_peak", forgotten.append)
    end = trainer.run({"name": "a", "inputs": {}})
    assert end.items() >= told.items() and "file" not in end and forgotten == [os.getpid()]


def test_workers_beside_each_other_write_and_find_trainings_in_folders_of_their_own(output, tmp_path):
    import folder_paths

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train_child._use_private_folders(tmp_path / name)
        assert folder_paths.get_output_directory() == str(tmp_path / name / "output")
        assert folder_paths.get_folder_paths("loras")[0] == str(tmp_path / name / "loras")


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
    assert runner.talk.on_cancel == server.client.interrupt
    [made] = (tmp_path / "results").iterdir()
    assert Image.open(made).size == (32, 8)
    given = list((server.workspace / "input" / workflow_child.UPLOADS).iterdir())
    assert [digest(each) for each in given] == [digest(path)] and given[0].suffix == ".png"
    wrong = row(2, Picture__image="gone.png")
    assert runner.check([mine, wrong])["row"] == 2 and runner.check([mine, wrong])["column"] == "Picture.image"
    assert "give a whole number" in runner.check([row(3, ImageScale__width="wide")])["error"]


def test_a_failing_row_says_what_the_node_said(server, tmp_path, monkeypatch):
    runner = workflow_child.Runner(server, MINI, Told(), tmp_path / "results")
    (tmp_path / "text.png").write_text("no picture")
    end = runner.run(row(1, {"1.image": [str(tmp_path / "text.png")]}, **{"1__image": "text.png"}))
    assert end["state"] == "failed" and end["error"].startswith("Picture (LoadImage), node 1: ")
    assert not (tmp_path / "results").exists()

    def fail(*_, **__):
        raise HostError("It has\n  two lines.")

    with monkeypatch.context() as patch:
        patch.setattr(server, "run", fail)
        patch.setattr(workflow_child, "_sampled", lambda server: contextlib.nullcontext([1.0, 3.0, 2.0]))
        end = runner.run(row(1))
    assert (end["error"], end["peak_vram_gib"]) == ("It has two lines.", 3.0)
    runner.talk.cancelled.set()
    end = runner.run(row(1))
    assert (end["state"], end["error"]) == ("cancelled", "Cancelled before it began.")


def test_all_that_a_workflow_makes_is_kept(tmp_path):
    class Made(SimpleNamespace):
        def __init__(self, name):
            path = tmp_path / name
            path.write_text(name)
            super().__init__(filename=name, path=path)

    files = {"images": [Made("a.png")], "other": [Made("b.flac")], "tlora_files": [Made("c.safetensors").path]}
    runner = workflow_child.Runner(None, MINI, Told(), tmp_path / "results")
    runner._keep(SimpleNamespace(**files, texts=["one", "two"]))
    kept = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    named = {name: name for name in ("a.png", "b.flac", "c.safetensors")}
    assert kept == named | {"text.txt": "one\ntwo"}


def test_how_far_a_node_is_is_told():
    told = Told()
    workflow_child._Told(told).step("3", "Sampler", 4, 20)
    assert told.events == [("progress", {"step": 4, "steps": 20, "title": "Sampler"})]


def test_the_memory_in_use_on_cards_is_sampled(monkeypatch):
    monkeypatch.setattr(workflow_child, "SAMPLE_SECONDS", 0.01)
    devices = [
        {"type": "cuda", "vram_total": 80 * 2**30, "vram_free": 50 * 2**30},
        {"type": "cpu", "vram_total": 64 * 2**30, "vram_free": 1 * 2**30},
    ]
    enough = threading.Event()
    answers = iter([OSError(), {"devices": devices}])

    def get_json(path):
        answer = next(answers, None)
        if answer is None:
            enough.set()
            answer = {"devices": []}
        if isinstance(answer, OSError):
            raise answer
        return answer

    with workflow_child._sampled(SimpleNamespace(client=SimpleNamespace(get_json=get_json))) as samples:
        assert enough.wait(60)
    assert samples == [30.0]


# --- the process ---


def test_a_state_is_passed_on_when_it_is_new_and_without_what_begins_anew(tmp_path, monkeypatch):
    worker, run = Worker({}), tmp_path / "output" / "tlora_runs" / "run"
    run.mkdir(parents=True)
    for name in ("checkpoint.pt", "losses.csv", ".lock", "events.out.tfevents.1"):
        (run / name).write_text(name)
    before = _packed(run)
    assert zipfile.ZipFile(io.BytesIO(before)).namelist() == ["run/checkpoint.pt", "run/losses.csv"]

    def events(process):
        yield {"event": "progress"}
        (run / "checkpoint.pt").write_text("further")
        os.utime(run / "checkpoint.pt", ns=(2 * 10**18,) * 2)
        yield {"event": "progress"}
        yield {"event": "end", "error": f"{worker._laid('p.png', b'1')} is no picture."}

    worker._private = tmp_path
    for name, stand_in in {"_child": lambda: None, "_send": lambda *_: None, "_events": events}.items():
        monkeypatch.setattr(worker, name, stand_in)
    told = list(worker.run({"files": {}}, before))
    assert [event["event"] for event in told] == ["progress", "state", "progress", "end"]
    assert zipfile.ZipFile(io.BytesIO(told[1]["data"])).read("run/checkpoint.pt") == b"further"
    assert told[-1]["error"] == "p.png is no picture.", "by the name that the user gave it"


def test_of_a_child_that_ends_by_itself_the_end_of_the_log_is_told(tmp_path):
    worker = Worker({})
    worker._private = tmp_path
    (tmp_path / "log").write_text("".join(f"line {number}\n" for number in range(40)))
    with pytest.raises(Lost, match=r"status 3; the end of its log:\n(line \d+\n)+line 39$") as lost:
        list(worker._events(SimpleNamespace(stdout=[], wait=lambda: None, returncode=3)))
    assert "line 20\n" not in str(lost.value)


CHILD = """
import os
from pathlib import Path
from batchlib.child import Talk

talk = Talk()
talk.on_cancel = lambda: talk.tell("cancelled", noted=talk.cancelled.is_set())
talk.on_end = Path("ended").touch
print("a library")
os.write(1, b"another")
for command in talk.commands():
    talk.tell("told", command=command)
"""


def test_a_childs_events_stand_alone_and_with_its_worker_it_ends_and_leaves_nothing(tmp_path):
    (tmp_path / "private").mkdir()
    options = {"env": {**os.environ, "PYTHONPATH": str(REPO / "tools")}, "cwd": tmp_path, "text": True}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", CHILD], **pipes, **options)
    for line in ({"private": "private"}, {"do": "check"}):
        process.stdin.write(json.dumps(line) + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"event": "told", "command": {"do": "check"}}
    rest, printed = process.communicate(json.dumps({"do": "cancel"}) + "\n", timeout=60)
    assert json.loads(rest or "{}") == {"event": "cancelled", "noted": True} and process.returncode == 0
    assert {"a library", "another"} <= set(printed.split("\n"))
    assert (tmp_path / "ended").exists() and not (tmp_path / "private").exists()


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
        private = engine.worker._private
        engine.close()
    assert not private.exists()
