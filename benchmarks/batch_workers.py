"""What a second worker brings to a batch on one machine: `batch --ray --workers 1` and `--workers 2` in turn.

    python3 tools/host.py bench batch_workers [--rows 12] [--steps 40] [--rounds 3] [--workers 1 2] [--json]

Each run trains the same small rows on the tiny model. "seconds" is the whole command with the start of Ray and of the
workers, "rows_a_minute" counts from the first row that ended, and so a warm cluster. Medians. On a CPU the workers
share the cores, so set OMP_NUM_THREADS=1 and leave the machine alone: a figure of a busy machine says nothing. On GPUs
each worker has a card; nothing here stands for that.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _printing import show

TOOL = Path(__file__).resolve().parents[1] / "tools" / "host.py"


def write_table(folder: Path, rows: int, steps: int) -> Path:
    """A table of so many different trainings."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "subject.png")
    lines = [f"tiny,subject.png,heart,tlora,4,2,{steps},0.01,{seed}" for seed in range(rows)]
    table = folder / "jobs.csv"
    table.write_text("\n".join(["model,image,class_word,method,rank,min_rank,steps,learning_rate,seed", *lines]))
    return table


def run(table: Path, out: Path, workers: int) -> dict:
    """One batch: its seconds, and its rows a minute once one has ended."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(TOOL), "batch", str(table), "--out", str(out), "--ray", "--workers", str(workers)]
    began = time.monotonic()
    subprocess.run(command, env={**environment, "RAY_ADDRESS": "local"}, check=True, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    ends = sorted(path.stat().st_mtime for path in out.glob("*/row.json"))
    return {"seconds": seconds, "rows_a_minute": 60 * (len(ends) - 1) / (ends[-1] - ends[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    measured: dict[int, list[dict]] = {workers: [] for workers in args.workers}
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder), args.rows, args.steps)
        for number in range(args.rounds):
            for workers in args.workers:
                measured[workers].append(run(table, Path(folder, f"out_{number}_{workers}"), workers))
    medians = {
        workers: {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        for workers, runs in measured.items()
    }
    first = medians[args.workers[0]]
    rows = [
        {
            "workers": workers,
            **{name: round(value, 1) for name, value in median.items()},
            "to_first": round(median["rows_a_minute"] / first["rows_a_minute"], 2),
        }
        for workers, median in medians.items()
    ]
    show(rows, args.json, rows_of_the_table=args.rows, steps=args.steps, rounds=args.rounds)


if __name__ == "__main__":
    main()
