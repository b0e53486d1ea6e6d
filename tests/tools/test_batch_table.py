"""The tables of `tools/host.py batch`: how they are read, and what their rows ask for."""

import csv
import io
import json

import pytest
from batch_child import one_job
from batchlib.cells import read_cell
from batchlib.table import read_table
from hostlib import cli
from hostlib.errors import HostError, WrongArguments


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
