"""Does T-LoRA do what its paper says? The paper's tables and figures, on the tiny base and its world.

    python3 tools/host.py bench personalization rates                    # learning rates, swept per method
    python3 tools/host.py bench personalization choose-rates
    python3 tools/host.py bench personalization table1 table2 figure6    # or "all"
    python3 tools/host.py bench personalization earlier                  # fast trainings, measured at earlier steps
    python3 tools/host.py bench personalization later                    # slow trainings, continued
    python3 tools/host.py bench personalization preservation             # what keeps the class as it was
    python3 tools/host.py bench personalization check-scorers            # accuracy of the scorers, for the report
    python3 tools/host.py bench personalization when-decided             # noise levels down to which prompts matter
    python3 tools/host.py bench personalization report                   # docs/EVIDENCE.md and its plots
    python3 tools/host.py bench personalization pack                     # packs new records, before a commit

A stopped run resumes where it was. --scale sweep, pilot, quick or miniature runs less; --quick is the study `methods`
of one concept, with usual learning rates instead of swept ones. --seeds 1 trains each concept once. --part 2/8 takes
every eighth cell, for eight processes side by side. The results are in benchmarks/results/*.jsonl, packed ones in
*.jsonl.xz; a run reads both and appends to *.jsonl.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]


def main():
    args, parser = _arguments()
    if len(args.what) == 1 and args.what[0] in ONCE:
        ONCE[args.what[0]](args.results)
        return
    from evidence.study import STUDIES

    if args.what not in (["all"], ["earlier"], ["later"]) and (unknown := set(args.what) - STUDIES.keys()):
        parser.error(
            f"there is no study {', '.join(sorted(unknown))}; choose of {', '.join(STUDIES)}, or all, earlier or "
            f"later alone"
        )
    _study(args)


def _arguments():
    from evidence.study import RESULTS, SCALES, STUDIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        nargs="*",
        default=["methods"],
        metavar="STUDY",
        help=f"{', '.join(STUDIES)}; all; earlier; later; or one of {', '.join(ONCE)} (methods)",
    )
    parser.add_argument(
        "--scale", choices=SCALES, help="how much of it (full; of rates: sweep; of preservation: preservation)"
    )
    parser.add_argument("--quick", action="store_true", help="the same as --scale quick")
    parser.add_argument("--seeds", type=int, help="only the first so many trainings of each concept")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only every N-th cell, from the I-th")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(), parser


def _study(args):
    import tiny_gate
    import torch

    tiny_gate.parse_host_arguments(args.device)
    from evidence.record_files import files_of
    from evidence.run import Bench, run
    from evidence.study import OWN_SCALES

    own = OWN_SCALES.get(args.what[0], "full") if len(args.what) == 1 else "full"
    scale = "quick" if args.quick else args.scale or own
    part, of = (int(number) for number in args.part.split("/"))
    cells = _cells(args, scale)[part - 1 :: of]
    file = args.results / (f"{scale}.jsonl" if of == 1 else f"{scale}-{part}of{of}.jsonl")
    others = [path for path in files_of(args.results, scale) if path != file]
    with torch.inference_mode():
        run(Bench(tiny_gate.WEIGHTS), cells, file, lambda line: print(line, file=sys.stderr, flush=True), others)


def _cells(args, name):
    from evidence import analysis, report
    from evidence.study import (
        OWN_SCALES,
        SCALES,
        STUDIES,
        cells_of,
        chosen_rates,
        drawn_earlier,
        drawn_later,
        usual_rates,
    )

    if args.what == ["earlier"]:
        return [
            drawn_earlier(cell) for cell in analysis.past_at_first(report.measured(args.results, name), SCALES[name])
        ]
    if args.what == ["later"]:
        return [drawn_later(cell) for cell in analysis.not_learnt(report.measured(args.results, name), SCALES[name])]
    names = [name for name in STUDIES if name not in OWN_SCALES] if args.what == ["all"] else args.what
    rates = usual_rates() if name in ("quick", "miniature") else {} if names == ["rates"] else chosen_rates()
    return cells_of(names, replace(SCALES[name], seeds=SCALES[name].seeds[: args.seeds]), rates)


def _report(results):
    from evidence import report

    report.write(results, ROOT / "docs")


def _choose_rates(results):
    from evidence import analysis
    from evidence.study import RATES

    _write(RATES, analysis.choose_rates(analysis.load_sweep(results)))


def _pack(results):
    from evidence import record_files

    record_files.pack(results)


def _check_scorers(results):
    import tiny_gate
    import torch

    tiny_gate.parse_host_arguments()
    from evidence import validation

    from tlora_core.tiny import comfy as tiny_base

    with torch.inference_mode():
        vae = tiny_base.load(str(tiny_gate.WEIGHTS / "tiny_base.safetensors"))[2]
        found = validation.validate(tiny_gate.load_scorer(), lambda pictures: vae.decode(vae.encode(pictures)))
    _write(results / "scorers.json", found)


def _when_decided(results):
    import tiny_gate
    import torch

    tiny_gate.parse_host_arguments()
    from evidence import decided
    from evidence.run import Bench

    with torch.inference_mode():
        _write(results / "decided.json", decided.measure(Bench(tiny_gate.WEIGHTS)))


def _write(file, found):
    file.write_text(json.dumps(found, indent=2) + "\n")
    print(file.read_text())


ONCE = {
    "choose-rates": _choose_rates,
    "check-scorers": _check_scorers,
    "when-decided": _when_decided,
    "report": _report,
    "pack": _pack,
}

if __name__ == "__main__":
    main()
