"""`batch --ray` on a cluster of this machine with two workers, on its processors: what survives the death of a worker
and of the driver. Each test starts the command as a user does; it sets Ray up in an environment of its own."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from batch_child import write_python
from places import REPO

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks processes up in /proc")
PATIENCE, LEFT_OVER = 600, 60  # seconds, on a busy machine: for a row, and for what a command that has ended leaves


class Driver:
    """The command, in a process group of its own."""

    def __init__(self, folder: Path, host: list[str]):
        self.folder, self.out = folder, folder / "out"
        self.command = [sys.executable, str(REPO / "tools" / "host.py"), "batch", "jobs.csv", "--out", "out", *host]
        self.command += ["--ray", "--workers", "2"]
        # A cluster for this test alone, and a place that shows what is left behind.
        self.environment = {**os.environ, "RAY_ADDRESS": "local", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.environment["RAY_TMPDIR"] = tempfile.gettempdir()  # a socket's path is short
        self.environment.pop("PYTHONPATH", None)

    def start(self):
        self.log = open(self.folder / "log", "ab")
        options = {"cwd": self.folder, "env": self.environment, "stdout": self.log, "stderr": self.log}
        self.process = subprocess.Popen(self.command, start_new_session=True, **options)
        return self

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self):
        status = self.process.wait(PATIENCE)
        self.log.close()
        return status

    def said(self):
        return (self.folder / "log").read_text(encoding="utf-8")

    def report(self):
        path = self.out / "report.csv"
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []

    def record(self, line):
        return json.loads((self.out / line["row"] / "row.json").read_text(encoding="utf-8"))

    def until(self, condition):
        """Waits for it while the command runs, and a little longer."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.said()
            if self.process.poll() is not None:
                deadline = min(deadline, time.monotonic() + LEFT_OVER)
            time.sleep(0.1)

    def private(self):
        """The folders of workers, of those that were killed too."""
        return set(self.folder.glob("tlora-batch-*"))

    def children(self):
        """The workers' children that live, by the logs that they write: (process, its parent)."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                log = (process / "fd" / "2").resolve()
                if log.parent in self.private():
                    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                    found[log] = int(process.name), int(parent)
            except OSError:
                pass
        return found


@pytest.fixture
def driver(tmp_path):
    started = []

    def start(*lines, host):
        (tmp_path / "jobs.csv").write_text("\n".join(lines), encoding="utf-8")
        started.append(Driver(tmp_path, host).start())
        return started[0]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.kill()


def test_forty_rows_survive_a_dead_worker_a_dead_driver_and_a_poisoned_row(driver, tmp_path):
    write_python(tmp_path)
    for number in range(3):
        (tmp_path / f"p{number}.png").write_bytes(bytes([number + 1] * 10))
    how = {2: "kill", 5: "fail", **dict.fromkeys(range(20, 30), "wait")}
    rows = [f"r{number},tiny,p{number % 3}.png,dog,{number + 5},{how.get(number, '')}" for number in range(40)]
    batch = driver(
        "row,model,image,class_word,steps,how", *rows, host=["--comfyui", "ComfyUI", "--python", "ComfyUI/python"]
    )

    def done():
        return {line["row"]: line for line in batch.report() if line["state"] == "done"}

    batch.until(lambda: len(done()) >= 20)
    batch.kill()
    before = {name: (batch.out / name / "row.json").stat().st_mtime_ns for name in done()}
    assert 20 <= len(before) < 39
    batch.until(lambda: not batch.children())
    left = batch.private()
    assert batch.start().wait() == 1, batch.said()
    report = batch.report()
    assert [line["number"] for line in report] == [str(number) for number in range(1, 41)]
    assert [line["row"].partition("-")[0] for line in report] == [f"r{number}" for number in range(40)]
    assert [number for number, line in enumerate(report) if line["state"] != "done"] == [5]
    assert report[5]["error"] == "It cannot be."
    for number, line in enumerate(report):
        if number != 5:
            content = (batch.out / line["file"]).read_bytes()
            assert int(content) == (number % 3 + 1) * 10 * (number + 5)
            assert batch.record(line)["files"] == {"sum.safetensors": hashlib.sha256(content).hexdigest()}
    assert batch.record(report[2])["first_step"] == 3 and "goes on from its last state" in batch.said()
    assert before == {name: (batch.out / name / "row.json").stat().st_mtime_ns for name in before}
    assert batch.private() <= left and not batch.children()


def test_a_training_whose_worker_is_killed_ends_as_if_it_was_not(driver, host, tmp_path):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "heart.png")
    header = "row,model,image,class_word,method,rank,min_rank,steps,learning_rate,checkpoint_every"
    # How often it is saved does not change the result.
    rows = [f"{name},tiny,heart.png,heart,tlora,4,2,24,0.01,{every}" for name, every in (("killed", 4), ("whole", 0))]
    batch = driver(header, *rows, host=["--comfyui", str(host.comfyui), "--python", sys.executable])
    batch.until(lambda: list(batch.out.glob("killed-*/state.zip")))
    [state] = [path for folder in batch.private() for path in folder.glob("output/tlora_runs/*/checkpoint.pt")]
    _, worker = batch.children()[state.parents[3] / "log"]
    os.kill(worker, signal.SIGKILL)
    assert batch.wait() == 0, batch.said()
    killed, whole = batch.report()
    assert batch.record(killed)["first_step"] >= 4 and batch.record(whole)["first_step"] == 0
    assert (batch.out / killed["file"]).read_bytes() == (batch.out / whole["file"]).read_bytes()
    assert killed["peak_ram_gib"] and not batch.private()
