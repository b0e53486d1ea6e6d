"""The evidence benchmark's intervals, and its verdicts on the paper's claims."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from places import REPO

sys.path.append(str(REPO / "benchmarks"))
from evidence import analysis, claims  # noqa: E402
from evidence_records import base, record, run_of, three_concepts


def test_interval_is_over_concepts_and_needs_six_of_them():
    assert analysis.estimate({}) is None
    values = {(concept, seed): i / 10 + seed / 5 for i, concept in enumerate("abcdef") for seed in (0, 1)}
    five = analysis.estimate({unit: value for unit, value in values.items() if unit[0] != "f"})
    assert five.mean == pytest.approx(0.3) and five.low is None and (five.units, five.concepts) == (10, 5)
    six = analysis.estimate(values)
    assert six.mean == pytest.approx(0.35) and 0 <= six.low < 0.2 and 0.5 < six.high <= 0.7
    wide, narrow = ({(str(i), s): float(i % 2) for i in range(n) for s in (0, 1)} for n in (8, 40))
    width = lambda e: e.high - e.low  # noqa: E731
    assert width(analysis.estimate(narrow)) < width(analysis.estimate(wide)) / 2


@pytest.mark.parametrize("concepts", [6, 10])
def test_interval_holds_the_true_mean_nearly_as_often_as_it_says(concepts):
    rng = np.random.default_rng(0)
    found = [
        analysis.estimate({(str(i), 0): value for i, value in enumerate(rng.normal(size=concepts))}) for _ in range(400)
    ]
    assert 0.91 < np.mean([e.low <= 0 <= e.high for e in found]) < 0.98


@pytest.mark.parametrize(
    "ours, others, verdict",
    [
        ((0.9, 0.9, 0.8), (0.5, 0.6, 0.5), "confirmed"),
        ((0.5, 0.6, 0.5), (0.9, 0.9, 0.8), "contradicted"),
        ((0.9, 0.5, 0.7), (0.5, 0.9, 0.6), "not separable"),
    ],
)
def test_claims_are_judged_by_their_interval(monkeypatch, ours, others, verdict):
    made = three_concepts(ours, others)
    assert claims.of_paper(made)[0].verdict == "no verdict (3 of 3 concepts can be compared)"
    monkeypatch.setattr(analysis, "FEWEST", 3)
    judged = claims.of_paper(made)
    assert judged[0].verdict == verdict and "3 units of 3 concepts" in judged[0].figures
    assert {c.verdict for c in judged[1:]} == {"not tested"} and {c.verdict for c in claims.of_copying(made)} == {
        "not tested",
        "not separable",
    }


def test_concepts_that_never_reach_the_likeness_are_distinguished_from_untrained_concepts(monkeypatch):
    monkeypatch.setattr(analysis, "FEWEST", 3)
    made = [
        p
        for p in three_concepts((0.9, 0.9, 0.8), (0.5, 0.6, 0.5))
        if (p.cell.concept, p.cell.method, p.step) not in {("tan cross", "lora", step) for step in (100, 200)}
    ]
    assert claims.of_paper(made)[0].verdict == "no verdict (2 of 2 concepts can be compared)"
    made += [
        replace(p, is_=0.1)
        for p in three_concepts((1, 1, 1), (1, 1, 1))
        if (p.cell.concept, p.cell.method) == ("tan cross", "lora")
    ]
    assert claims.of_paper(made)[0].verdict == "no verdict (2 of 3 concepts can be compared)"


def test_final_likeness_is_compared_after_the_last_step_of_both(monkeypatch):
    monkeypatch.setattr(analysis, "FEWEST", 2)
    records = []
    for concept in ("olive heart", "tan cross"):
        records += [
            base(concept),
            *run_of("lora", (1, 1), concept, min_share=1.0),
            record(concept, step=100, distance=0.25, min_share=1.0, noise_to=0.5),
        ]
    (less,) = [c for c in claims.of_the_end(analysis.points(records)) if "t < 500" in c.text]
    assert less.verdict == "confirmed" and less.figures.startswith("0.250") and "2 units" in less.figures


def test_trainings_damaged_at_a_compared_level_are_not_compared(monkeypatch):
    monkeypatch.setattr(analysis, "FEWEST", 2)
    made = three_concepts((0.9, 0.9, 0.1), (0.5, 0.6, 0.5))
    broken = [
        replace(point, control=0.7) if (point.cell.concept, point.cell.method) == ("tan cross", "tlora") else point
        for point in made
    ]
    (whole, *_), (judged, *_) = claims.of_paper(made), claims.of_paper(broken)
    assert whole.verdict == "not separable" and "3 units" in whole.figures == whole.ungated
    assert judged.verdict == "confirmed" and "2 units" in judged.figures and judged.ungated == whole.ungated


def test_copying_is_judged_by_fewer_copies_and_on_the_other_seeds_apart(monkeypatch):
    monkeypatch.setattr(analysis, "FEWEST", 3)
    records = []
    for seed, copies in ((0, 3), (1, 0)):
        for concept in ("olive heart", "navy moon", "tan cross"):
            for method, copied in (("lora", 6), ("tlora", copies)):
                changes = {"min_share": 1.0} if method == "lora" else {}
                records += [base(concept, seed), record(concept, seed, method, 200, 0.1, copied=copied, **changes)]
    place, fresh = [
        c
        for c in claims.of_copying(analysis.points(records))
        if c.text.startswith("place: T-LoRA copies it less than LoRA")
    ][:2]
    assert (
        place.verdict == fresh.verdict == "confirmed"
        and place.figures.startswith("0.112")
        and fresh.figures.startswith("0.150")
    )
    assert "without seed 0" in fresh.text and "3 units" in fresh.figures


def test_each_level_of_likeness_counts_the_units_that_the_gate_excludes(monkeypatch):
    monkeypatch.setattr(analysis, "FEWEST", 3)
    made = three_concepts((0.9, 0.8, 0.9), (0.5, 0.6, 0.5))
    broken = [replace(point, control=0.4) if point.cell.method == "lora" else point for point in made]
    assert claims.of_paper(broken)[0].found is None
    rows = {row.level: row for row in claims.by_likeness(broken, (0.5, 2)) if row.text == "T-LoRA - LoRA"}
    assert (
        rows[0.5].ts.mean == pytest.approx(1 / 3)
        and rows[0.5].ts.low > 0
        and rows[0.5].control.mean == pytest.approx(0.6)
    )
    assert rows[0.5].copied_background.mean == 0 and rows[2].ts is None


def test_claims_about_likeness_are_judged_by_fresh_trainings_only(monkeypatch):
    monkeypatch.setattr(analysis, "FEWEST", 3)
    old = three_concepts((0.9, 0.8, 0.9), (0.5, 0.6, 0.5))
    assert {claim.verdict for claim in claims.of_likeness(old)} == {"not tested"}
    fresh = [
        replace(point, cell=replace(point.cell, seed=3)) for point in three_concepts((0.5, 0.6, 0.5), (0.9, 0.8, 0.9))
    ]
    judged = claims.of_likeness([*old, *fresh])[0]
    assert judged.verdict == "contradicted" and judged.found.mean == pytest.approx(-1 / 3) and judged.found.units == 3
    assert claims.by_likeness([*old, *fresh], (0.5,)) == claims.by_likeness(old, (0.5,))


def test_gain_is_compared_with_that_at_the_lowest_rank_that_enough_concepts_reach(monkeypatch):
    monkeypatch.setattr(analysis, "FEWEST", 2)
    gains, records = {2: 0.1, 8: 0.0, 32: 0.3}, []
    for concept in ("olive heart", "tan cross"):
        records.append(base(concept))
        for rank, gain in gains.items():
            if rank == 2 and concept == "tan cross":
                continue
            records += run_of("lora", (0.5, 0.5), concept, rank=rank, min_share=1.0) + run_of(
                "tlora", (0.5 + gain, 0.5 + gain), concept, rank=rank
            )
    found = claims._gain_grows(analysis.points(records))
    assert "(8 to 32)" in found.text and found.verdict == "confirmed" and "2 units" in found.figures
    monkeypatch.setattr(analysis, "FEWEST", 3)
    found = claims._gain_grows(analysis.points(records))
    assert "(2 to 32)" in found.text and found.verdict == "no verdict (1 of 1 concept can be compared)"
