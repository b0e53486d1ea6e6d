"""The command line of the check, alike in tools/host.py gpu-check and in tools/gpu_check.py."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import plan, report, runner


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    parser.add_argument("--json", metavar="FILE", help="write everything there too: figures, versions, tracebacks")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small models, to try the parts themselves"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="these parts, such as 'train *'; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="name the parts and their time limits, and run none")


def list_parts(args: argparse.Namespace) -> int:
    for part in plan.chosen(args.only):
        print(f"{part.name:38} {part.limit:4} s")
    return 0


def check(
    args: argparse.Namespace, python: Path | str = sys.executable, comfyui: Path | str = "", site: Path | str = ""
):
    """Runs the parts with the interpreter `python` on the ComfyUI in the folder `comfyui`, which may be "" if it is
    importable; `site`: a folder of further packages, or "". Returns the exit status: 0 if all that ran passed.

    Raises ValueError for a name of no part, and comfyui.CannotStart.
    """
    size = "full" if args.device == "cuda" else "miniature"
    settings = runner.Settings(args.device, size, str(comfyui), str(site), str(python))
    about = {"device": args.device, "minutes": args.minutes, "started": time.strftime("%Y-%m-%dT%H:%M:%S")}
    parts = plan.chosen(args.only)
    known = {part.name: runner.Result(part.name, part.host) for part in parts}

    def tell(result: runner.Result) -> None:
        """As each part is over; the table on standard output comes at the end. The JSON is there if this is ended."""
        print(report.line(result), file=sys.stderr, flush=True)
        known[result.name] = result
        if args.json:
            report.write(args.json, report.as_json(list(known.values()), **about))

    results = runner.run_parts(parts, settings, 60 * args.minutes, tell)
    print(report.table(results))
    if args.json:
        print(f"Written to {args.json}.")
    return report.status(results)
