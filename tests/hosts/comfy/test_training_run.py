"""A training run on the tiny base as the Train node makes it: stop, cancel, crash, divergence, resume."""

import json
import os
import signal
import subprocess
import sys

import pytest
from places import REPO
from training_runs import Wish, cancel, folders, nan_after, record, request, run, same, shown


def test_a_run_is_named_like_its_file_without_the_number_that_was_added(comfy):
    from tlora_core.hosts.comfy.training.found import _without_counter

    assert [_without_counter(name) for name in ("dog_v1.5_00001_", "sks_dog2_00012_", "dog_123456_", "v2_0")] == [
        "dog_v1.5",
        "sks_dog2",
        "dog",
        "v2_0",
    ]


def test_stop_keeps_the_training_and_continue_resumes_it(base, output, monkeypatch):
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
def test_cancel_leaves_the_last_run_state_or_saves_when_asked(base, output, monkeypatch, save):
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


def test_error_leaves_a_run_that_can_be_resumed(base, output, monkeypatch):
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


def test_checkpoint_now_saves_a_file_and_training_continues(base, output, monkeypatch):
    Wish(monkeypatch, 2, lambda live: live.request("checkpoint"))
    assert len(run(base, checkpoint_every=0).losses) == 6
    assert len(list((output / "loras" / "run").glob("heart_step000002*"))) == 1


def test_loss_that_diverges_keeps_the_last_good_state(base, output, monkeypatch):
    from tlora_core import TLoRAError, TLoRAFile

    nan_after(monkeypatch, 27)
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
        nan_after(monkeypatch, steps)
    with pytest.raises(TLoRAError, match=message) as raised:
        run(base, request(60, rate=rate))
    assert str(raised.value).count("\n") == 0 and str(raised.value).endswith(
        "Nothing was saved: no good state had been recorded yet."
    )
    assert record(output)["state"] == LiveRun.states()[-1]["state"] == "failed" and record(output)["message"] == str(
        raised.value
    )
    assert not record(output)["files"] and not list((output / "loras").rglob("*.safetensors"))


KILLED = """
import sys
sys.argv[1:] = ["--cpu", "--base-directory", sys.argv[1]]
import comfy.options
comfy.options.enable_args_parsing()
import folder_paths
import utils.extra_config  # as main.py does, before what old ComfyUIs put on the path hides it
import torch
torch.set_num_threads(1)
from tlora_core.hosts.comfy.page.training import LiveRun
from tlora_core.hosts.comfy.training.found import train_or_find
from tlora_core.hosts.comfy.training.keeping import Keeping
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
    report = LiveRun.report
    LiveRun.report = lambda live, step, loss: (report(live, step, loss), print("step", step, flush=True))
    keeping = Keeping(checkpoint_every=2)
    done = train_or_find(*base, training_images(pixels), asked, keeping, "heart")
print("done", done.losses, flush=True)
"""


def test_kill_at_any_moment_loses_at_most_the_steps_since_the_run_state(host, tmp_path):
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


def test_record_states_the_settings_of_the_training(base, output):
    run(base)
    told = record(output)
    assert (
        told["settings"]["config"]["learning_rate"] == 0.01
        and told["settings"]["rank"] == 4
        and told["versions"]["torch"]
    )
    assert told["step"] == told["steps"] == 6 and str(output) not in json.dumps(told)
