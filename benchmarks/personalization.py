"""Does T-LoRA do what its paper says? The paper's tables and figures, on the tiny base and its world.

    python3 tools/host.py bench personalization rates                     # learning rates, swept per method
    python3 tools/host.py bench personalization choose-rates
    python3 tools/host.py bench personalization table1 table2 figure6     # or "all"
    python3 tools/host.py bench personalization earlier                   # what learns too fast for its first checkpoint, drawn before it
    python3 tools/host.py bench personalization check-scorers             # their accuracy, into the report
    python3 tools/host.py bench personalization when-decided              # down to which noise level prompts are followed
    python3 tools/host.py bench personalization report                    # docs/EVIDENCE.md and its plots

A run that was stopped goes on where it was. --scale sweep, pilot, quick or miniature runs less; --quick is the study `methods`
of one concept, with usual learning rates instead of swept ones. --seeds 1 trains each concept once. --part 2/8 takes every eighth
cell, for eight processes side by side.
Results: benchmarks/results/*.jsonl.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]


def check_scorers(file):
    import tiny_gate
    import torch
    tiny_gate.parse_host_arguments()
    from evidence import validation

    from tlora_core.comfy_host import tiny_base
    with torch.inference_mode():
        vae = tiny_base.load(str(tiny_gate.WEIGHTS / "tiny_base.safetensors"))[2]
        found = validation.validate(tiny_gate.load_scorer(), lambda pictures: vae.decode(vae.encode(pictures)))
    file.write_text(json.dumps(found, indent=2) + "\n")
    print(file.read_text())


def when_decided(file):
    import tiny_gate
    import torch
    tiny_gate.parse_host_arguments()
    from evidence import decided
    from evidence.run import Bench
    with torch.inference_mode():
        file.write_text(json.dumps(decided.measure(Bench(tiny_gate.WEIGHTS)), indent=2) + "\n")
    print(file.read_text())


def earlier(results, name):
    """Those trainings among the results that learn too fast for the first checkpoint, to be drawn before it."""
    from evidence import analysis, report, study
    scale = study.SCALES[name]
    return [study.drawn_earlier(cell) for cell in analysis.past_at_first(report.measured(results, name), scale)]


def main():
    from evidence import analysis, report
    from evidence.study import RATES, RESULTS, SCALES, STUDIES, cells_of, chosen_rates, usual_rates
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["methods"], metavar="STUDY",
                        help=f"{', '.join(STUDIES)}; all; earlier; choose-rates; check-scorers; when-decided; report (methods)")
    parser.add_argument("--scale", choices=SCALES, help="how much of it (full; of the study rates: sweep)")
    parser.add_argument("--quick", action="store_true", help="the same as --scale quick")
    parser.add_argument("--seeds", type=int, help="only the first so many trainings of each concept")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only every N-th cell, from the I-th")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if args.what == ["report"]:
        report.write(args.results, ROOT / "docs")
        return
    if args.what == ["choose-rates"]:
        chosen = analysis.choose_rates(analysis.load_sweep(args.results))
        RATES.write_text(json.dumps(chosen, indent=2) + "\n")
        print(RATES.read_text())
        return
    if args.what == ["check-scorers"]:
        check_scorers(args.results / "scorers.json")
        return
    if args.what == ["when-decided"]:
        when_decided(args.results / "decided.json")
        return
    names = [name for name in STUDIES if name != "rates"] if args.what == ["all"] else [] if args.what == ["earlier"] else args.what
    if unknown := set(names) - STUDIES.keys():
        parser.error(f"there is no study {', '.join(sorted(unknown))}; choose of {', '.join(STUDIES)}")
    name = "quick" if args.quick else args.scale or ("sweep" if names == ["rates"] else "full")
    part, of = (int(number) for number in args.part.split("/"))
    rates = usual_rates() if name in ("quick", "miniature") else {} if names == ["rates"] else chosen_rates()
    scale = replace(SCALES[name], seeds=SCALES[name].seeds[:args.seeds])
    cells = earlier(args.results, name) if args.what == ["earlier"] else cells_of(names, scale, rates)
    import tiny_gate
    import torch
    tiny_gate.parse_host_arguments(args.device)
    from evidence.run import Bench, run
    file = args.results / (f"{name}.jsonl" if of == 1 else f"{name}-{part}of{of}.jsonl")
    others = [path for path in args.results.glob(f"{name}*.jsonl") if path != file]
    with torch.inference_mode():
        run(Bench(tiny_gate.WEIGHTS), cells[part - 1::of], file, lambda line: print(line, file=sys.stderr, flush=True), others)


if __name__ == "__main__":
    main()
