"""One training in a process with ComfyUI's modules and without its server: `job.py JOB`, where JOB is the JSON of
trainlib.arguments.job_of with the host's folder and options.

Exit status: 0 done, 1 failed, 2 wrong arguments, 130 or 143 ended by Ctrl-C or SIGTERM with its state kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpulib.comfyui import CannotStart, make_importable, start_as_usual  # noqa: E402
from hostlib.errors import HostError  # noqa: E402
from hostlib.results import copy_into  # noqa: E402

from trainlib.watch import Watch  # noqa: E402


class Ended(Exception):
    """The job is over before its result. status: of the process."""

    def __init__(self, state: str, text: str, status: int):
        super().__init__(text)
        self.state, self.status = state, status


def main(job: dict[str, Any]) -> int:
    out, began = sys.stdout, time.monotonic()
    try:
        # Nothing else may stand beside the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            result, status = _result(job), 0
        _show(job, result, time.monotonic() - began)
    except Ended as ended:
        result, status = {"state": ended.state, "error": str(ended)}, ended.status
        print(f"Error: {ended}" if status in (1, 2) else ended, file=sys.stderr)
    if job["json"]:
        print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}, ensure_ascii=False), file=out)
    return status


def _result(job: dict[str, Any]) -> dict[str, Any]:
    for note in job["notes"]:
        print(note, file=sys.stderr)
    with _ended_in_words(job["verbose"]):
        start(job)
        return _trained(job, Watch(), dict)


def start(job: dict[str, Any]) -> None:
    """Starts ComfyUI's modules in this process. Raises CannotStart."""
    logging.basicConfig(level=logging.INFO if job["verbose"] else logging.WARNING, format="%(message)s")
    make_importable(job["comfyui"])
    start_as_usual(job["host_arguments"])


def outcome(job: dict[str, Any], watch: Watch, load: Callable[[dict], dict]) -> dict[str, Any]:
    """Trains in a process that has started, and copies what was made into the job's `out`. load: from the model's parts
    as the job names them to what is given to the training. Raises Ended."""
    with _ended_in_words(job["verbose"]):
        return _trained(job, watch, load)


@contextlib.contextmanager
def _ended_in_words(verbose: bool) -> Iterator[None]:
    """Turns every exception within the block into Ended."""
    try:
        yield
    except Ended:
        raise
    except KeyboardInterrupt as stopped:
        raise Ended("cancelled", "Stopped.", 130) from stopped
    except Exception as error:
        if verbose:
            traceback.print_exc()
        known = isinstance(error, CannotStart | HostError) or type(error).__name__ == "TLoRAError"
        raise Ended("failed", _one_line(error) if known else _unexpected(error), 1) from error


def _trained(job: dict[str, Any], watch: Watch, load: Callable[[dict], dict]) -> dict[str, Any]:
    from comfy.model_management import InterruptProcessingException

    import tlora_core
    from tlora_core.hosts.comfy.page.pages import heard_by
    from tlora_core.hosts.comfy.training.headless import completed_inputs
    from tlora_core.hosts.comfy.training.scored import row

    # A cancel keeps what was learnt, unless told otherwise.
    inputs = {"save_on_cancel": True, **job["inputs"]}
    try:
        completed_inputs(inputs, "clip_vision" in job["parts"])
    except tlora_core.TLoRAError as error:
        raise Ended("failed", str(error), 2) from error
    try:
        with heard_by(watch.hear), watch.connected():
            done = tlora_core.train(**load(job["parts"]), **job["files"], **inputs)
    except InterruptProcessingException as cancelled:
        said = f"{watch.message or 'Cancelled before the first step.'} The same command goes on."
        raise Ended("cancelled", said, 128 + watch.cancelled_by) from cancelled
    return {
        "state": watch.state,
        "file": str(done.path),
        "name": done.file,
        "run": str(done.folder),
        "pictures": [str(path) for path in sorted((done.folder / "validation").glob("*.png"))],
        "steps": len(done.losses),
        "kept_step": done.step,
        "why": done.why,
        "scores": [row(scores) for scores in done.scores],
        "loss": watch.loss,
        "message": watch.message,
        "copies": _copies(done, job["out"]) if job["out"] else [],
    }


def _copies(done, out: str) -> list[str]:
    """Copies the T-LoRA, the validation pictures and the loss curve into the folder `out`."""
    import io

    from tlora_core.reports.plot import loss_curve

    curve = io.BytesIO()
    loss_curve(done.losses).save(curve, "PNG")
    files = [done.path, *sorted((done.folder / "validation").glob("*.png"))]
    try:
        copies = [copy_into(out, path.name, path.read_bytes()) for path in files]
        return [str(path) for path in (*copies, copy_into(out, "loss.png", curve.getvalue()))]
    except OSError as error:
        reason = error.strerror or error
        raise HostError(f'--out is "{out}", which cannot be written ({reason}); it is in {done.path}.') from error


def _show(job: dict[str, Any], result: dict[str, Any], seconds: float) -> None:
    stream = sys.stderr if job["json"] else sys.stdout
    print(f"T-LoRA:  {result['copies'][0] if result['copies'] else result['file']}", file=stream)
    print(f"Run:     {result['run']}", file=stream)
    found = "Found the result of an earlier, equal training" if result["state"] == "found" else "Done"
    print(f"{found} in {seconds:.0f} s. {result['message']}".strip(), file=stream, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)} (--verbose shows where)"


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
