"""A stand-in for the interpreter that runs a batch's child: it speaks the child's side of batchlib.child, and "trains"
by counting. `write_python(folder)` makes it executable, for --python."""

import json
import os
import stat
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def write_python(folder: Path) -> tuple[Path, Path]:
    """A folder that passes for ComfyUI, and its interpreter."""
    comfyui = folder / "ComfyUI"
    (comfyui / "comfy").mkdir(parents=True)
    (comfyui / "main.py").touch()
    python = comfyui / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n', encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return comfyui, python


def one_job(folder: Path, workflow: dict | None = None, **cells):
    """The job of a table of one row; its files are in the folder."""
    from batchlib.jobs import jobs_of
    from batchlib.table import read_table

    (folder / "one.jsonl").write_text(json.dumps(cells))
    [job] = jobs_of(read_table(folder / "one.jsonl"), folder, workflow)
    return job


def main(program: str, *arguments: str) -> None:
    if program == "-c":
        sys.exit(3)  # asked for an accelerator, on a machine that may have one
    if Path(program).name == "sheet.py":
        Path(arguments[0]).write_text(sys.stdin.read(), encoding="utf-8")
        return
    sys.path.insert(0, str(REPO / "tools"))
    from batchlib.child import Talk

    talk = Talk()
    private = Path(talk.settings["private"])
    for command in talk.commands():
        if command["do"] == "check":
            talk.tell("checked", **check(command["jobs"]))
        else:
            talk.tell("end", **run(talk, private, command["job"]))


def check(jobs: list) -> dict:
    wrong = [job for job in jobs if job["inputs"].get("rank") == "wrong"]
    return {"row": wrong[0]["row"], "column": "rank", "error": "it is wrong."} if wrong else {}


def run(talk, private: Path, job: dict) -> dict:
    """Counts to `steps` with a state after each; `die` in `how` ends the process, and `kill` its parent too, at step 3
    of the first try; `always die` in each try; `fail` fails; `wait` counts slowly."""
    how, steps = job["inputs"].get("how", ""), int(job["inputs"]["steps"])
    state = private / "output" / "tlora_runs" / "run" / "checkpoint.pt"
    first = int(state.read_text()) if state.is_file() else 0
    for step in range(first + 1, steps + 1):
        if talk.cancelled.is_set():
            return {"state": "cancelled", "error": "Cancelled.", "first_step": first}
        state.parent.mkdir(parents=True, exist_ok=True)
        write(state, str(step))
        talk.tell("progress", step=step, steps=steps)
        time.sleep(0.05 if how == "wait" else 0)
        if (step == 3 and not first and how in ("die", "kill")) or how == "always die":
            time.sleep(first == 0)  # until the worker has passed the state on
            os.kill(os.getppid() if how == "kill" else os.getpid(), 9)
            time.sleep(60)
    if how == "fail":
        return {"state": "failed", "error": "It cannot be."}
    [picture] = job["files"]["image"]
    (private / "results").mkdir(exist_ok=True)
    (private / "results" / "sum.safetensors").write_text(str(sum(Path(picture).read_bytes()) * steps))
    state.unlink(missing_ok=True)
    return {"state": "done", "seconds": 0.5, "first_step": first}


def write(path: Path, text: str) -> None:
    temporary = path.with_name(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
