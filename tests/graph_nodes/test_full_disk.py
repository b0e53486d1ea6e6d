"""The nodes on the real server when a disk is full or read-only: a sentence, and no half-written file."""

import re
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from failing_graphs import CancelAt, bad_training, baking, saving_as
from graphs import TinyGraph, bare_and_adapted, error_of, files_below, same_tensors


@pytest.fixture(scope="module")
def good_file(loras, trained):
    """The file that failing_graphs saves and bakes."""
    shutil.copy(loras / trained[0], loras / "tests" / "good.safetensors")


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
@pytest.mark.usefixtures("good_file")
def test_full_disk_while_saving_is_said_and_leaves_no_half_written_file(server, loras, good, trained, obstacle, what):
    folder = loras / f"{obstacle.__name__}_{what}"
    folder.mkdir(exist_ok=True)
    name = f"{folder.name}/x"
    # With a seed of its own, so that no earlier run is found whose file need only be written.
    seed = 70 if obstacle is small_disk else 71
    case = {
        "training": lambda: bad_training(file_name=name, seed=seed),
        "saving": lambda: saving_as(name),
        "baking": lambda: baking(file_name=name),
    }[what]()
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


STEPS = 80


class FillsDisk(CancelAt):
    """Fills a folder's disk, which had room when the training began, when it hears of a step."""

    def __init__(self, server, folder: Path):
        super().__init__(server, step=0, steps=STEPS)
        self.ballast = folder / "ballast"

    def step(self, _node, _title, _value, total):
        if total == self.steps and not self.ballast.exists():
            with open(self.ballast, "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))


def longer_training(file_name: str):
    """Long enough for a disk to fill meanwhile; always the same."""
    graph = TinyGraph()
    return graph, graph.train(steps=STEPS, learning_rate=0.01, seed=5, file_name=file_name).id


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
            CancelAt(server, step=10**9, steps=STEPS),
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


def test_training_that_neither_disk_can_store_is_kept_in_the_output_folder_and_the_user_is_told(
    server, loras, straight
):
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
def test_folder_that_cannot_be_written_to_is_reported_before_any_step(server, loras, straight, found):
    folder, none = loras / f"read_only{found}", CancelAt(server, step=10**9, steps=STEPS)
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
