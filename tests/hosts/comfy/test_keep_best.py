"""Which step a run's file holds: the last, or the best by the scores of its validations; and when it ends for that."""

import json

import pytest
from scored_runs import drawn_at_once, scored_by
from training_runs import Wish, cancel, folders, nan_after, record, request, run, same, shown

BEST = {"scorer": "table", "keep": "best", "validate_every": 2}
PAST = {**BEST, "keep": "stop when past it", "patience": 2}
RISE_AND_FALL = {2: 0.3, 4: 0.6, 6: 0.5, 8: 0.4, 10: 0.3, 12: 0.2}


@pytest.fixture
def at_once(base, monkeypatch):
    return drawn_at_once(monkeypatch)


@pytest.fixture
def table(at_once, monkeypatch):
    return scored_by(monkeypatch, RISE_AND_FALL)


def kept_steps(output):
    """The step that each file of the runs holds, by name."""
    from tlora_core import TLoRAFile

    files = sorted((output / "loras" / "run").iterdir())
    return {path.name: TLoRAFile.load(path).training["steps_done"] for path in files}


def test_the_file_of_the_best_step_is_that_of_a_run_with_so_many_steps(base, output, table):
    short = run(base, request(4), file_name="run/short")
    best = run(base, request(8), **BEST)
    assert best.step == 4 and len(best.losses) == 8 and same(best.tlora, short.tlora)
    settings = [{**done.tlora.training, "steps": None} for done in (best, short)]
    assert settings[0] == settings[1] and settings[0]["steps_done"] == 4
    assert table.measured == [0, 2, 4, 6, 8]
    assert best.why.startswith("The file holds step 4: as like as it gets") and shown() == ("done", best.why)
    told = record(output)
    assert (told["state"], told["step"], told["why"]) == ("done", 8, best.why) and [s.step for s in best.scores] == [
        *(0, 2, 4, 6, 8)
    ]


def test_keep_last_is_scored_too_and_holds_the_last_step(base, output, table):
    table.likeness[4] = 0.1
    plain = run(base, request(4), rerun="restart")
    last = run(base, request(4), rerun="restart", **{**BEST, "keep": "last"})
    assert same(last.tlora, plain.tlora) and last.losses == plain.losses and last.step == 4 and last.why == ""
    assert table.measured == [0, 2, 4] and len(last.scores) == 3


def test_the_last_step_is_scored_wherever_it_falls_and_may_be_the_best(base, output, at_once, monkeypatch):
    table = scored_by(monkeypatch, {2: 0.3, 4: 0.4, 5: 0.9})
    assert run(base, request(5), **BEST).step == 5 and table.measured == [0, 2, 4, 5]


def test_it_ends_when_past_the_best_and_writes_that(base, output, table):
    short = run(base, request(4), file_name="run/short")
    past = run(base, request(12), **PAST)
    assert len(past.losses) == 8 and past.step == 4 and same(past.tlora, short.tlora)
    assert past.why.startswith("Ended at step 8: 2 validations in a row brought no gain. The file holds step 4: ")
    assert shown() == ("done", past.why) and record(output)["state"] == "done"
    assert not list(output.rglob("checkpoint.pt"))
    for rerun in ("auto", "continue"):
        again = run(base, request(12), rerun=rerun, **PAST)
        assert again.file == past.file and again.why == past.why and shown() == ("found", past.why)
        assert [scores.step for scores in again.scores] == [0, 2, 4, 6, 8]


def test_a_run_is_found_again_only_with_what_its_step_was_chosen_by(base, output, table):
    table.likeness[1] = 0.9
    first = run(base, request(2), **BEST)
    others = [
        {},
        {**BEST, "scorer": "another"},
        {**BEST, "score_seeds": 3},
        {**BEST, "validation_prompts": ("a {}",)},
        {**BEST, "validate_every": 1},
        {**PAST, "patience": 9},
        {**PAST, "patience": 8},
    ]
    made = [run(base, request(2), **keeping) for keeping in others]
    assert len(folders(output)) == 1 + len(others) and [done.step for done in made] == [2, 2, 2, 2, 1, 2, 2]
    assert run(base, request(2), **{**BEST, "patience": 7}).file == first.file, "patience has no say in keep best"
    # Of the last step, scores change nothing.
    assert run(base, request(2), **{**BEST, "keep": "last"}).file == made[0].file


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_resumed_run_has_its_scores_and_the_best_step_so_far(base, output, at_once, monkeypatch, keep):
    import comfy.model_management

    short = run(base, request(2), file_name="run/short")
    table = scored_by(monkeypatch, {2: 0.9, 4: 0.6, 6: 0.5, 8: 0.4})
    keeping = {**BEST, "keep": keep, "checkpoint_every": 4}
    with monkeypatch.context() as patch:
        Wish(patch, 7, cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(base, request(8), **keeping)
    assert table.measured == [0, 2, 4, 6]
    done = run(base, request(8), **keeping)
    # The state of step 4 was saved before its pictures were drawn.
    assert table.measured == [0, 2, 4, 6, 4, 6, 8] and [scores.step for scores in done.scores] == [0, 2, 4, 6, 8]
    assert done.step == (2 if keep == "best" else 8) and same(done.tlora, short.tlora) == (keep == "best")
    assert len(folders(output)) == 2


def test_a_clip_vision_is_known_again_and_told_from_another(comfy):
    import torch
    from comfy.clip_vision import ClipVisionModel

    from tlora_core.hosts.comfy.training.fingerprint import fingerprint
    from tlora_core.hosts.comfy.training.found import _choice
    from tlora_core.hosts.comfy.training.keeping import Keeping

    def key(seed):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        sizes |= {
            "image_size": 16,
            "patch_size": 8,
            "num_channels": 3,
            "projection_dim": 8,
            "model_type": "clip_vision_model",
        }
        vision = ClipVisionModel({**sizes, "hidden_act": "quick_gelu"})
        for weight in vision.model.parameters():
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
        return fingerprint(_choice(Keeping(clip_vision=vision, keep="best", validate_every=2), request()))

    assert key(1) == key(1) != key(2)


def test_scores_under_other_conditions_are_left_out_when_a_run_is_resumed(base, output, table, monkeypatch):
    import comfy.model_management

    keeping = {**BEST, "keep": "last", "checkpoint_every": 5}
    with monkeypatch.context() as patch:
        Wish(patch, 5, cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(base, request(8), **keeping)
    done = run(base, request(8), **{**keeping, "score_seeds": 3})
    assert [scores.step for scores in done.scores] == [6, 8] and len(folders(output)) == 1


def test_stop_and_keep_writes_the_best_step_and_continue_goes_on_from_the_last(base, output, table, monkeypatch):
    whole = run(base, request(8), file_name="run/whole", rerun="restart", **BEST)
    with monkeypatch.context() as patch:
        Wish(patch, 7, lambda live: live.request("stop"))
        table.likeness[7] = 0.45
        stopped = run(base, request(8), rerun="restart", **BEST)
    assert stopped.step == 4 and len(stopped.losses) == 7 and table.measured[-4:] == [2, 4, 6, 7]
    assert record(output)["state"] == "stopped" and shown() == ("stopped", stopped.why)
    assert run(base, request(8), **BEST).file == stopped.file
    assert shown()[1] == f"Stopped at step 7 of 8; set rerun to continue to resume. {stopped.why}"
    went_on = run(base, request(8), rerun="continue", **BEST)
    assert went_on.losses == whole.losses and same(went_on.tlora, whole.tlora)
    assert [scores.step for scores in went_on.scores] == [0, 2, 4, 6, 7, 8]


def test_cancel_saves_the_best_step_where_asked(base, output, table, monkeypatch):
    import comfy.model_management

    Wish(monkeypatch, 7, cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(base, request(8), save_on_cancel=True, **BEST)
    assert kept_steps(output) == {"heart_00001_.safetensors": 4} and record(output)["step"] == 7
    assert shown()[1].startswith("Cancelled at step 7 and saved as run/heart_00001_.safetensors. The file holds step 4")
    assert shown()[1].endswith("Run resumes at step 7.") and table.measured == [0, 2, 4, 6]


def test_cancelling_the_last_pictures_loses_no_training(base, output, table, monkeypatch):
    import comfy.model_management

    from tlora_core.hosts.comfy.training.personalize import Personalization

    draw = Personalization.draw

    def cancelled(self, *args):
        if self.trainer.step == 8:
            raise comfy.model_management.InterruptProcessingException
        return draw(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Personalization, "draw", cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(base, request(8), checkpoint_every=0, **BEST)
    assert shown() == ("cancelled", "Cancelled at step 8. Run resumes at step 8.")
    monkeypatch.setattr(Personalization, "train", lambda *args: pytest.fail("it trains"))
    done = run(base, request(8), checkpoint_every=0, **BEST)
    assert done.step == 4 and len(done.losses) == 8 and table.measured == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("likeness, step", [({20: 0.9, 40: 0.1}, 20), ({20: ValueError("x"), 40: 0.1}, 25)])
def test_a_training_that_diverges_keeps_the_best_step(base, output, at_once, monkeypatch, likeness, step):
    from tlora_core import TLoRAError

    scored_by(monkeypatch, likeness)
    nan_after(monkeypatch, 27)
    with pytest.raises(TLoRAError) as raised:
        run(base, request(60), **{**BEST, "validate_every": 20})
    assert kept_steps(output) == {"heart_00001_.safetensors": step}
    assert "run/heart_00001_.safetensors is saved. The file holds step " + str(step) in str(raised.value)
    assert record(output)["state"] == "failed" and "\n" not in str(raised.value)


@pytest.mark.parametrize("keeping", [BEST, PAST], ids=["best", "past"])
def test_a_file_that_cannot_be_saved_is_written_by_the_next_run(base, output, table, monkeypatch, keeping):
    from tlora_core import TLoRAError
    from tlora_core.files.tlora_file import TLoRAFile
    from tlora_core.hosts.comfy.training.personalize import Personalization

    def full(*args):
        raise TLoRAError("the disk is full.")

    steps = 8 if keeping is BEST else 12
    short = run(base, request(4), file_name="run/short")
    with monkeypatch.context() as patch:
        patch.setattr(TLoRAFile, "save", full)
        with pytest.raises(TLoRAError, match="the disk is full. The training is kept in .*: it only writes the file.$"):
            run(base, request(steps), checkpoint_every=0, **keeping)
    monkeypatch.setattr(Personalization, "train", lambda *args: pytest.fail("it trains"))
    for rerun in ("continue", "auto"):
        done = run(base, request(steps), checkpoint_every=0, rerun=rerun, **keeping)
        assert done.step == 4 and same(done.tlora, short.tlora) and len(done.losses) == 8
        assert record(output)["state"] == "done"
    assert table.measured == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("value", [RuntimeError("the scorer\nis gone"), float("nan")], ids=str)
def test_a_scorer_that_fails_ends_no_training(base, output, at_once, monkeypatch, value):
    from tlora_core.hosts.comfy.page.training import LiveRun

    said, note = [], LiveRun.note
    monkeypatch.setattr(LiveRun, "note", lambda live, text: (said.append(text), note(live, text))[1])
    scored_by(monkeypatch, {2: value, 4: 0.5, 6: 0.1})
    done = run(base, request(6), **BEST)
    assert done.step == 4 and [scores.step for scores in done.scores] == [0, 4, 6]
    assert len(said) == 1 and said[0].startswith("no scores at step 2: ") and "\n" not in said[0]
    pictures = LiveRun.states()[-1]["pictures"]
    assert [(p["step"], p["scores"] is None) for p in pictures] == [(0, False), (2, True), (4, False), (6, False)]
    scored_by(monkeypatch, {2: value, 4: value, 6: value})
    nothing = run(base, request(6), rerun="restart", **BEST)
    assert nothing.step == 6 and [scores.step for scores in nothing.scores] == [0]
    assert nothing.why == "The file holds step 6, the last one, because no step was scored."


def test_files_on_the_way_hold_their_own_step(base, output, table):
    run(base, request(8), checkpoint_every=3, checkpoint_files=True, **BEST)
    assert kept_steps(output) == {
        "heart_00001_.safetensors": 4,
        "heart_step000003_00001_.safetensors": 3,
        "heart_step000006_00001_.safetensors": 6,
    }


def test_room_for_the_best_step_is_asked_for_before_the_training(base, output, table, monkeypatch):
    from tlora_core.hosts.comfy.training import found

    asked, told, sizes = found._needs, [], []
    monkeypatch.setattr(found, "_needs", lambda *args: told.extend(asked(*args)) or told)
    monkeypatch.setattr(
        found.RunFolder,
        "remove_state",
        lambda folder: sizes.append((folder.path / "checkpoint.pt").stat().st_size),
    )
    run(base, request(7), checkpoint_every=6, **BEST)
    assert sizes[0] <= told[1].size <= 1.02 * sizes[0] + 1_500_000


def test_the_files_picture_is_of_the_step_that_it_holds(base, output, table):
    import io

    from PIL import Image

    from tlora_core.files.card import read_thumbnail

    done = run(base, request(8), **BEST)
    [red, *_] = Image.open(io.BytesIO(read_thumbnail(done.path) or b"")).getpixel((9, 9))
    assert abs(red - 40) <= 2


def test_scores_are_in_the_folder_as_they_come(base, output, table, monkeypatch):
    import comfy.model_management

    Wish(monkeypatch, 5, cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(base, request(8), **BEST)
    [folder] = folders(output)
    lines = (folder / "scores.csv").read_text().splitlines()
    assert lines[0] == "step,likeness,likeness_error,obedience,obedience_error,copying,copying_error"
    assert lines[1].startswith("0,0.0,") and lines[3].startswith("4,0.6,0.0,") and len(lines) == 4
    told = json.loads((folder / "scores.json").read_text())
    assert told["scorer"] == "table" and told["seeds"] == [0, 1] and told["prompts"][0] == "a photo of sks heart"
    assert [step["step"] for step in told["steps"]] == [0, 2, 4]
    assert told["steps"][2]["pictures"][1][1] == {"likeness": None, "obedience": 0.25, "copying": 0.04}
