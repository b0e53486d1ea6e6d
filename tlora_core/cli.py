"""The command line: `python -m tlora_core info|convert|bake FILE`, for use without ComfyUI.

Exit status: 0 on success, 1 if a file or a value was refused (one sentence on standard error), 2 for an invalid command
line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import TLoRAError
from .files.atomic import stem_of
from .files.bake import bake, save_all
from .files.dtypes import DTYPES
from .files.export import LAYOUTS, export
from .files.foreign import Loaded, load_any
from .files.foreign.model_file import describe_model_file
from .reports.report import blocks, report_text
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except TLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output closed it early
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tlora_core", description="Inspects and converts LoRA and T-LoRA files."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="describe the contents of a file")
    info.set_defaults(run=_info)

    convert = commands.add_parser(
        "convert",
        help="write a file in another layout",
        description="Writes a file in another layout. All layouts but tlora and reference are plain LoRAs, with all "
        "ranks always on.",
    )
    convert.add_argument(
        "--to", choices=["tlora", *LAYOUTS], default="tlora", help="layout to write; tlora is this pack's (default)"
    )
    convert.set_defaults(run=_convert)

    baking = commands.add_parser(
        "bake",
        help="convert a T-LoRA to plain LoRAs",
        description="Converts a T-LoRA to plain LoRAs. Noise levels go from 1, pure noise, to 0, the finished picture.",
    )
    how = baking.add_mutually_exclusive_group(required=True)
    how.add_argument("--at", type=float, metavar="LEVEL", help="as it is at one noise level")
    how.add_argument("--interval", type=float, nargs=2, metavar="LEVEL", help="its mean between two noise levels")
    how.add_argument("--parts", type=int, metavar="N", help="N files to switch on in turn")
    baking.set_defaults(run=_bake)

    for command in (info, convert, baking):
        _add_input(command)
    for command in (convert, baking):
        _add_output(command)
    return parser


def _add_input(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="a T-LoRA or LoRA of any known kind")
    command.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="safetensors file of the model it was trained on; LyCORIS files need it",
    )
    command.add_argument("--min-rank", type=int, metavar="N", help="the schedule's minimum rank, instead of the file's")
    command.add_argument("--alpha", type=float, metavar="X", help="the schedule's exponent, instead of the file's")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("output", type=Path, help="file to write")
    command.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of the tensors (default: float16)")
    command.add_argument("--force", action="store_true", help="replace an existing file")


def _load(options: argparse.Namespace) -> Loaded:
    model = None if options.model is None else describe_model_file(options.model)
    return load_any(options.file, model, options.min_rank, options.alpha, _show_progress)


def _show_progress(done: int, total: int) -> None:
    if done == total or (done and sys.stderr.isatty()):
        # The next line is longer than this one and overwrites it.
        print(
            f"base terms recomputed: {done} of {total}",
            end="\n" if done == total else "\r",
            file=sys.stderr,
            flush=True,
        )


def _info(options: argparse.Namespace) -> None:
    loaded = _load(options)
    print(loaded.report)
    print()
    print(report_text(loaded.tlora, blocks(loaded.tlora)))


def _convert(options: argparse.Namespace) -> None:
    loaded = _load(options)
    print(loaded.report, file=sys.stderr)
    layout, path = options.to, options.output
    _require_free(
        path.with_name(stem_of(path)) if layout == "reference" else path, options.force and layout != "reference"
    )
    dtype = DTYPES[options.dtype]
    if layout == "tlora":
        loaded.tlora.save(path, dtype)
        if loaded.tlora.note:
            print(loaded.tlora.note, file=sys.stderr)
    else:
        path = export(loaded.tlora, path, layout, dtype)
    print(path)


def _bake(options: argparse.Namespace) -> None:
    loaded = _load(options)
    print(loaded.report, file=sys.stderr)
    baked = bake(loaded.tlora, options.at, options.interval, options.parts)
    paths = [one.path(options.output) for one in baked]
    for path in paths:
        _require_free(path, options.force)
    save_all([(one.tlora, path) for one, path in zip(baked, paths)], DTYPES[options.dtype])
    for one, path in zip(baked, paths):
        print(f"{path}{one.note}")


def _require_free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise TLoRAError(f'"{path}" already exists; choose another name, or replace a file with --force.')
