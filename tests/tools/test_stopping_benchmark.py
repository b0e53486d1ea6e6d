"""The benchmark of the stopping rule: a training in miniature, and its section in the evidence."""

import json
from dataclasses import asdict

import pytest
import torch
from evidence_records import base, record

from evidence import report, run, stopped, stopping_report  # isort: skip  (evidence_records makes it importable)
from tlora_core.reports.live_scores import PictureScores, StepScores

COPY = PictureScores(likeness=1.0, obedience=0.0, copying=1.0)


def live(step, likeness):
    pictures = [[PictureScores(likeness, 0.8, None)] * 2, [PictureScores(None, 0.8, 0.2)] * 2]
    return StepScores.of(step, pictures, COPY)


def unit(concept="olive heart", seed=0, weights="abc"):
    """The rule keeps step 200, where the truth is IS 0.5 and TS 0.8; step 300 is IS 1 and TS 0.8 without copying."""
    truth = [base(concept, seed)] + [
        record(concept, seed, "tlora", step, distance, right)
        for step, distance, right in ((100, 0.3, 1.0), (200, 0.2, 0.8), (300, 0.1, 0.8))
    ]
    checkpoints = [
        stopped.Checkpoint(live(step, likeness), one)
        for step, likeness, one in zip((0, 100, 200, 300), (0.5, 0.6, 0.9, 0.9), truth)
    ]
    return stopped.Unit(concept, seed, (100, 200, 300), weights=weights), checkpoints


def written(folder, units):
    (folder / "scorers.json").write_text(json.dumps({"pictures": 100, "attributes": {}, "matcher": {}}))
    with (folder / stopped.FILE).open("a") as out:
        for one, checkpoints in units:
            kept = [{"live": c.live.to_json(), "record": c.record} for c in checkpoints]
            out.write(json.dumps({"unit": asdict(one), "checkpoints": kept, "commit": "x"}) + "\n")


def test_trade_off_is_of_what_is_learnt_obeyed_and_not_copied():
    from evidence.analysis import points

    bare, copies, obeys = points(
        [base(), record(method="tlora", distance=0.2, right=0.8, copied=6), record(method="tlora", distance=0.1)]
    )
    # Half of the pictures are at the training picture's place, and all left open but no more have its background.
    assert stopping_report.trade_off(copies, bare) == pytest.approx((0.5 * 0.8 * 0.75) ** (1 / 3))
    assert stopping_report.trade_off(obeys, bare) == pytest.approx(1) and stopping_report.trade_off(bare, bare) == 0


def test_what_the_rule_keeps_is_judged_by_the_truth_of_that_step():
    one = stopping_report.judged(*unit(), set())
    assert [one.points[i].step for i in one.chosen.values()] == [200, 200, 300, 300]
    assert one.share(stopping_report.KEPT) == pytest.approx(0.5 ** (1 / 3))
    assert one.share(stopping_report.AFTERWARDS) == one.share(stopping_report.FIXED) == 1


def test_the_rule_sees_as_many_pictures_of_each_prompt_as_asked():
    def told(step, first, later):
        neutral = [PictureScores(value, 0.8, None) for value in (first, later, later)]
        return StepScores.of(step, [neutral, [PictureScores(None, 0.8, 0.2)]], COPY)

    scores = zip((0, 100, 200, 300), (0.5, 0.6, 0.9, 0.9), (0.5, 0.9, 0.5, 0.5))
    one, checkpoints = unit()
    checkpoints = [stopped.Checkpoint(told(*each), kept.record) for each, kept in zip(scores, checkpoints)]
    kept = [stopping_report.judged(one, checkpoints, set(), n).chosen[stopping_report.KEPT] for n in (1, 3)]
    assert kept == [2, 1]


def test_the_defaults_that_are_judged_are_the_train_nodes(comfy):
    from tlora_core.hosts.comfy.training.keeping import Keeping

    assert (stopping_report.PATIENCE, stopping_report.SCORE_SEEDS) == (Keeping.patience, Keeping.score_seeds)


def test_stopped_past_it_ends_after_so_many_validations_without_gain():
    steps = tuple(range(100, 800, 100))
    likeness = (0.5, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9, 1.0)  # it would have gained once more
    truth = [base(), *(record(method="tlora", step=step) for step in steps)]
    checkpoints = [stopped.Checkpoint(live(r["step"], at), r) for r, at in zip(truth, likeness)]
    one = stopping_report.judged(stopped.Unit("olive heart", 0, steps), checkpoints, set())
    kept = [one.points[one.chosen[way]].step for way in (stopping_report.KEPT, stopping_report.STOPPED)]
    assert kept == [700, 200] and one.points[one.ended].step == 500


def test_median_is_over_concepts_and_needs_six_for_an_interval():
    few = {("a", 0): 0.5, ("a", 1): 0.7, ("b", 0): 1.0, ("c", 0): 0.9}
    found = stopping_report.median(few)
    assert (found.mean, found.low, found.units, found.concepts) == (0.9, None, 4, 3)
    many = stopping_report.median({(str(i), 0): 0.9 + i / 100 for i in range(9)})
    assert many.mean == pytest.approx(0.94) and many.low < 0.94 < many.high


def test_section_is_of_the_weights_measured_last_and_says_whether_the_target_is_reached(tmp_path):
    assert stopping_report.section(tmp_path) == ""
    written(tmp_path, [unit(weights="old"), unit(), unit("navy moon")])
    text = stopping_report.section(tmp_path)
    assert "trained 2 T-LoRAs of 2 concepts" in text and "No verdict: it needs trainings of 6 concepts" in text
    assert "| rule, best of all | 200 | 300 | 0.500" in text and "0.794 (n = 2)" in text
    others = ("tan cross", "teal flower", "maroon star", "lime circle")
    written(tmp_path, [unit(concept) for concept in others])
    text = stopping_report.section(tmp_path)
    assert "keeps 0.794 [0.794, 0.794] of the best trade-off, which misses the target of 0.95" in text
    assert "in the median over the single trainings it keeps 0.794" in text


def test_section_shows_how_the_rules_numbers_were_chosen(tmp_path):
    written(tmp_path, [unit()])
    assert "made-up objects" not in stopping_report.section(tmp_path)
    (tmp_path / stopped.FILE).rename(tmp_path / stopped.MADE_UP_FILE)
    written(tmp_path, [unit()])
    text = stopping_report.section(tmp_path)
    assert "chosen on 1 trainings of made-up objects" in text
    # Whatever the numbers, the rule keeps step 200 of the best, 300; see `unit`.
    assert f"| 0 | 0.02 | {3 * '0.794 | '}".strip() in text


def test_a_tolerance_larger_than_the_gain_keeps_the_step_before():
    one, checkpoints = unit()
    truth = stopping_report.judged(one, checkpoints, set()).trade_offs
    shares = [stopping_report._mean_share([(checkpoints, truth)], 2, tolerance, 0.0) for tolerance in (0.02, 1.0)]
    assert shares == pytest.approx([truth[2] / truth[3], 1])  # none is better than the first: the last


def test_made_up_concepts_are_none_of_the_worlds():
    concepts = run.made_up_concepts()
    names = {concept.name for concept in concepts}
    assert len(names) == len(concepts) == 14 and not names & {c.name for c in run.world.CONCEPTS}
    assert run.concept_named("dev 3") == concepts[3] and run.concept_named("dev 3").shape == "cross"


def test_report_has_the_section(tmp_path, monkeypatch):
    monkeypatch.setattr(report.stopping_report, "section", lambda results: "## When to stop\n\nHere.")
    report.write(tmp_path, tmp_path)
    assert "## When to stop" in (tmp_path / "EVIDENCE.md").read_text()


def test_live_prompts_are_not_those_of_the_truth_and_each_comes_with_its_seeds():
    from evidence.prompts import settings

    concept = run.concept_named("olive heart")
    made = stopped.live_prompts(concept, 0, settings(concept, 0)[0])
    assert [of_prompt[0].kind for of_prompt in made] == ["neutral", "background", "appearance", "place"]
    for of_prompt in made:
        assert [p.seed for p in of_prompt] == [100, 101, 102, 103] and len({p.text for p in of_prompt}) == 1


@pytest.fixture(scope="module")
def bench(comfy):
    import tiny_gate

    with torch.inference_mode():
        yield run.Bench(tiny_gate.WEIGHTS)


def test_a_training_in_miniature_is_measured_and_not_trained_again(bench, tmp_path):
    file, said = tmp_path / stopped.FILE, []
    wanted = stopped.units(["olive heart"], [0], (1, 2))
    with torch.inference_mode():
        stopped.run_units(bench, wanted, file, said.append, rate=1e-3)
        [(unit, checkpoints)] = stopped.load(file)
        stopped.run_units(bench, wanted, file, said.append, rate=1e-3)
    assert said[-1] == "1 of 1 trainings are done." and len(stopped.load(file)) == 1
    assert unit == wanted[0] and unit.weights == stopped.weights_digest()
    assert [one.live.step for one in checkpoints] == [one.record["step"] for one in checkpoints] == [0, 1, 2]
    assert [len(of_prompt) for of_prompt in checkpoints[0].live.pictures] == [4, 4, 4, 4]
    assert checkpoints[0].live != checkpoints[1].live, "the T-LoRA changes the pictures"
    judged = stopping_report.judged(unit, checkpoints, set())
    assert judged.trade_offs[0] == 0 and all(0 <= value <= 1 for value in judged.trade_offs)
