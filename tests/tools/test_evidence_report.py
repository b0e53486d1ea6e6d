"""From the evidence benchmark's records to figures: comparison at equal IS, intervals, claims and the report."""

import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from places import REPO

sys.path.append(str(REPO / "benchmarks"))
from evidence import analysis, claims, plots, record_files, report, run, sections, sheets, study, tables, verdicts  # noqa: E402


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


def test_what_a_scorer_reads_badly_on_a_concept_is_counted_for_no_figure_of_it(tmp_path):
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


def test_a_training_that_was_broken_off_is_in_no_figure(tmp_path):
    (tmp_path / "scorers.json").write_text(json.dumps({"attributes": {}}))
    broken = record(method="tlora")
    (tmp_path / "pilot.jsonl").write_text("\n".join(map(json.dumps, [base(), *run_of("lora", (1, 1)), broken])) + "\n")
    name, given = report.largest(tmp_path)
    assert name == "pilot" and [(p.cell.method, p.step) for p in given] == [("none", 0), ("lora", 100), ("lora", 200)]


def test_what_is_past_the_lowest_level_at_its_first_checkpoint_is_drawn_before_it():
    scale = replace(study.SCALES["full"], steps=(100, 200))
    fast, slow = run_of("lora", (1, 1)), [record(method="tlora", distance=0.27), record(method="tlora", step=200)]
    early = record(step=100)
    early["cell"]["steps"] = [50, 100]
    (cell,) = analysis.past_at_first(analysis.points([base(), *fast, *slow, early]), scale)
    assert cell.method == "lora" and study.drawn_earlier(cell) == replace(cell, steps=(25, 50))


def test_what_has_not_learnt_the_concept_by_its_last_checkpoint_is_gone_on_with():
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
    slower = claims.gain(given, claims._SLOW_LORA, claims._LORA)
    assert slower.sound == {("olive heart", 0): pytest.approx(-0.3)}


def test_records_from_before_a_field_of_cells_was_thought_of_count_as_done():
    old = record(method="tlora")
    del old["cell"]["base"]
    old["cell"]["steps"] = [100]
    assert run.steps_done([old]) == {study.Cell("olive heart", 0, "tlora", learning_rate=1e-3, steps=(100,)).key: {100}}


def test_values_are_taken_where_the_training_first_reaches_the_likeness():
    lines = analysis.curves(analysis.points([base(), *run_of("lora", (0.8, 0.4))]), lambda cell: cell.method)["lora"]
    line = lines["olive heart", 0]
    at = {level: analysis.value_at(line, level, lambda p: p.ts) for level in (0.25, 0.5, 0.75, 1.01)}
    assert [at[0.25], at[0.5], at[0.75]] == pytest.approx([0.9, 0.8, 0.6]) and at[1.01] is None


def test_a_training_gone_on_with_is_one_line():
    short, longer = run_of("lora", (0.8, 0.8)), run_of("lora", (0.4, 0.4))
    for r in longer:
        r["cell"]["steps"], r["step"] = [300, 400], r["step"] + 200
    short[1]["rows"][0]["distance"] = short[1]["rows"][1]["distance"] = 0.2
    lines = analysis.curves(analysis.points([*longer, base(), *short]), lambda cell: cell.method)["lora"]
    (line,) = lines.values()
    assert [p.step for p in line] == [0, 100, 200, 300, 400] and line[-1].is_ == pytest.approx(1)
    assert analysis.value_at(line, 0.75, lambda p: p.ts) == pytest.approx(0.4), "reached in the second half only"


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


def three_concepts(ours, others):
    records = []
    for i, concept in enumerate(("olive heart", "navy moon", "tan cross")):
        records += [
            base(concept),
            *run_of("tlora", (ours[i], ours[i]), concept),
            *run_of("lora", (others[i], others[i]), concept, min_share=1.0),
        ]
    return analysis.points(records)


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


def test_concepts_that_never_reach_the_likeness_are_told_from_those_not_trained(monkeypatch):
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


def test_likeness_in_the_end_is_compared_after_the_last_step_of_both(monkeypatch):
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


def test_what_is_damaged_at_a_compared_level_is_not_compared(monkeypatch):
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


def test_each_likeness_by_itself_counts_what_the_gate_leaves_out(monkeypatch):
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


def test_what_the_likeness_made_one_think_is_judged_by_fresh_trainings_alone(monkeypatch):
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


def test_each_row_is_compared_with_the_one_that_differs_only_in_what_the_table_is_about():
    cells = {
        cell
        for name in study.STUDIES
        if name != "rates"
        for cell in study.cells_of([name], study.SCALES["miniature"], study.usual_rates())
    }
    made = [analysis.Point(cell, 1, 0.5, 1, {}, 0, 0, 0, 1, None, {}) for cell in cells]
    wanted = {
        "methods": {"svdiff": "lora", "tlora": "lora"},
        "table1": {"tlora, rank 8": "lora, rank 8"},
        "table4": {"tlora, images 3": "lora, images 1"},
        "figure2": {"t/T 0.5 to 0.8": "t/T 0 to 1"},
        "table5": {"lora, rank 32, t up to 0.5": "lora, rank 32", "vanilla_tlora, rank 4, r_min 50%": "lora, rank 4"},
        "figure5": {"middle_weight, rank 4": "last_random, rank 4"},
        "figure6": {"r_min 100%": "r_min 50%", "r_min 0%": "r_min 50%"},
        "published": {"last_random_published": "last_random"},
        "curves": {"rising": "alpha 1", "alpha 0.5": "alpha 1"},
        "paces": {"tlora, 2 times its rate": "lora, 0.5 times its rate", "lora": "lora, 0.5 times its rate"},
    }
    for table in tables.TABLES:
        lines = analysis.curves(made, table.variant)
        others = {name: table.other(units) for name, units in lines.items()}
        assert others.items() >= wanted[table.name].items() and set(others.values()) <= set(lines), table.name
        assert sections.in_order(lines).keys() == lines.keys()
    assert len(tables.TABLES) == len(wanted)


def test_gate_sees_reproduction_and_damage():
    good, broken = run_of("lora", (1, 1)), run_of("lora", (1, 1), concept="tan cross")
    for r in broken:
        r["control"] = [{"asked": {"colour": "red"}, "seen": {"colour": "blue"}}]
    never = [base("navy moon"), record("navy moon", distance=0.29)]
    lines = analysis.curves(
        analysis.points([base(), base("tan cross"), *good, *broken, *never]), lambda cell: cell.method
    )["lora"]
    assert analysis.gate(lines) == pytest.approx({"reproduced": 2 / 3, "undamaged": 1 / 2})


def test_rate_is_chosen_that_reproduces_without_damage_and_obeys_best(monkeypatch):
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


def test_records_of_a_killed_run_are_read_and_its_half_line_dropped(tmp_path):
    file = tmp_path / "full.jsonl"
    file.write_text(json.dumps(base()) + "\n" + json.dumps(record())[:50])
    assert len(record_files.read(file)) == 1
    file.write_text("{broken\n" + json.dumps(base()) + "\n")
    with pytest.raises(json.JSONDecodeError):
        record_files.read(file)


def test_records_read_the_same_before_and_after_they_are_packed(tmp_path):
    for steps, half_line in ((range(3), '{"step": 3'), (range(3, 5), "")):
        for name in ("full", "full-1of2"):
            with (tmp_path / f"{name}.jsonl").open("a") as file:
                file.write("".join(json.dumps({"step": step, "in": name}) + "\n" for step in steps) + half_line)
        before = record_files.read(*record_files.files_of(tmp_path, "full"))
        record_files.pack(tmp_path)
        assert record_files.read(*record_files.files_of(tmp_path, "full")) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["full-1of2.jsonl.xz", "full.jsonl.xz"]
    assert before == [{"step": step, "in": name} for name in ("full-1of2", "full") for step in range(5)]
    (tmp_path / "full.jsonl").write_text(json.dumps({"step": 5}) + "\n")
    assert record_files.files_of(tmp_path, "sweep") == [] and len(record_files.files_of(tmp_path)) == 2
    assert record_files.read(tmp_path / "full.jsonl")[-2:] == [before[-1], {"step": 5}]


def test_report_says_what_was_run_and_what_was_not(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "scorers.json").write_text((study.RESULTS / "scorers.json").read_text())
    report.write(tmp_path / "results", tmp_path)
    assert "Not run yet" in (tmp_path / "EVIDENCE.md").read_text()
    lines = [base(), *run_of("lora", (0.8, 0.4), min_share=1.0), *run_of("tlora", (0.9, 0.7))]
    (tmp_path / "results" / "pilot.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    report.write(tmp_path / "results", tmp_path)
    text = (tmp_path / "EVIDENCE.md").read_text()
    assert "2 trainings with 4 measured steps" in text
    assert "measured after 40, 80, 120, 180, 260 steps, and trainings that learn too fast" in text
    assert "or too slowly for these also after 100, 200." in text
    assert (
        "scale `pilot`" in text
        and "| tlora | 1 | 100% |" in text
        and "0.060 (n = 1)" in text
        and "(1 of 1 concept can be compared)" in text
    )
    assert (tmp_path / "evidence" / "methods.png").stat().st_size > 5000
    assert "Table 1" not in text.split("claims")[0], "a table of one rank says nothing of ranks"


def test_report_begins_with_what_is_settled_and_draws_its_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "FEWEST", 3)
    monkeypatch.setattr(report, "measured", lambda results, scale: three_concepts((0.9, 0.8, 0.9), (0.5, 0.6, 0.5)))
    drawn, save = {}, plots._save
    monkeypatch.setattr(
        plots, "_save", lambda figure, file: (drawn.update({file.stem: figure.axes[0]}), save(figure, file))
    )
    (tmp_path / "scorers.json").write_text((study.RESULTS / "scorers.json").read_text())
    report.write(tmp_path, tmp_path)
    given = three_concepts((0.9, 0.8, 0.9), (0.5, 0.6, 0.5))
    short, others = (
        (tmp_path / "EVIDENCE.md").read_text().split("## ")[1],
        len(claims.of_paper(given) + claims.of_the_end(given)) - 1,
    )
    assert short.startswith("In short") and f": 1 confirmed, {others} not tested." in short
    assert "Confirmed: Tables 1, 2: T-LoRA follows prompts better than LoRA (rank 32)." in short
    axes, claim = drawn["claims"], claims.of_paper(given)[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [claim.text]
    interval, mean, _ = axes.lines
    assert list(interval.get_xdata()) == [claim.found.low, claim.found.high] and list(mean.get_xdata()) == [
        claim.found.mean
    ]
    assert interval.get_color() == "C2" and {path.name for path in (tmp_path / "evidence").glob("c*.png")} == {
        "claims.png",
        "copying.png",
    }
    bars = [line for line in drawn["likeness"].lines if len(line.get_xdata()) == 2 and line.get_color() == "C0"]
    rows = [
        row
        for row in claims.by_likeness(report.measured(tmp_path, "full"), verdicts.HIGHER)
        if row.text == "T-LoRA - LoRA"
    ]
    assert [list(bar.get_ydata()) for bar in bars] == [[row.ts.low, row.ts.high] for row in rows] and len(rows) == 4


def test_report_shows_the_sheets_of_two_trainings_where_they_are(tmp_path):
    from PIL import Image

    assert sheets.samples(tmp_path, tmp_path) == ""
    scale, rates = study.SCALES["full"], study.chosen_rates()
    cells = study.main_methods(scale, rates)
    for concept in ("teal flower", "navy moon"):
        for method, colour_ in (("lora", "red"), ("tlora", "blue")):
            path = run.sheet_path(
                tmp_path / "sheets",
                study.meaningful(next(c for c in cells if (c.concept, c.method) == (concept, method))),
            )
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (32, 20), colour_).save(path)
    text = sheets.samples(tmp_path, tmp_path)
    assert "*a photo of a sks flower*" in text and "Other concepts: [navy moon](evidence/navy_moon.webp)." in text
    for path in (tmp_path / "sheets").iterdir():
        path.unlink()
    assert sheets.samples(tmp_path, tmp_path) == text, "an earlier report's sheets stay"
    whole = Image.open(tmp_path / "teal_flower.webp")
    assert whole.size == (32, 56)
    (red, _, _), (_, _, blue) = whole.getpixel((5, 5)), whole.getpixel((5, 50))
    assert red > 200 < blue
