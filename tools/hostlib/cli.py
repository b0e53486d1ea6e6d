"""The command line of tools/host.py."""

from __future__ import annotations

import argparse
import sys

from batchlib.command import add_options as batch_options
from batchlib.command import run as batch
from gpulib.command import add_options as gpu_options
from trainlib.arguments import add_options as train_options

from . import commands
from .errors import HostError
from .pins import default_version, read_pins


def main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        return args.command(args)
    except HostError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    args.argv = argv
    if args.command is commands.test:
        # pytest's own options may stand anywhere, so argparse cannot be told about them.
        args.arguments = [argument for argument in unknown if argument != "--"]
    elif unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="host.py", description="ComfyUI with this pack: set up, run, serve, test.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command, text: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=text, description=text, parents=[_host_options()], allow_abbrev=False)
        added.set_defaults(command=command)
        return added

    add("setup", commands.setup, "set ComfyUI up, and nothing else")
    demo = add("demo", commands.demo, "run the bundled quickstart workflow")
    demo.add_argument("--serve", action="store_true", help="leave ComfyUI running afterwards")
    _add_run_options(demo)
    train_options(add("train", commands.train, "train a T-LoRA from pictures, without a browser"))
    batch_options(add("batch", batch, "run a table of jobs: trainings, or a workflow with other inputs in each row"))
    run = add("run", commands.run, "run a workflow file, in the interface's format or in API format")
    run.add_argument("workflow", metavar="WORKFLOW.json")
    _add_run_options(run)
    serve = add("serve", commands.serve, "start ComfyUI with the pack linked in")
    serve.add_argument("--port", type=int, default=0, help="the port on 127.0.0.1 (default: a free one)")
    serve.add_argument(
        "--newest-frontend", action="store_true", help="with the newest interface and not the host's own"
    )
    test = add("test", commands.test, "run the tests; further arguments go to pytest")
    test.add_argument("--fast", action="store_true", help="only those that need no ComfyUI, and without setting it up")
    lint = subparsers.add_parser(
        "lint", help="check style, format and types", description="Check style, format and types.", allow_abbrev=False
    )
    lint.add_argument("--fix", action="store_true", help="mend what can be mended by itself, and write the format")
    lint.set_defaults(command=commands.lint)
    bench = add("bench", commands.bench, "run benchmarks/NAME.py with the host importable")
    bench.add_argument("name", metavar="NAME")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the benchmark")
    gpu = add("gpu-check", commands.gpu_check, "try the pack on this machine's CUDA card, as a report for a bug")
    gpu_options(gpu)
    kit = add("gpu-kit", commands.gpu_kit, "pack what gpu-check needs on a machine with PyTorch and without internet")
    kit.add_argument("folder", nargs="?", default=commands.KIT, metavar="FOLDER", help="(default: .gpu-check)")
    kit.add_argument("--target-python", metavar="V", help="that machine's, such as 3.12, on Linux (default: as here)")
    kit.add_argument("--all", action="store_true", help="also what images with PyTorch usually have, such as scipy")
    python = add("python", commands.python, "run a script with the host's interpreter and the host importable")
    python.add_argument("script", metavar="SCRIPT")
    python.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


def _host_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI instead of setting one up")
    options.add_argument("--python", metavar="PATH", help="the interpreter of that ComfyUI (default: its own venv)")
    versions = ", ".join(read_pins()["hosts"])
    options.add_argument("--host-version", metavar="V", help=f"{versions} (default: {default_version()})")
    return options


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    help_text = "replace an input; NODE is an id, title or class"
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help=help_text)
    parser.add_argument("--out", metavar="FOLDER", help="copy what the workflow produced there")
