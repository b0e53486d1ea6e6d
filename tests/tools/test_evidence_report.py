"""The evidence benchmark's record files and report."""

import json
import sys

import pytest
from places import REPO

sys.path.append(str(REPO / "benchmarks"))
from evidence import analysis, claims, plots, record_files, report, run, sections, sheets, study, tables, verdicts  # noqa: E402
from evidence_records import base, record, run_of, three_concepts


def test_a_training_that_was_broken_off_is_in_no_figure(tmp_path):
    (tmp_path / "scorers.json").write_text(json.dumps({"attributes": {}}))
    broken = record(method="tlora")
    (tmp_path / "pilot.jsonl").write_text("\n".join(map(json.dumps, [base(), *run_of("lora", (1, 1)), broken])) + "\n")
    name, given = report.largest(tmp_path)
    assert name == "pilot" and [(p.cell.method, p.step) for p in given] == [("none", 0), ("lora", 100), ("lora", 200)]


def test_each_row_is_compared_with_the_row_that_differs_only_in_the_tables_subject():
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
