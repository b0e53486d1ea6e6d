#!/usr/bin/env python3
"""Tries the pack on this machine's CUDA card: what works, how exact it is, how fast, and in how much memory.

The same as `python3 tools/host.py gpu-check`, for a Python that has all that ComfyUI needs, and for a machine without
internet: `python3 tools/host.py gpu-kit` packs what such a machine lacks beside PyTorch.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpulib import command, kit  # noqa: E402
from gpulib.comfyui import CannotStart  # noqa: E402
from hostlib.errors import HostError  # noqa: E402
from hostlib.process import exit_on_signals  # noqa: E402


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_options(parser)
    parser.add_argument("--comfyui", metavar="PATH", default="", help="ComfyUI's folder, if Python does not find it")
    parser.add_argument("--site", metavar="FOLDER", default="", help="a folder with packages that this Python lacks")
    parser.add_argument("--kit", metavar="FOLDER", help="a folder made by gpu-kit, in place of both")
    args = parser.parse_args(arguments)
    try:
        if args.list:
            return command.list_parts(args)
        if args.kit:
            args.comfyui, args.site = kit.unpack(Path(args.kit))
        return command.check(args, comfyui=args.comfyui, site=args.site)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except (CannotStart, HostError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
