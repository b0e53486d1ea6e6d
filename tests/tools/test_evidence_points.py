"""From the evidence benchmark's records to comparable figures: points, lines over steps, gate and learning rates."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from places import REPO

sys.path.append(str(REPO / "benchmarks"))
from evidence import analysis, claims, comparisons, run, study, tables  # noqa: E402
from evidence_records import base, record, run_of


def test_a_point_holds_the_papers_measures():
    point = next(
        p for p in analysis.points([base(), record(distance=0.15, right=0.7, copied=3)]) if p.cell.method == "lora"
    )
    assert (point.is_, point.ts, point.copied_place) == pytest.approx((0.75, 0.7, 0.25))
    assert point.copied_background == 0.5, "the two neutral pictures; where another one was asked for, TS says it"
    assert (
        point.spread == pytest.approx(0.2)
        and point.effective_rank == 4
        and point.by_attribute == {"background": pytest.approx(0.7)}
    )


def test_an_attribute_with_an_inaccurate_scorer_counts_in_no_figure_of_its_concept(tmp_path):
    with pytest.raises(SystemExit, match="check-scorers"):
        analysis.left_out(tmp_path)
    (tmp_path / "scorers.json").write_text(
        json.dumps({"attributes": {"background": {"olive heart": 0.94, "tan cross": 0.95}}})
    )
    assert analysis.left_out(tmp_path) == {("olive heart", "background")}
    records = [
        made
        for concept in ("olive heart", "tan cross")
        for made in (base(concept), record(concept, right=0.7, copied=3))
    ]
    for made in records:
        made["rows"].append(
            {"kind": "place", "asked": {"place": "top"}, "seen": {"place": "top", "background": "snow"}}
        )
    for kind, by_kind, copied in (
        ("olive heart", [1.0], 3 / 12),
        ("tan cross", [1.0, 0.7], 3 / 12),
    ):
        point = next(
            p
            for p in analysis.points(records, analysis.left_out(tmp_path))
            if p.cell.method == "lora" and p.cell.concept == kind
        )
        assert point.ts == pytest.approx(np.mean(by_kind)) and point.copied_place == pytest.approx(copied)


def test_flow_trainings_are_measured_from_the_flow_base_and_stand_in_no_other_table():
    made = analysis.points(
        [
            base(),
            base(base="flow", distance=0.2),
            record(distance=0.15, min_share=1.0),
            record(distance=0.15, min_share=1.0, base="flow"),
        ]
    )
    of_noise, of_flow = (p for p in made if p.cell.method == "lora")
    assert of_noise.is_ == pytest.approx(0.75) and of_flow.is_ == pytest.approx(0.5)
    for table in tables.TABLES:
        lines = analysis.curves(made, table.variant)
        found = [point for units in lines.values() for line in units.values() for point in line]
        assert all((point.cell.base == "flow") == (table.name == "table5") for point in found), table.name
    assert analysis.curves(made, tables._flow).keys() == {"lora, rank 32"}
    with pytest.raises(SystemExit, match="bare base \\(flow\\)"):
        analysis.points([base(), record(base="flow")])


def test_trainings_past_the_lowest_level_at_their_first_step_are_measured_earlier():
    scale = replace(study.SCALES["full"], steps=(100, 200))
    fast, slow = run_of("lora", (1, 1)), [record(method="tlora", distance=0.27), record(method="tlora", step=200)]
    early = record(step=100)
    early["cell"]["steps"] = [50, 100]
    (cell,) = analysis.past_at_first(analysis.points([base(), *fast, *slow, early]), scale)
    assert cell.method == "lora" and study.drawn_earlier(cell) == replace(cell, steps=(25, 50))


def test_trainings_that_have_not_learnt_the_concept_are_continued():
    scale = replace(study.SCALES["full"], steps=(100, 200))
    learnt, slow = (
        [record(distance=0.15), record(step=200, distance=0.28)],
        [record(method="tlora", step=n, distance=0.21) for n in (100, 200)],
    )
    later = record("tan cross", step=400, distance=0.25)
    later["cell"]["steps"] = [300, 400]
    (cell,) = analysis.not_learnt(analysis.points([base(), base("tan cross"), *learnt, *slow, later]), scale)
    assert cell.method == "tlora" and study.drawn_later(cell) == replace(cell, steps=(300, 400))


def test_another_pace_is_another_row_and_no_part_of_a_methods_own():
    given = analysis.points(
        [base(), *run_of("lora", (1, 1), min_share=1.0), *run_of("lora", (0.5, 0.5), min_share=1.0, pace=0.5)]
    )
    for table in tables.TABLES:
        lines = analysis.curves(given, table.variant)
        assert all(len(line) == 3 for units in lines.values() for line in units.values())
        assert ("lora, 0.5 times its rate" in lines) == (table.name == "paces"), table.name
    slower = claims.gain(given, comparisons.SLOW_LORA, comparisons.LORA)
    assert slower.sound == {("olive heart", 0): pytest.approx(-0.3)}


def test_records_from_before_a_field_of_cells_existed_count_as_done():
    old = record(method="tlora")
    del old["cell"]["base"]
    old["cell"]["steps"] = [100]
    assert run.steps_done([old]) == {study.Cell("olive heart", 0, "tlora", learning_rate=1e-3, steps=(100,)).key: {100}}


def test_values_are_taken_where_the_training_first_reaches_the_likeness():
    lines = analysis.curves(analysis.points([base(), *run_of("lora", (0.8, 0.4))]), lambda cell: cell.method)["lora"]
    line = lines["olive heart", 0]
    at = {level: analysis.value_at(line, level, lambda p: p.ts) for level in (0.25, 0.5, 0.75, 1.01)}
    assert [at[0.25], at[0.5], at[0.75]] == pytest.approx([0.9, 0.8, 0.6]) and at[1.01] is None


def test_a_continued_training_is_one_line():
    short, longer = run_of("lora", (0.8, 0.8)), run_of("lora", (0.4, 0.4))
    for r in longer:
        r["cell"]["steps"], r["step"] = [300, 400], r["step"] + 200
    short[1]["rows"][0]["distance"] = short[1]["rows"][1]["distance"] = 0.2
    lines = analysis.curves(analysis.points([*longer, base(), *short]), lambda cell: cell.method)["lora"]
    (line,) = lines.values()
    assert [p.step for p in line] == [0, 100, 200, 300, 400] and line[-1].is_ == pytest.approx(1)
    assert analysis.value_at(line, 0.75, lambda p: p.ts) == pytest.approx(0.4), "reached in the second half only"


def test_gate_sees_reproduction_and_damage():
    good, broken = run_of("lora", (1, 1)), run_of("lora", (1, 1), concept="tan cross")
    for r in broken:
        r["control"] = [{"asked": {"colour": "red"}, "seen": {"colour": "blue"}}]
    never = [base("navy moon"), record("navy moon", distance=0.29)]
    lines = analysis.curves(
        analysis.points([base(), base("tan cross"), *good, *broken, *never]), lambda cell: cell.method
    )["lora"]
    assert analysis.gate(lines) == pytest.approx({"reproduced": 2 / 3, "undamaged": 1 / 2})


def test_chosen_rate_reproduces_without_damage_and_has_the_highest_ts(monkeypatch):
    monkeypatch.setattr(analysis, "METHODS", {"lora": None})
    records = [base()]
    for rate, distance, ts in ((1e-4, 0.29, 1.0), (1e-3, 0.1, 0.8), (3e-3, 0.1, 0.5)):
        r = record(distance=distance, right=ts)
        r["cell"]["learning_rate"] = rate
        records.append(r)
    assert analysis.choose_rates(records) == {"lora": 1e-3}
    with pytest.raises(SystemExit, match="chosen for tlora"):
        study.cells_of(["methods"], study.SCALES["full"], {"lora": 1e-3, "vanilla_tlora": 1e-3, "ortho_lora": 1e-3})
    with pytest.raises(SystemExit, match="no sweep"):
        analysis.choose_rates([base()])
