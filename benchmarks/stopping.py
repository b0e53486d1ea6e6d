"""Does the stopping rule find the step to keep? Trainings on the tiny base with live scores, and the truth beside them.

    python3 tools/host.py bench stopping                    # the ten concepts of the evidence, three seeds each
    python3 tools/host.py bench stopping --seeds 1          # one seed each
    python3 tools/host.py bench stopping --made-up          # other objects, on which the rule's numbers were chosen
    python3 tools/host.py bench personalization report      # the tables, in docs/EVIDENCE.md

A stopped run resumes where it was. The results are in benchmarks/results/stopping.jsonl. Trainings of other weights of
the tiny base stay in it, but only those of the present ones are reported.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each concept (3)")
    parser.add_argument("--made-up", action="store_true", help="made-up objects, one seed each")
    parser.add_argument("--miniature", action="store_true", help="one short training, to try the benchmark")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    args = parser.parse_args()
    sys.argv = sys.argv[:1]
    from evidence import stopped
    from evidence.run import made_up_concepts
    from evidence.study import SCALES

    bench = stopped.prepared()
    import torch

    concepts = SCALES["full"].concepts
    wanted = stopped.units(concepts, range(args.seeds))
    file = stopped.FILE
    if args.made_up:
        wanted, file = stopped.units([c.name for c in made_up_concepts()], range(1)), stopped.MADE_UP_FILE
    elif args.miniature:
        wanted = stopped.units(concepts[2:3], range(1), (1, 2))
    with torch.inference_mode():
        stopped.run_units(bench, wanted, args.results / file, lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    main()
