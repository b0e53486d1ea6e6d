"""`tools/host.py batch`: tables, what is done and done again, how rows end, shards. The rows are counted by a stand-in
for ComfyUI; see helpers/batch_child.py."""

import csv
import io
import json
import shutil
import signal

import pytest
from batch_child import write_python
from batchlib import command
from batchlib.cells import read_cell
from batchlib.driver import TRIES
from batchlib.jobs import jobs_of
from batchlib.results import Results
from batchlib.table import read_table
from hostlib import cli
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


# --- what a table may say ---


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("jobs.csv", "", "holds no rows"),
        ("jobs.csv", "model,image\n", "holds no rows"),
        ("jobs.csv", "model,,image\na,b,c\n", "jobs.csv, header, column 2: it has no name"),
        ("jobs.csv", "class-word,class_word\na,b\n", "jobs.csv, header, column 2: class_word is there twice"),
        ("jobs.csv", "model,image\na,b\na,b,c\n", "jobs.csv, row 2: it has 3 cells, and the header 2"),
        ("jobs.csv", 'model,image\na,"b" c\n', "jobs.csv, line 2: it is not CSV"),
        ("jobs.jsonl", '{"model": "a"}\n{"model": \n', "jobs.jsonl, row 2: it is not JSON"),
        ("jobs.jsonl", "[1]\n", "jobs.jsonl, row 1: it is no JSON object"),
        ("jobs.jsonl", '{"rank": {"a": 1}}\n', "jobs.jsonl, row 1, column rank: it is neither"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_its_place(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(WrongArguments) as error:
        read_table(tmp_path / name)
    assert said in str(error.value)


def test_a_table_of_another_encoding_or_none_is_refused(tmp_path):
    (tmp_path / "jobs.csv").write_bytes("model;größe\n".encode("latin-1"))
    with pytest.raises(WrongArguments, match="is not UTF-8"):
        read_table(tmp_path / "jobs.csv")
    with pytest.raises(WrongArguments, match="cannot be read"):
        read_table(tmp_path / "none.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_spreadsheets_csv_and_json_lines_say_the_same(tmp_path, delimiter):
    rows = [["--class-word", "validation-prompt"], ["dog", "a, b; c\nd"], ["", ""], ["cat", ""]]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    (tmp_path / "jobs.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    lines = [{"class_word": "dog", "validation_prompt": "a, b; c\nd"}, {"class-word": "cat", "validation_prompt": None}]
    (tmp_path / "jobs.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    cells = [[row.cells for row in read_table(tmp_path / name)] for name in ("jobs.csv", "jobs.jsonl")]
    expected = [{"class_word": "dog", "validation_prompt": "a, b; c\nd"}, {"class_word": "cat"}]
    assert cells == [expected, expected]


def one_job(tmp_path, workflow=None, **cells):
    (tmp_path / "one.jsonl").write_text(json.dumps(cells))
    [job] = jobs_of(read_table(tmp_path / "one.jsonl"), tmp_path, workflow)
    return job


def test_a_row_is_the_job_that_train_would_make_of_it(tmp_path):
    from trainlib.arguments import job_of

    for name in ("a.png", "b.png", "m.png"):
        (tmp_path / name).write_bytes(name.encode())
    flux = {"unet": "u", "clip": ["c", "d"], "clip_type": "flux", "vae": "v"}
    prompts = ["a {} on snow", "a {} at night"]
    job = one_job(
        tmp_path, **flux, image="a.png\nb.png", mask="m.png", class_word="dog", validation_prompt=prompts, rank=32
    )
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    line = ["train", "--unet", "u", "--clip", "c", "d", "--clip-type", "flux", "--vae", "v", "--class-word", "dog"]
    line += ["--image", *paths, "--mask", str(tmp_path / "m.png"), "--set", "rank=32"]
    asked = job_of(cli.parse([*line, *(part for prompt in prompts for part in ("--validation-prompt", prompt))]))
    assert job.asked == {"parts": asked["parts"], "inputs": {**asked["inputs"], "rank": 32}}
    assert {name: [str(path) for path in files] for name, files in job.files.items()} == asked["files"]
    assert job.prompts == 2


def test_a_row_may_hold_a_reference_line(tmp_path):
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "02.jpg").touch()
    line = (
        f"train.py --trainer_type=lora --trainer_class=sdxl_lora --train_data_dir={tmp_path / 'dogs'} --output_dir=o "
        "--placeholder_token=sks --class_name=dog --lora_rank=8"
    )
    job = one_job(tmp_path, model="m", from_reference=line, steps=5)
    assert job.files == {"image": [tmp_path / "dogs" / "02.jpg"]}
    assert (job.asked["inputs"]["rank"], job.asked["inputs"]["steps"]) == (8, 5)
    with pytest.raises(WrongArguments, match="row 1, column from_reference: .*lora_rank"):
        one_job(tmp_path, model="m", from_reference=line.replace("=8", "=many"))
    with pytest.raises(WrongArguments, match="from_reference: it sets WANDB_API_KEY"):
        one_job(tmp_path, model="m", from_reference=line + " --wandb_api_key=k")


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


NODES = {
    "Draw": {
        "input": {
            "required": {
                "steps": ["INT", {"min": 1, "max": 9}],
                "cfg": ["FLOAT", {}],
                "text": ["STRING", {}],
                "on": ["BOOLEAN", {}],
                "name": [["a", "b"]],
                "kind": ["COMBO", {"options": [1, 2]}],
                "image": [["old.png"], {"image_upload": True}],
                "model": ["MODEL", {}],
            }
        }
    }
}
DRAW = {"7": {"class_type": "Draw", "inputs": {"branch.size": 1}, "_meta": {"title": "My node"}}}


@pytest.mark.parametrize(
    "column, cell, value",
    [
        ("7.steps", "5", 5),
        ("My node.steps", 5.0, 5),
        ("Draw.cfg", "1.5", 1.5),
        ("7.text", "123", "123"),
        ("7.text", ["a", "b"], "a\nb"),
        ("7.on", "Yes", True),
        ("7.on", False, False),
        ("7.name", "b", "b"),
        ("7.kind", "2", 2),
        ("7.image", "old.png", "old.png"),
        ("7.branch.size", "3", 3),
        ("7.branch.size", "big", "big"),
    ],
)
def test_a_cell_becomes_what_its_input_takes(column, cell, value):
    found, is_upload = read_cell(DRAW, column, cell, NODES, is_file=False)
    assert (found, type(found), is_upload) == (value, type(value), False)


@pytest.mark.parametrize(
    "column, cell, said",
    [
        ("7.steps", "five", "it is 'five'; give a whole number."),
        ("7.steps", 1.5, "give a whole number"),
        ("7.steps", "0", "it is 0; give 1 at least."),
        ("7.steps", "10", "give 9 at most"),
        ("7.cfg", "nan", "give a number"),
        ("7.on", "maybe", "give true or false"),
        ("7.name", "c", 'it is "c"; choose one of a, b.'),
        ("7.image", "new.png", 'there is no file "new.png"'),
        ("7.model", "x", "it is a connection of the kind MODEL"),
        ("7.stepz", "1", "node 7 (Draw) has no input 'stepz'"),
        ("8.steps", "1", "the workflow has no such node"),
    ],
)
def test_a_cell_that_does_not_fit_is_refused(column, cell, said):
    with pytest.raises(HostError) as error:
        read_cell(DRAW, column, cell, NODES, is_file=False)
    assert said in str(error.value)


def test_a_file_beside_the_table_is_given_only_where_a_node_takes_one():
    assert read_cell(DRAW, "7.image", "new.png", NODES, is_file=True) == ("new.png", True)
    assert read_cell(DRAW, "7.text", "new.png", NODES, is_file=True) == ("new.png", False)


def test_a_workflows_columns_name_inputs(tmp_path):
    (tmp_path / "p.png").write_bytes(b"1")
    job = one_job(tmp_path, DRAW, **{"row": "x", "7.image": "p.png", "7.steps": 3, "7.text": "long " * 2000})
    assert job.files == {"7.image": [tmp_path / "p.png"]} and job.name.startswith("x-")
    with pytest.raises(WrongArguments, match=r"row 1, column steps: with --workflow a column is NODE\.INPUT"):
        one_job(tmp_path, DRAW, steps=3)


# --- what runs, and what it leaves ---


def test_rows_run_in_order_and_a_failing_one_leaves_the_others(batch, tmp_path):
    status, report, said = batch("a,tiny,p0.png,dog,4,", ",tiny,p1.png,dog,5,fail", "c,tiny,p2.png,cat,6,")
    assert status == 1 and states(report) == ["done", "failed", "done"]
    assert [line["number"] for line in report] == ["1", "2", "3"]
    assert [line["row"].rpartition("-")[0] for line in report] == ["a", "p1", "c"]
    assert report[1]["error"] == "It cannot be." and report[1]["file"] == ""
    assert f"{report[1]['row']} failed: It cannot be. (1 of 3 done)" in said
    assert [(tmp_path / "out" / report[place]["file"]).read_text() for place in (0, 2)] == ["40", "180"]
    sheet = json.loads((tmp_path / "out" / "sheet.jpg").read_text())
    assert [name for name, _, _ in sheet] == [f"{report[1]['row']} (failed)"]


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

    wide, plain = Image.new("RGB", (96, 40), "red"), Image.new("RGB", (20, 40), "blue")
    wide.paste("lime", (48, 0, 96, 40))
    paths = [str(tmp_path / name) for name in ("wide.png", "plain.png")]
    wide.save(paths[0])
    plain.save(paths[1])
    told = [["two", 2, paths[:1]], ["one", 1, paths[1:]], ["none", 1, []]]
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
