"""The evidence benchmark: prompts, cells, scorers, and a run in miniature on the real host."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import REPO

sys.path.append(str(REPO / "benchmarks"))
from evidence import about, analysis, colour, decided, metrics, prompts, record_files, run, study, validation  # noqa: E402

from tlora_core.tiny import world  # noqa: E402

HEART = next(c for c in world.CONCEPTS if c.name == "olive heart")
FULL = study.SCALES["full"]


# --- what is asked ---


@pytest.mark.parametrize("seed", range(5))
def test_prompts_never_ask_for_what_the_training_picture_shows(seed):
    setting = prompts.settings(HEART, seed)[0]
    made = prompts.prompts(HEART, seed, FULL.draws, setting)
    assert all(p.asked.get("background") != setting.background and p.asked.get("place") != setting.place for p in made)
    assert {p.kind for p in made} == set(prompts.KINDS)
    assert made == prompts.prompts(HEART, seed, FULL.draws, setting)


def test_prompts_say_what_they_ask_for_in_the_worlds_words():
    for p in prompts.prompts(HEART, 0, FULL.draws, prompts.settings(HEART, 0)[0]):
        words = {"background": world.BACKGROUNDS, "place": world.PLACE_WORDS}
        assert p.text.startswith("a photo of a sks ") and all(
            words.get(k, {}).get(v, v) in p.text for k, v in p.asked.items()
        )
        assert (p.text == "a photo of a sks heart") == (p.kind == prompts.NEUTRAL) == (p.asked == {})


def test_several_training_pictures_differ_and_begin_with_the_single_one():
    one, three = prompts.settings(HEART, 1), prompts.settings(HEART, 1, 3)
    assert three[0] == one[0] and len({s.background for s in three}) == len({s.place for s in three}) == 3


def test_control_prompts_do_not_name_the_concept():
    for p in prompts.control_prompts(HEART, 0, 10):
        assert (
            "sks" not in p.text and "heart" not in p.text and set(p.asked) == {"shape", "colour", "place", "background"}
        )


# --- cells ---


def test_every_study_has_the_full_size_and_shares_trainings():
    rates = study.usual_rates()
    units = len(FULL.concepts) * len(FULL.seeds)
    assert len(FULL.concepts) >= 10 and len(FULL.seeds) >= 3
    cells = study.cells_of(["table1", "figures10-12", "methods"], FULL, rates)
    assert len(cells) == units * (1 + 3 * len(study.RANKS) + 1)  # the references; methods adds ortho_lora only
    assert len({cell.key for cell in cells}) == len(cells)
    for name in study.STUDIES:
        assert len(study.cells_of([name], study.SCALES["miniature"], rates)) > 1


def test_fresh_trainings_are_of_other_seeds_and_have_references_of_their_own():
    cells, others = (study.cells_of([name], FULL, study.usual_rates()) for name in ("fresh", "methods"))
    assert {cell.seed for cell in cells}.isdisjoint(cell.seed for cell in others)
    assert len([cell for cell in cells if cell.base == "noise"]) == len(others)
    for base in ("noise", "flow"):
        references, trained = (
            {(c.concept, c.seed) for c in cells if c.base == base and (c.method == "none") == bare}
            for bare in (True, False)
        )
        assert references == trained and len(references) == len(FULL.concepts) * len(FULL.seeds)


def test_free_curves_are_ones_that_training_takes():
    from tlora_core.method.schedule import RankSchedule

    for name in study.FREE:
        cell = study.Cell("olive heart", 0, "tlora", curve=name)
        smallest = 0 if name.endswith("to 0") else study.RANK // 2
        assert RankSchedule.from_text(cell.rank, cell.min_rank, 1.0, cell.curve_text).min_rank == smallest


def test_equal_signal_is_the_papers_schedule_at_a_sixteenth_of_the_sigma():
    assert study.SIGMAS[[0, 999]] == pytest.approx([0.0292, 14.615], abs=1e-3)
    for t in (600, 800, 950):
        level = np.interp(study.SIGMAS[t] / 16, study.SIGMAS, np.arange(1000)) / 1000
        assert study.moved(level) == pytest.approx(t / 1000, abs=1e-3)
    assert study.moved(0.5) == 1 and study.moved(0.0) < 0.2


# --- the reader of colours ---


def test_scorers_are_measured_on_every_concept(monkeypatch):
    import tiny_gate

    monkeypatch.setattr(validation, "separation", lambda concepts: {})  # minutes; its matcher has tests of its own
    found = validation.validate(tiny_gate.load_scorer(), lambda pictures: pictures, 12)["attributes"]
    assert {name: len(by) for name, by in found.items()} == {"background": 12, "place": 12, "colour": 12}
    assert min(found["background"].values()) == min(found["place"].values()) == 1
    assert min(found["colour"].values()) > 0.9 and np.mean(list(found["colour"].values())) >= 0.95, found["colour"]


def test_colour_of_an_object_that_is_not_yet_the_concept_is_read_too():
    scenes = world.concept_scenes(HEART, 8, np.random.default_rng(2), "night", "left")
    scenes.rim[:], scenes.core[:] = np.nan, np.nan
    scenes.colour[:] = np.array(world.COLOURS["blue"]) / 255
    assert colour.ColourReader(HEART).read(torch.from_numpy(world.render(scenes)), ["left"] * 8) == ["blue"] * 8


# --- the run itself ---


@pytest.fixture(scope="module")
def bench(comfy):
    import tiny_gate

    with torch.inference_mode():
        yield run.Bench(tiny_gate.WEIGHTS)


def test_pictures_drawn_together_are_those_drawn_alone(bench):
    both = [
        prompts.Prompt("a photo of a sks heart at night", "background", 0),
        prompts.Prompt("a photo of a sks heart", "neutral", 3),
    ]
    with torch.inference_mode():
        together, alone = bench.draw(both), torch.cat([bench.draw([p]) for p in both])
    assert (together - alone).abs().max() < 1e-3 and (together[0] - together[1]).abs().mean() > 0.02


def test_prompts_are_followed_from_pure_noise_and_not_from_next_to_none(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(decided, "LEVELS", (999, 20))
    with torch.inference_mode():
        noisy, clear = decided.measure(bench, 8)
    assert noisy["place"] >= 0.75 and noisy["background"] >= 0.75 and clear["place"] <= 0.25 and clear["shape"] <= 0.25
    assert (noisy["t"], clear["t"]) == (999, 20) and noisy["sigma"] > 10 > 0.2 > clear["sigma"]
    (tmp_path / "decided.json").write_text(json.dumps([noisy, clear]))
    assert f"| 999 | 14.61 | {noisy['shape']:.0%} |" in about.decided(tmp_path)


def test_miniature_study_runs_and_resumes_where_it_was(bench, tmp_path, monkeypatch):
    cells = study.cells_of(["rates"], study.SCALES["miniature"], {})[:2]
    file, said = tmp_path / "miniature.jsonl", []
    with torch.inference_mode():
        run.run(bench, cells, file, said.append)
        whole = record_files.read(file)
        assert [r["step"] for r in whole] == [0, 1, 2] and len(list((tmp_path / "sheets").glob("*.png"))) == 2
        assert "min left" in said[-1]
        # Killed in the middle of the last line.
        file.write_text(file.read_text()[:-40])
        run.run(bench, cells, file, said.append)
        again = record_files.read(file)
        run.run(bench, cells, file, said.append)
    assert said[-1].startswith("2 of 2 cells are done; 0 to go")
    keep = lambda r: (r["step"], r["rows"], r.get("loss"))  # noqa: E731
    assert list(map(keep, again)) == list(map(keep, whole))
    points = analysis.points(again)
    assert points[0].is_ == 0 and all(0 <= p.ts <= 1 for p in points)


def test_one_command_runs_a_study_and_says_how_far_it_is(host, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [
                host.python,
                REPO / "benchmarks" / "personalization.py",
                *arguments,
                "--scale",
                "miniature",
                "--results",
                tmp_path,
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(host.comfyui), str(REPO)))},
        )

    (tmp_path / "scorers.json").write_text('{"attributes": {}}')
    for study_, said in (
        ("methods", "0 of 5 cells are done; 5 to go, 8 steps."),
        ("earlier", "0 of 0 cells are done"),
        ("later", "0 of 4 cells are done; 4 to go, 16 steps."),
    ):
        done = command(study_)
        assert done.returncode == 0 and said in done.stderr, done.stderr
    assert len(record_files.read(tmp_path / "miniature.jsonl")) == 9 + 8
    for wrong in (("table9",), ("earlier", "table1"), ("later", "table1"), ("all", "table1")):
        refused = command(*wrong)
        assert refused.returncode == 2 and f"there is no study {wrong[0]}; choose of" in refused.stderr


def test_how_a_training_goes_does_not_depend_on_where_it_is_drawn(bench):
    cell = study.cells_of(["methods"], study.SCALES["miniature"], study.usual_rates())[2]
    with torch.inference_mode():
        whole, alone = (
            [record for record, _ in run.run_cell(bench, replace(cell, steps=steps), set())] for steps in ((1, 2), (2,))
        )
    assert cell.method == "tlora" and [r["step"] for r in whole] == [1, 2] and [r["step"] for r in alone] == [2]
    assert whole[1]["rows"] == alone[0]["rows"] and whole[1]["loss"] == alone[0]["loss"]


def test_scorers_read_the_matchers_concept_and_the_scene(bench):
    scenes = world.concept_scenes(HEART, 2, np.random.default_rng(0), "night", "left")
    pictures = torch.from_numpy(world.render(scenes))
    asked = [
        prompts.Prompt("a photo of a sks heart", "neutral", 0),
        prompts.Prompt("x", "background", 0, {"background": "night"}),
    ]
    rows = metrics.measure(pictures, asked, bench.matcher("olive heart"), bench.reader("olive heart"), bench.scorer)
    assert rows[0]["distance"] < 0.1 and rows[0]["pose"][0] == pytest.approx(scenes.centre[0, 0], abs=0.05)
    assert "distance" not in rows[1] and rows[1]["seen"]["background"] == "night" and rows[1]["seen"]["place"] == "left"


def test_flow_base_draws_what_prompts_say_and_is_trained_as_a_flow(bench):
    import comfy.model_sampling

    cell = replace(
        study.Cell("olive heart", 0, "vanilla_tlora"),
        rank=4,
        min_share=0.25,
        base="flow",
        learning_rate=1e-3,
        steps=(1,),
    )
    asked = prompts.control_prompts(HEART, 0, 8)
    with torch.inference_mode():
        drawn = metrics.seen(bench.draw(asked, bench.bare("flow")), bench.scorer)
        made = run.personalization(bench, cell)
        made.train(1)
        trained = made.tlora()
    right = [shown[name] == value for shown, p in zip(drawn, asked) for name, value in p.asked.items()]
    assert np.mean(right) >= 0.85
    assert isinstance(made.sampling, comfy.model_sampling.ModelSamplingDiscreteFlow) and made.sampling.shift == 1
    assert (trained.noise_domain, trained.num_timesteps) == ("flow", 1)


def test_training_of_a_cell_is_what_the_cell_says(bench):
    cell = replace(
        study.Cell("olive heart", 0, "tlora"),
        rank=8,
        images=2,
        curve="late drop",
        noise_to=0.8,
        learning_rate=2e-3,
        steps=(1,),
    )
    with torch.inference_mode():
        made = run.personalization(bench, cell)
    assert made.images == 2 and made.request.schedule.active_rank(600) == 8 and made.request.schedule.min_rank == 4
    assert (made.request.config.noise_to, made.request.config.learning_rate) == (0.8, 2e-3)
