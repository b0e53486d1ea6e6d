"""Records of the evidence benchmark for tests, small and made by hand."""

import sys
from dataclasses import asdict

from places import REPO

sys.path.append(str(REPO / "benchmarks"))
from evidence import analysis, study  # noqa: E402


def record(concept="olive heart", seed=0, method="lora", step=100, distance=0.2, right=1.0, copied=0, **changes):
    """A record as `run` writes it: two neutral pictures, and ten that ask for a background. `copied` of all twelve are
    at the training picture's place, and `right` of the ten show their background."""
    cell = study.Cell(concept, seed, method, learning_rate=1e-3, steps=(100, 200), **changes)
    rows = [
        {
            "kind": "neutral",
            "asked": {},
            "seen": {"background": "beach" if x < 0 else "snow"},
            "distance": distance,
            "pose": [x, 0.0, 0.5, 0.0],
        }
        for x in (-0.1, 0.3)
    ]
    for i in range(10):
        background = "night" if i < 10 * right else "beach"
        rows.append({"kind": "background", "asked": {"background": "night"}, "seen": {"background": background}})
    for i, row in enumerate(rows):
        row["seen"]["place"] = "left" if i < copied else "right"
    control = [{"asked": {"colour": "red"}, "seen": {"colour": "red"}}]
    return {
        "cell": asdict(cell),
        "training": {"background": "beach", "place": "left"},
        "step": step,
        "rows": rows,
        "control": control,
        "commit": "abc",
        **({"ceiling": 0.1} if method == "none" else {"effective_rank_B": [3, 5]}),
    }


def run_of(method, ts, concept="olive heart", seed=0, **changes):
    """IS 0.5 at step 100 and 1 at step 200, with these TS."""
    return [
        record(concept, seed, method, 100, 0.2, ts[0], **changes),
        record(concept, seed, method, 200, 0.1, ts[1], **changes),
    ]


def base(concept="olive heart", seed=0, distance=0.3, **changes):
    return record(concept, seed, "none", 0, distance, 1.0, **changes)


def three_concepts(ours, others):
    records = []
    for i, concept in enumerate(("olive heart", "navy moon", "tan cross")):
        records += [
            base(concept),
            *run_of("tlora", (ours[i], ours[i]), concept),
            *run_of("lora", (others[i], others[i]), concept, min_share=1.0),
        ]
    return analysis.points(records)
