"""The options of `batch`, and the command."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hostlib.build import ensure_ray
from hostlib.pins import REPO
from hostlib.process import run_foreground
from hostlib.server import load_workflow

from .driver import Batch, Engine
from .jobs import Job, jobs_of
from .local import Local
from .results import Results
from .table import read_table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "table", metavar="TABLE", help="CSV with a header, or JSON Lines (.jsonl): a job a row; columns as in train"
    )
    parser.add_argument(
        "--workflow", metavar="W.json", help="run this workflow for each row instead; columns are NODE.INPUT"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where the results go (default: the table's name)")
    parser.add_argument("--shard", metavar="I/N", type=_shard, help="only the I-th of N equal parts of the table")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="several rows at once on a Ray cluster (default: this machine)",
    )
    parser.add_argument("--workers", metavar="N", type=_count, help="with --ray (default: one for each GPU)")
    parser.add_argument("--verbose", action="store_true", help="show ComfyUI's log")


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f'it is "{text}"; give 1/8 for the first of eight parts')
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'it is "{text}"; give 1 or more')
    return int(text)


def run(args: argparse.Namespace) -> int:
    table = Path(args.table)
    workflow = None if args.workflow is None else load_workflow(args.workflow)
    jobs = jobs_of(read_table(table), table.resolve().parent, workflow)
    part, jobs = _part(jobs, args.shard)
    results = Results(Path(args.out or table.with_suffix("")).expanduser().resolve(), part)
    if args.ray is not None and importlib.util.find_spec("ray") is None:
        # The same command, where Ray can be imported.
        return run_foreground([str(ensure_ray()), str(REPO / "tools" / "host.py"), *args.argv], os.environ)
    settings = {name: getattr(args, name) for name in ("host_version", "verbose")}
    for name in ("comfyui", "python"):  # a worker is in another folder
        given = getattr(args, name)
        settings[name] = given and str(Path(given).expanduser().absolute())
    settings["workflow"] = workflow
    return Batch(jobs, results, lambda rows: _engine(args, settings, rows)).go()


def _part(jobs: Sequence[Job], shard: tuple[int, int] | None) -> tuple[str, Sequence[Job]]:
    """The part of the reports' names, and a shard's jobs: every N-th row, so that long and short parts of a table are
    spread; equal rows are one, and fall into one shard."""
    if shard is None:
        return "", jobs
    number, of = shard
    places = {key: place for place, key in enumerate(dict.fromkeys(job.key for job in jobs))}
    return f"-{number}-of-{of}", [job for job in jobs if places[job.key] % of == number - 1]


def _engine(args: argparse.Namespace, settings: dict[str, Any], rows: int) -> Engine:
    if args.ray is None:
        return Local(settings)
    from .on_ray import OnRay

    return OnRay(settings, args.ray, args.workers, rows)
