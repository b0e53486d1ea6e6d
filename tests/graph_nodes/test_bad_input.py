"""What the nodes do when something is wrong: a sentence, and nothing is harmed."""

import json
import os
import pickle
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import Graph, TinyGraph, bake, bare_and_adapted, cached_nodes, error_of, files_below, pixels, same_tensors
from safetensors import safe_open
from safetensors.torch import save_file


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and not re.search(r"[.!?] +[A-Z]", text)


# --- cancel ---


class CancelAt:
    """Presses cancel when a training reports this step, and notes the last step reported."""

    def __init__(self, server, step: int):
        self.server, self.step_to_cancel, self.last_step, self.cancelled = server, step, 0, 0.0

    def step(self, _node, _title, value, _total):
        self.last_step = value
        if value >= self.step_to_cancel and not self.cancelled:
            self.server.client.interrupt()
            self.cancelled = time.monotonic()

    def node_started(self, *_): ...

    def finish(self): ...


def test_cancelled_training_stops_within_steps_and_leaves_no_trace(server, loras, trained, good):
    graph, before = TinyGraph(), files_below(loras)
    graph.picture(graph.train(steps=200, file_name="tests/cancelled")[1])
    cancel = CancelAt(server, step=4)
    result = server.run(graph, check=False, listener=cancel)
    assert result.errors == ["The run was cancelled."]
    assert 4 <= cancel.last_step < 20 and time.monotonic() - cancel.cancelled < 10
    assert files_below(loras) == before
    graph = TinyGraph()
    bare = graph.picture(graph.model)
    result = server.run(graph)
    assert graph.base.id in cached_nodes(server, result), "the model that was trained on should still be in memory"
    assert np.array_equal(pixels(result, bare), good[0])
    assert np.array_equal(bare_and_adapted(server, trained[0])[1], good[1])


# --- bad input ---


def bad_training(**changes):
    """A case: a training with these inputs changed; a callable is given the graph."""

    def build():
        graph = TinyGraph()
        graph.train(**{name: value(graph) if callable(value) else value for name, value in changes.items()})
        return graph

    return build


def image_with_alpha(graph):
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=255)
    alpha = graph.add("SolidMask", value=0.5, width=64, height=64)
    return graph.add("JoinImageWithAlpha", image=image[0], alpha=alpha[0])[0]


def empty_image(width, height):
    return lambda graph: graph.add("EmptyImage", width=width, height=height, batch_size=1, color=255)[0]


def clip_that_changes_over_a_sampling(graph):
    hook = graph.add("CreateHookLora", lora_name="tests/good.safetensors", strength_model=1.0, strength_clip=1.0)[0]
    off = graph.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)[0]
    on = graph.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=off)[0]
    hooks = graph.add("SetHookKeyframes", hooks=hook, hook_kf=on)[0]
    return graph.add("SetClipHooks", clip=graph.clip, apply_to_conds=True, schedule_clip=True, hooks=hooks)[0]


def diffusion_transformer(graph):
    return graph.add("UNETLoader", unet_name="tests_sd3.safetensors", weight_dtype="default")[0]


def part_of_a_model_only_file(slot):
    return lambda graph: graph.add("CheckpointLoaderSimple", ckpt_name="tests_model_only.safetensors")[slot]


def training_without_image():
    graph = bad_training()()
    (training,) = (node for node in graph.values() if node["class_type"] == "TLoRATrainFromImage")
    del training["inputs"]["image"]
    return graph


def load_of(name):
    def build():
        graph = TinyGraph()
        graph.picture(graph.add("TLoRALoad", file=name, strength=1.0, model=graph.model)[0])
        return graph

    return build


def single(class_type, **inputs):
    """A case: one node whose first output is looked at."""

    def build():
        graph = Graph()
        graph.add("PreviewAny", source=graph.add(class_type, **inputs)[0])
        return graph

    return build


def preview_of_sigmas_without_a_model():
    graph = TinyGraph()
    sigmas = graph.add("BasicScheduler", model=graph.model, scheduler="normal", steps=5, denoise=1.0)
    graph.save(graph.add("TLoRASchedulePreview", rank=4, min_rank=2, alpha=1.0, sigmas=sigmas[0])[0])
    return graph


def saving_as(file_name):
    def build():
        graph = TinyGraph()
        tlora = graph.add("TLoRALoad", file="tests/good.safetensors", strength=1.0)[1]
        graph.add("TLoRASave", tlora=tlora, file_name=file_name, dtype="float16")
        return graph

    return build


def baking(**changes):
    """A case: the good file baked with these inputs."""

    def build():
        graph = TinyGraph()
        bake(graph, "tests/good.safetensors", **{"mode": "interval", **changes})
        return graph

    return build


OUTSIDE = Path(tempfile.gettempdir()) / f"tlora_test_{uuid.uuid4().hex}"  # no test may make it

BAD = {
    "image with alpha": (bad_training(image=image_with_alpha), "image has 4 channels instead of 3"),
    "image of one pixel": (bad_training(image=empty_image(1, 1)), "image is 1x1 pixels"),
    "image of one row": (bad_training(image=empty_image(64, 1)), "image is 64x1 pixels"),
    "rank above a layer's width": (bad_training(rank=97, min_rank=2), "rank is 97, but the layer .* is 96 x 96"),
    "min_rank above rank": (bad_training(rank=4, min_rank=5), "min_rank is 5; .* from 0 to the rank, which is 4"),
    "no token and no class word": (bad_training(token=" ", class_word=""), "token and class_word are both empty"),
    "token with a character that cannot be shown": (
        bad_training(token="sks\u200d"),
        r"token is 'sks\\u200d'; it must be one line of text, without",
    ),
    "resolution that the VAE cannot encode": (
        bad_training(resolution=68),
        "resolution is 68; set it to a multiple of 8",
    ),
    "model of another family": (
        bad_training(model=diffusion_transformer),
        "model failed on .* clip and vae of the same model",
    ),
    "clip of a model-only file": (
        bad_training(clip=part_of_a_model_only_file(1)),
        "^clip is empty, .* connect the clip of a Load CLIP node",
    ),
    "vae of a model-only file": (
        bad_training(vae=part_of_a_model_only_file(2)),
        "^vae is empty, .* connect the vae of a Load VAE node",
    ),
    "file for another model": (load_of("tests/plain.safetensors"), '"plain.safetensors": none of its 2 keys fits'),
    "file that is cut off": (
        load_of("tests/cut.safetensors"),
        '"cut.safetensors": it cannot be read as a safetensors file',
    ),
    "file that is a pickle": (
        load_of("tests/pickle.safetensors"),
        '"pickle.safetensors": it cannot be read as a safetensors',
    ),
    "file that is empty": (
        load_of("tests/empty.safetensors"),
        '"empty.safetensors": it cannot be read as a safetensors file',
    ),
    "no prompts": (
        single("TLoRAPrompts", prompts=" \n\n", subject="sks dog"),
        "prompts is empty; write at least one line",
    ),
    "sigmas without their model": (preview_of_sigmas_without_a_model, "model is not connected"),
    "preview with min_rank above rank": (
        single("TLoRASchedulePreview", rank=4, min_rank=5, alpha=1.0),
        "min_rank is 5",
    ),
    "clip that changes over a sampling": (
        bad_training(clip=clip_that_changes_over_a_sampling),
        "clip gives 2 scheduled encodings of a prompt",
    ),
    "training into a folder above": (bad_training(file_name="../x"), r'file_name is "\.\./x", which leaves the loras'),
    "file in a folder above": (saving_as("../x"), "which leaves the loras folder"),
    "file at an absolute path": (saving_as(str(OUTSIDE / "x")), "which leaves the loras folder"),
    "file up and down again": (saving_as("a/../../x"), "which leaves the loras folder"),
    "file without a name": (saving_as("tests/"), 'file_name is "tests/"; give a name'),
    "file with a name that no disk takes": (saving_as("x" * 240), 'file_name is "x+", which cannot be created here'),
    "training into such a file": (bad_training(file_name="x" * 300), 'file_name is "x+", which cannot be created here'),
    "file in a file": (
        saving_as("tests/plain.safetensors/x"),
        'file_name is "tests/plain.safetensors/x", which cannot be created here',
    ),
    "baking into a folder above": (baking(file_name="../x"), "which leaves the loras folder"),
    "baking without a name": (baking(mode="steps", file_name="tests/"), 'file_name is "tests/"; give a name'),
    "more parts than components": (baking(mode="steps", parts=4), "parts is 4; set it to a whole number from 2 to 3"),
}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def bad_files(server, loras, trained):
    """Files that the cases name: good.safetensors is a T-LoRA, the others are not. Returns what the pickle would
    make."""
    folder, trap = loras / "tests", server.workspace / "unpickled"
    whole = (loras / trained[0]).read_bytes()
    (folder / "good.safetensors").write_bytes(whole)
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "pickle.safetensors").write_bytes(pickle.dumps(Payload(trap)))
    plain = {"lora_unet_x.lora_up.weight": torch.ones(4, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 4)}
    save_file(plain, folder / "plain.safetensors")
    models = server.workspace / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    checkpoints = server.workspace / "models" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    # The few tensors by which the host tells that a file is a Stable Diffusion 3 transformer, of one block.
    save_file(
        {
            "joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(192, 64),
            "x_embedder.proj.weight": torch.zeros(64, 16, 2, 2),
            "final_layer.linear.weight": torch.zeros(64, 64),
            "context_embedder.weight": torch.zeros(64, 32),
            "y_embedder.mlp.0.weight": torch.zeros(64, 32),
            "pos_embed": torch.zeros(1, 16, 64),
        },
        models / "tests_sd3.safetensors",
    )
    (checkpoints / "tests_model_only.safetensors").write_bytes((models / "tests_sd3.safetensors").read_bytes())
    return trap


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_harmed(server, good, trained, bad_files, case):
    build, words = BAD[case]
    models = server.workspace / "models"
    before = files_below(models)
    message = error_of(server, build())
    assert re.search(words, message) and is_one_sentence(message)
    assert files_below(models) == before and not bad_files.exists() and not OUTSIDE.exists()
    for now, then in zip(bare_and_adapted(server, trained[0]), good):
        assert np.array_equal(now, then)


def test_missing_image_is_refused_before_anything_runs(server):
    result = server.run(training_without_image(), check=False)
    assert len(result.errors) == 1 and "Required input is missing (image)" in result.errors[0]


def test_training_after_a_failed_one_is_the_same_as_before_it(server, loras, trained):
    assert "rank is 97" in error_of(server, bad_training(rank=97, min_rank=2)())
    graph = TinyGraph()
    training = graph.train(seed=1, file_name="tests/again")
    name = server.run(graph).outputs[training.id]["text"][0]
    assert same_tensors(loras / name, loras / trained[0])


# --- a loss that is no number ---


def overflow_above(timestep: float) -> dict[str, torch.Tensor]:
    """A plain LoRA file's tensors that leave the tiny base as it is below `timestep` and overflow above it."""
    width, hidden = 96, 384
    # The embedding's last column is sin(t * slow), which grows with t all the way.
    slow = 10000 ** -((width // 2 - 1) / (width // 2))
    slope, step, threshold = torch.zeros(hidden, width), torch.zeros(hidden, hidden), torch.zeros(hidden)
    slope[0, -1], threshold[0], step[:, 0] = 1e30, -1e30 * np.sin(timestep * slow), 1e30
    name = "diffusion_model.time_embed"
    return {f"{name}.0.diff": slope, f"{name}.0.diff_b": threshold, f"{name}.2.diff": step}


def test_loss_that_is_no_number_stops_the_training_and_keeps_the_last_good_state(server, loras, good, trained):
    save_file(overflow_above(970), loras / "overflow.safetensors")

    def training(steps):
        graph = TinyGraph()
        model = graph.add(
            "LoraLoaderModelOnly", model=graph.model, lora_name="overflow.safetensors", strength_model=1.0
        )
        node = graph.train(
            model=model[0], steps=steps, learning_rate=0.01, rank=2, min_rank=1, seed=1, file_name=f"tests/nan{steps}"
        )
        return graph, node

    before = files_below(loras)
    message = error_of(server, training(60)[0])
    found = re.search(
        r"because the loss became NaN or infinite; lower learning_rate\. .* back at step (\d+), .*"
        r"It is saved as (tests/nan60_\S+\.safetensors)\.$",
        message,
    )
    assert found and "\n" not in message, message
    kept, name = int(found[1]), found[2]
    assert files_below(loras) - before == {name}
    assert kept > 0, "choose a seed with which the training gets further"
    graph, node = training(kept)
    result = server.run(graph)
    assert same_tensors(loras / name, loras / result.outputs[node.id]["text"][0])
    with safe_open(loras / name, framework="pt") as file:
        assert json.loads(file.metadata()["tlora"])["training"]["steps_done"] == kept
    assert np.array_equal(bare_and_adapted(server, trained[0])[1], good[1])


# --- a disk that is full ---


@contextmanager
def small_disk(server, folder: Path, size: str = "64k", mode: str = "rw"):
    """A small file system at `folder`."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"{mode},size={size}", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system needs more rights")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small_files(server, folder: Path):
    """The server may write no file beyond 64 KiB, which it learns as it would of a full disk: while writing."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux limits another process")
    limits = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("obstacle", [small_disk, small_files])
@pytest.mark.parametrize("what", ["training", "saving", "baking"])
@pytest.mark.usefixtures("bad_files")
def test_full_disk_while_saving_is_said_and_leaves_no_half_written_file(server, loras, good, trained, obstacle, what):
    folder = loras / f"{obstacle.__name__}_{what}"
    folder.mkdir(exist_ok=True)
    cases = {"training": bad_training, "saving": saving_as, "baking": baking}
    case = cases[what](file_name=f"{folder.name}/x")
    with obstacle(server, folder):
        message = error_of(server, case())
        left = files_below(folder)
    if (what, obstacle) == ("training", small_disk):
        assert re.match(
            r'The disk of ".+/small_disk_training" has .+ free, but the training needs .+ there for the T-LoRA file; '
            r"free",
            message,
        )
    else:
        assert re.match(r'"x_00001_\.safetensors" was not saved \(.+\); free some disk space', message)
    assert "\n" not in message and left == set()
    server.run(case())
    assert len(files_below(folder)) >= 1
    assert np.array_equal(bare_and_adapted(server, trained[0])[1], good[1])


class FillsDisk(CancelAt):
    """Fills a folder's disk, which had room when the training began, when it hears of a step."""

    def __init__(self, server, folder: Path):
        super().__init__(server, step=0)
        self.ballast = folder / "ballast"

    def step(self, _node, _title, _value, _total):
        if not self.ballast.exists():
            with open(self.ballast, "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))


def longer_training(file_name: str):
    """Long enough for a disk to fill meanwhile; always the same."""
    graph = TinyGraph()
    return graph, graph.train(steps=80, learning_rate=0.01, seed=5, file_name=file_name).id


@pytest.fixture(scope="module")
def straight(server, loras):
    """The file of longer_training where nothing is in its way."""
    graph, node = longer_training("tests/straight")
    return loras / server.run(graph).outputs[node]["text"][0]


def test_disk_that_fills_up_during_a_training_loses_nothing_and_run_again_only_writes_the_file(server, loras, tmp_path):
    folder = loras / "filled_disk"
    folder.mkdir()
    with small_disk(server, folder, "1m"):
        (graph, node), filling, again = (
            longer_training("filled_disk/x"),
            FillsDisk(server, folder),
            CancelAt(server, step=10**9),
        )
        (message,) = server.run(graph, check=False, listener=filling).errors
        assert re.search(
            r'"x_00001_\.safetensors" was not saved .* The training is kept in "x-\w+"\. Free some space .* press '
            r"Run again: it only writes the file\.$",
            message,
        )
        filling.ballast.unlink()
        name = server.run(graph, listener=again).outputs[node]["text"][0]
        assert again.last_step == 0 and files_below(folder) == {Path(name).name}
        shutil.copy(loras / name, tmp_path / "x.safetensors")
    graph, node = longer_training("tests/after")  # which trains it, as the file is gone with its disk
    assert same_tensors(tmp_path / "x.safetensors", loras / server.run(graph).outputs[node]["text"][0])


def test_training_that_neither_disk_takes_is_kept_in_the_output_folder_and_the_user_is_told(server, loras, straight):
    folder, output = loras / "taken_nowhere", server.workspace / "output"
    folder.mkdir()
    with small_disk(server, folder, "1m"), small_disk(server, output / "tlora_runs"):
        (message,) = server.run(
            longer_training("taken_nowhere/x")[0], check=False, listener=FillsDisk(server, folder)
        ).errors
    path = output / "x_00001_.safetensors"
    assert (
        message.endswith(f'It is saved as "{path}"; move that file to "{loras}".')
        and "run state of step 80 was not saved" in message
    )
    assert same_tensors(path, straight)


@pytest.mark.parametrize("found", [False, True], ids=["trained", "found"])
def test_folder_that_cannot_be_written_to_is_told_before_any_step(server, loras, straight, found):
    folder, none = loras / f"read_only{found}", CancelAt(server, step=10**9)
    folder.mkdir()
    graph, node = longer_training(f"{folder.name}/x")
    graph[node]["inputs"]["seed"] = 5 if found else 6
    with small_disk(server, folder, mode="ro"):
        message = server.run(graph, check=False, listener=none).errors[0].partition(": ")[2]
    assert none.last_step == 0 and "\n" not in message
    assert (
        message == f'file_name is "{folder.name}/x", but "{folder.name}" in the loras folder is not writable; '
        f"choose another folder."
    )
