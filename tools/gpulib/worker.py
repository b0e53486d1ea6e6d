"""Runs parts one after the other in this process, and writes an event before and after each.

    python worker.py EVENTS DEVICE HOST SIZE COMFYUI SITE PART [PART ...]

Started by `runner`, which reads the file EVENTS: a line of JSON for each event. This process ends after the first part
that failed, since that may have left the card in any state, and at the limit of a part, after it has written where it
hangs.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpulib import comfyui  # noqa: E402
from gpulib.plan import Part, parts  # noqa: E402
from gpulib.running import Failed, Run, Skipped  # noqa: E402
from gpulib.sizes import SIZES, Size  # noqa: E402

Tell = Callable[..., None]
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def main(events: str, device: str, host: str, size: str, folder: str, site: str, *names: str) -> int:
    with open(events, "a", encoding="utf-8", buffering=1) as file:

        def tell(event: str, **what: Any) -> None:
            file.write(json.dumps({"event": event, **what}) + "\n")

        comfyui.make_importable(folder, site)
        try:
            chosen = comfyui.start(device, host)
        except comfyui.CannotStart as error:
            tell("cannot start", message=str(error))
            return 1
        tell("ready")
        by_name = {part.name: part for part in parts()}
        run_all([by_name[name] for name in names], chosen, SIZES[size], tell)
    return 0


def run_all(of: list[Part], device: Any, size: Size, tell: Tell) -> None:
    """Runs the parts until one fails."""
    kept: dict = {}
    for part in of:
        tell("start", name=part.name, at=time.monotonic())
        run = Run(device, size, kept, time.monotonic() + part.limit)
        faulthandler.dump_traceback_later(part.limit, exit=True)
        try:
            outcome = run_one(part, run)
        finally:
            faulthandler.cancel_dump_traceback_later()
        tell("end", name=part.name, **outcome)
        if outcome["status"] == FAILED:
            return


def run_one(part: Part, run: Run) -> dict[str, Any]:
    """The part's status, seconds, figures, message and traceback."""
    started, said, trace, status = time.monotonic(), "", "", PASSED
    try:
        module, function = part.call.split(":")
        check = getattr(importlib.import_module(f"gpulib.checks.{module}"), function)
        gc.freeze()  # what imports left need not be looked at in each collection, of which some parts make many
        check(run, **part.arguments)
    except Skipped as reason:
        status, said = SKIPPED, str(reason)
    except Failed as error:
        status, said, trace = FAILED, str(error), traceback.format_exc()
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        status, said, trace = FAILED, f"{type(error).__name__}: {first_line}", traceback.format_exc()
    seconds = round(time.monotonic() - started, 2)
    return {"status": status, "seconds": seconds, "figures": run.figures, "message": said, "traceback": trace}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
