#!/usr/bin/env python3
"""Tries the pack on this machine's CUDA card: what works, how exact it is, how fast, and in how much memory.

    python3 tools/host.py gpu-check [--minutes M] [--json FILE] [--device cuda|cpu]

Random weights in the shapes of real models, and the bundled tiny base; nothing is downloaded. Each part has a time
limit and may fail without the others. With a Python that has PyTorch and all else that ComfyUI needs, this file runs
without tools/host.py too; --comfyui names ComfyUI's folder, --kit a folder made by tools/host.py gpu-kit.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpulib import kit, plan, report, runner  # noqa: E402
from gpulib.comfyui import CannotStart  # noqa: E402
from hostlib.process import exit_on_signals  # noqa: E402


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    made.add_argument("--json", metavar="FILE", help="write everything there too: figures, versions, tracebacks")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in miniature, to try the parts")
    made.add_argument("--only", action="append", default=[], metavar="NAME", help="parts such as 'train *'; repeatable")
    made.add_argument("--list", action="store_true", help="name the parts and their limits, and run none")
    made.add_argument("--comfyui", metavar="PATH", default="", help="ComfyUI's folder, where it is not importable yet")
    made.add_argument("--kit", metavar="FOLDER", help="a folder made by tools/host.py gpu-kit")
    return made


def main(arguments: list[str]) -> int:
    asked = parser()
    args = asked.parse_args(arguments)
    try:
        parts = plan.chosen(args.only)
    except ValueError as error:
        asked.error(str(error))
    if args.list:
        for part in parts:
            print(f"{part.name:38} {part.limit:4} s")
        return 0
    try:
        comfyui = kit.unpacked(Path(args.kit)) if args.kit else args.comfyui
        settings = runner.Settings(args.device, "full" if args.device == "cuda" else "miniature", str(comfyui))
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        results = runner.run_parts(parts, settings, 60 * args.minutes, lambda r: print(report.line(r), flush=True))
    except (CannotStart, kit.BadKit) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.table(results)}")
    if args.json:
        report.write(args.json, report.as_json(results, device=args.device, minutes=args.minutes, started=started))
        print(f"Written to {args.json}.")
    return report.status(results)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
