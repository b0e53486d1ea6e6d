"""`tools/host.py batch`: what is done and done again, how rows end, shards, sheets. The rows are counted by a stand-in
for ComfyUI; see helpers/batch_child.py."""

import csv
import io
import json
import os
import shutil
import signal
import tempfile

import pytest
from batch_child import one_job, write_python
from batchlib import command, worker
from batchlib.driver import TRIES, Batch
from batchlib.jobs import jobs_of
from batchlib.results import Results
from batchlib.table import read_table
from hostlib import cli
from hostlib.cache import try_lock
from hostlib.errors import HostError, WrongArguments

HEADER = "row,model,image,class_word,steps,how"


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    """Runs the command on a table of the given lines; gives its status, the report's lines and what it said."""
    comfyui, python = write_python(tmp_path)
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        (tmp_path / f"p{number}.png").write_bytes(bytes([number + 1] * 10))

    def run(*lines, header=HEADER, options=(), out="out"):
        (tmp_path / "jobs.csv").write_text("\n".join([header, *lines]), encoding="utf-8")
        options = ["--comfyui", str(comfyui), "--python", str(python), "--out", out, *options]
        status = cli.main(["batch", "jobs.csv", *options])
        said = capsys.readouterr()
        assert said.out == ""
        reports = sorted((tmp_path / out).glob("report*.csv"))
        return status, read_report(reports[0]) if reports else [], said.err

    return run


def read_report(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def states(report):
    return [line["state"] for line in report]


def record(tmp_path, line, out="out"):
    return json.loads((tmp_path / out / line["row"] / "row.json").read_text(encoding="utf-8"))


# --- what runs, and what it leaves ---


@pytest.mark.parametrize(
    "line, said",
    [
        ("a,tiny,gone.png,dog,5,", 'jobs.csv, row 2, column image: there is no file "gone.png"'),
        ("a,tiny,,dog,5,", "jobs.csv, row 2, column image: it is empty"),
        ("a,tiny,p1.png,,5,", "jobs.csv, row 2, column class_word: it is empty"),
        ("a,,p1.png,dog,5,", "jobs.csv, row 2, column model: name either a model"),
    ],
)
def test_a_wrong_row_refuses_the_table_before_anything_runs(batch, tmp_path, line, said):
    status, report, errors = batch("ok,tiny,p0.png,dog,5,", line)
    assert (status, report) == (2, []) and errors.startswith("Error: " + said) and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_only_comfyui_can_tell_refuses_the_table_too(batch, tmp_path):
    lines = ("tiny,p0.png,dog,5,4", "tiny,p1.png,dog,5,wrong")
    status, report, errors = batch(*lines, header="model,image,class_word,steps,rank")
    assert (status, report) == (2, []) and errors.endswith("Error: jobs.csv, row 2, column rank: it is wrong.\n")
    assert not (tmp_path / "out").exists()


def test_rows_run_in_order_and_a_failing_one_leaves_the_others(batch, tmp_path):
    status, report, said = batch("a,tiny,p0.png,dog,4,", ",tiny,p1.png,dog,5,fail", "c,tiny,p2.png,cat,6,")
    assert status == 1 and states(report) == ["done", "failed", "done"]
    assert [line["number"] for line in report] == ["1", "2", "3"]
    assert [line["row"].rpartition("-")[0] for line in report] == ["a", "p1", "c"]
    assert report[1]["error"] == "It cannot be." and report[1]["file"] == ""
    assert f"{report[1]['row']} failed: It cannot be. (1 of 3 done)" in said
    assert [(tmp_path / "out" / report[place]["file"]).read_text() for place in (0, 2)] == ["40", "180"]
    sheet = json.loads((tmp_path / "out" / "sheet.jpg").read_text())
    assert [title for title, _ in sheet] == ["2: p1 (failed)"]


def test_what_is_done_is_not_done_again_wherever_its_row_stands(batch, tmp_path):
    first = batch("a,tiny,p0.png,dog,4,", "b,tiny,p1.png,dog,5,")[1]
    shutil.copy(tmp_path / "p0.png", tmp_path / "same.png")
    status, report, said = batch("new,tiny,p2.png,dog,6,", "other,tiny,p1.png,dog,5,", "a,tiny,same.png,dog,4,")
    assert status == 0 and "2 of 3 rows are done already." in said and f"{report[0]['row']} done" in said
    assert said.count(" done in ") == 1 and [report[1]["row"], report[2]["row"]] == [first[1]["row"], first[0]["row"]]
    assert "Looking" not in batch("a,tiny,p0.png,dog,4,")[2]


@pytest.mark.parametrize("change", ["a value", "the picture", "the result is gone", "it failed"])
def test_what_is_not_done_is_done(batch, tmp_path, change):
    [line] = batch("a,tiny,p0.png,dog,4," + ("fail" if change == "it failed" else ""))[1]
    if change == "the picture":
        (tmp_path / "p0.png").write_bytes(b"another")
    if change == "the result is gone":
        (tmp_path / "out" / line["file"]).unlink()
    said = batch("a,tiny,p0.png,dog," + {"a value": "5,", "it failed": "4,fail"}.get(change, "4,"))[2]
    assert "already" not in said and ("done in" in said or "failed" in said)


def test_equal_rows_are_run_once(batch):
    status, report, said = batch("a,tiny,p0.png,dog,4,", "b,tiny,p0.png,dog,4,", "a,tiny,p0.png,dog,4,")
    assert status == 0 and states(report) == ["done"] * 3 and said.count(" done in ") == 1
    assert len({line["file"] for line in report}) == 1


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly_and_the_same_command_goes_on(batch, tmp_path, monkeypatch, number, status):
    lines = ("a,tiny,p0.png,dog,60,wait", "b,tiny,p1.png,dog,5,")
    keep = Results.keep_state
    before = signal.getsignal(number)
    kept = []

    def keep_and_signal(results, job, data):
        keep(results, job, data)
        kept.append(data)
        if len(kept) == 2:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "keep_state", keep_and_signal)
        ended, report, said = batch(*lines)
    assert ended == status and states(report) == ["cancelled", "waiting"] and "The same command goes on." in said
    assert signal.getsignal(number) == before
    job = jobs_of(read_table(tmp_path / "jobs.csv"), tmp_path, None)[0]
    assert job.name == report[0]["row"]
    ended, report, said = batch(*lines)
    assert ended == 0 and states(report) == ["done", "done"]
    assert record(tmp_path, report[0])["first_step"] >= 2 and not list((tmp_path / "out").rglob("state.zip"))


def test_a_picture_that_goes_away_fails_its_row_alone(batch, tmp_path, monkeypatch):
    end = Results.end

    def end_and_remove(results, job, how):
        end(results, job, how)
        (tmp_path / "p1.png").unlink(missing_ok=True)

    monkeypatch.setattr(Results, "end", end_and_remove)
    status, report, _ = batch("a,tiny,p0.png,dog,3,", "b,tiny,p1.png,dog,3,", "c,tiny,p2.png,dog,3,")
    assert status == 1 and states(report) == ["done", "failed", "done"]
    assert "p1.png cannot be read" in report[1]["error"]


def test_a_folder_into_which_another_batch_writes_is_refused(batch, tmp_path):
    with Results(tmp_path / "out").locked():
        status, report, said = batch("a,tiny,p0.png,dog,3,")
        assert (status, report) == (2, []) and "Another batch writes to" in said and "another --out" in said
    assert batch("b,tiny,p1.png,dog,3,")[0] == 0


@pytest.mark.parametrize(
    "first, second, may",
    [("", "-1-of-2", False), ("-1-of-2", "", False), ("-1-of-12", "-1-of-2", False), ("-1-of-2", "-2-of-2", True)],
)
def test_only_parts_of_one_division_may_write_beside_each_other(tmp_path, first, second, may):
    with Results(tmp_path, first).locked():
        if may:
            with Results(tmp_path, second).locked():
                pass
        else:
            with pytest.raises(WrongArguments, match="Another batch"), Results(tmp_path, second).locked():
                pass
    with Results(tmp_path, second).locked():
        pass


def test_what_another_batch_has_done_meanwhile_is_not_done_again(batch, monkeypatch, tmp_path):
    check = Batch._check

    def check_and_wait(mine, waiting):
        check(mine, waiting)
        monkeypatch.setattr(Batch, "_check", check)
        assert batch("a,tiny,p0.png,dog,3,")[0] == 0

    monkeypatch.setattr(Batch, "_check", check_and_wait)
    status, report, said = batch("a,tiny,p0.png,dog,3,", "b,tiny,p1.png,dog,3,")
    assert status == 0 and states(report) == ["done", "done"] and said.count(" done in ") == 1


def test_what_a_killed_worker_has_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, in_use, young = (worker._private_folder()[0] for _ in range(3))
    for folder in (left, in_use):
        os.utime(folder / "lock", (0, 0))
    with open(in_use / "lock", "a+b") as handle:
        assert try_lock(handle)
        new, held = worker._private_folder()
    assert not left.exists() and all(folder.is_dir() for folder in (in_use, young, new))
    os.utime(new / "lock", (0, 0))
    worker._private_folder()
    assert new.is_dir() and not in_use.exists()
    held.close()


def test_a_row_whose_worker_dies_goes_on_from_its_last_state(batch, tmp_path):
    status, report, said = batch("a,tiny,p0.png,dog,6,die", "b,tiny,p1.png,dog,5,")
    assert status == 0 and states(report) == ["done", "done"] and "goes on from its last state" in said
    assert record(tmp_path, report[0])["first_step"] == 3
    assert (tmp_path / "out" / report[0]["file"]).read_text() == "60"


def test_a_row_that_always_kills_its_worker_leaves_the_others(batch):
    status, report, said = batch("a,tiny,p0.png,dog,6,always die", "b,tiny,p1.png,dog,5,")
    assert status == 1 and states(report) == ["failed", "done"]
    assert report[0]["error"].startswith(f"Its worker ended {TRIES} times. ComfyUI ended with status -9")


def test_a_file_that_arrives_damaged_is_not_kept(tmp_path):
    (tmp_path / "p.png").touch()
    job = one_job(tmp_path, model="tiny", image="p.png", class_word="dog")
    results = Results(tmp_path / "out")
    results.begin(job)
    with pytest.raises(HostError, match="did not arrive as it was sent"):
        results.keep(job, "sum.safetensors", b"12", "0" * 64)
    assert not results.of(job).exists()


def test_the_report_has_the_scores_of_the_best_step(tmp_path):
    (tmp_path / "p.png").touch()
    job = one_job(tmp_path, model="tiny", image="p.png", class_word="dog")
    results = Results(tmp_path / "out")
    results.begin(job)
    steps = [{"step": step, "likeness": step / 10, "obedience": None, "copying": 0.5} for step in (1, 2, 3)]
    for best, likeness in ((2, "0.2"), (None, "0.3")):
        results.end(job, {"state": "done", "scores": steps, "kept_step": best})
        [line] = read_report(results.report([job]))
        assert (line["likeness"], line["obedience"], line["copying"]) == (likeness, "", "0.5")


# --- shards ---


def test_shards_share_the_table_and_the_whole_is_their_sum(batch, tmp_path):
    lines = [f"r{number},tiny,p{number % 3}.png,dog,{number + 3},{'fail' * (number == 4)}" for number in range(7)]
    lines.append(lines[0])
    for shard in ("1/3", "2/3", "3/3"):
        batch(*lines, options=["--shard", shard])
    reports = [read_report(path) for path in sorted((tmp_path / "out").glob("report-*-of-3.csv"))]
    assert [[line["number"] for line in report] for report in reports] == [["1", "4", "7", "8"], ["2", "5"], ["3", "6"]]
    joined = sorted((line for report in reports for line in report), key=lambda line: int(line["number"]))
    for path in (tmp_path / "out").glob("report-*"):
        path.unlink()
    status, whole, said = batch(*[line for line in lines if "fail" not in line])
    assert status == 0 and "Looking" not in said
    assert whole == [
        {**line, "number": each["number"]} for line, each in zip([x for x in joined if x["state"] == "done"], whole)
    ]


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b"])
def test_a_shard_that_is_none_is_refused(shard, capsys):
    with pytest.raises(SystemExit):
        cli.parse(["batch", "jobs.csv", "--shard", shard])
    assert "--shard" in capsys.readouterr().err


# --- the sheet ---


def test_a_sheet_takes_validations_apart_and_shows_all_rows(tmp_path, monkeypatch):
    import numpy as np
    from batchlib import sheet
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    wide, plain = Image.new("RGB", (96, 40), "red"), Image.new("RGB", (20, 40), "blue")
    wide.paste("lime", (48, 0, 96, 40))
    paths = [str(tmp_path / name) for name in ("wide.png", "plain.png")]
    text = PngInfo()
    text.add_text("tlora_prompts", json.dumps(["a", "b"]))
    wide.save(paths[0], pnginfo=text)
    plain.save(paths[1])
    told = [["two", paths[:1]], ["one", paths[1:]], ["none", []]]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(told)))
    sheet.main(str(tmp_path / "sheet.jpg"))
    made = Image.open(tmp_path / "sheet.jpg").convert("RGB")
    pixels = np.asarray(made, dtype=int)
    colours = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
    near = {name: (abs(pixels - colour).max(axis=2) < 40).sum() for name, colour in colours.items()}
    cell = sheet.CELL
    assert abs(near["red"] / (cell * cell * 40 / 48) - 1) < 0.1 and abs(near["lime"] / near["red"] - 1) < 0.1
    assert abs(near["blue"] / (cell * cell / 2) - 1) < 0.1
    assert made.height > 3 * cell


def test_only_so_many_rows_are_on_a_sheet(tmp_path):
    (tmp_path / "p.png").touch()
    results = Results(tmp_path / "out", "-1-of-2")
    jobs = [one_job(tmp_path, model="tiny", image="p.png", class_word="dog", steps=steps) for steps in range(101)]
    for job in jobs:
        results.end(job, {"state": "failed", "error": "x"})
    sheets = results.sheets(jobs)
    assert [(path.name, len(part)) for path, part in sheets] == [("sheet-1-of-2.jpg", 100), ("sheet-1-of-2_2.jpg", 1)]


def test_the_folder_is_the_tables_name_without_out(batch, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "Results", lambda folder, part: seen.append((folder, part)) or Results(folder, part))
    (tmp_path / "jobs.csv").write_text(f"{HEADER}\na,tiny,p0.png,dog,4,\n")
    python = tmp_path / "ComfyUI" / "python"
    assert cli.main(["batch", "jobs.csv", "--comfyui", str(tmp_path / "ComfyUI"), "--python", str(python)]) == 0
    assert seen == [((tmp_path / "jobs").resolve(), "")]
