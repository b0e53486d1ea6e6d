"""`train --from-reference`: command lines of the paper's authors' code."""

import json
import re

import pytest
from hostlib import cli
from hostlib.errors import WrongArguments
from places import REPO
from trainlib import arguments, reference

# As a README prints such a line: variables, and comments after the backslashes.
SDXL_LINE = r"""
export MODEL_NAME="{folder}/sdxl.safetensors"
export INSTANCE_DIR={folder}/pictures

accelerate launch --num_processes=1 train.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --train_data_dir=${INSTANCE_DIR} \
  --output_dir="{folder}/my results" \
  --mixed_precision="no" \
  --trainer_type="ortho_lora" \  # or "lora"
  --trainer_class="sdxl_tlora" \
  --num_train_epochs=700 \
  --checkpointing_steps=50 \
  --validation_prompts="a {0} in bed#a {0} swimming" \  # separated by #
  --placeholder_token="sks" \
  --class_name="dog" \
  --lora_rank=64 --min_rank 32 \
  --one_image="02.jpg" \
"""
FLUX_LINE = (
    "accelerate launch run.py --pretrained_model_name_or_path {folder}/sdxl.safetensors --instance_data_dir "
    "{folder}/pictures --output_dir out --class_name dog --tlora --rank 32 --min_rank=8 --max_train_steps 300"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sdxl.safetensors").touch()
    for name in ("pictures", "masks", "dogs"):
        (tmp_path / name).mkdir()
        for number in ("01", "02"):
            (tmp_path / name / f"{number}.{'png' if name == 'masks' else 'jpg'}").touch()
    (tmp_path / "pictures" / "notes.txt").touch()
    return tmp_path


def job_of(line, folder, *more):
    line = line.replace("{folder}", str(folder))
    return arguments.job_of(cli.parse(["train", "--from-reference", line, *map(str, more)]))


def test_a_line_for_sdxl_becomes_a_job(folder):
    job = job_of(SDXL_LINE, folder)
    assert job["parts"] == {"model": f"{folder}/sdxl.safetensors"}
    assert job["files"] == {"image": [f"{folder}/pictures/02.jpg"]} and job["out"] == f"{folder}/my results"
    assert job["inputs"] == {
        "token": "sks",
        "class_word": "dog",
        "method": "tlora",
        "start": "last_random_published",
        "rank": 64,
        "min_rank": 32,
        "alpha": 1.0,
        "steps": 700,
        "resolution": 1024,
        "seed": 0,
        "batch_size": 1,
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 1e-4,
        "checkpoint_every": 50,
        "checkpoint_files": True,
        "validation_prompts": "a {} in bed\na {} swimming",
        "validate_every": 50,
        "wandb": False,
    }
    assert job["notes"] == ["Not used: mixed_precision (ComfyUI chooses the precision for the model and the card)."]


def test_a_line_for_flux_becomes_a_job(folder):
    job = job_of(f"{FLUX_LINE} --mask_dir {folder}/masks", folder, "--unet", "flux", "--clip-type", "flux")
    assert job["parts"] == {"unet": "flux", "clip_type": "flux"}
    assert job["files"] == {
        "image": [f"{folder}/pictures/{number}.jpg" for number in ("01", "02")],
        "mask": [f"{folder}/masks/{number}.png" for number in ("01", "02")],
    }
    inputs = job["inputs"]
    assert (inputs["method"], inputs["rank"], inputs["min_rank"], inputs["steps"]) == ("vanilla_tlora", 32, 8, 300)
    assert (inputs["optimizer"], inputs["learning_rate"], inputs["max_grad_norm"]) == ("prodigy", 1.0, 1.0)
    assert len(inputs["validation_prompts"].splitlines()) == 3  # that code's own


@pytest.mark.parametrize(
    "kind, trainer, sigma, method, start",
    [
        ("lora", "sdxl_lora", "last", "lora", None),
        ("lora", "sdxl_tlora", "last", "vanilla_tlora", None),
        ("ortho_lora", "sdxl_lora", "middle", "ortho_lora", "middle_random"),
        ("ortho_lora", "sdxl_tlora", "principal", "tlora", "principal_random"),
        ("lortho_lora", "sdxl_tlora", "principal", "tlora", "principal_weight"),
    ],
)
def test_the_trainers_are_our_methods_and_starts(folder, kind, trainer, sigma, method, start):
    line = SDXL_LINE.replace('"ortho_lora"', kind).replace('"sdxl_tlora"', f"{trainer} --sig_type {sigma}")
    inputs = job_of(line, folder)["inputs"]
    assert (inputs["method"], inputs.get("start")) == (method, start)


def other_value(name, option, folder):
    if name in ("class_data_dir", "train_data_dir", "instance_data_dir"):
        return f"{folder}/dogs"
    if name == "mask_dir":
        return f"{folder}/masks"
    if name == "pretrained_model_name_or_path":
        return "gone"
    if option.choices:
        return option.choices[-1] if option.choices[-1] not in ("sdxl_tlora", "last") else option.choices[0]
    if isinstance(option.default, str):
        return {"optimizer": "AdamW", "one_image": "01.jpg"}.get(name, "another")
    return option.default + type(option.default)(1)


@pytest.mark.parametrize("code", ["SDXL", "FLUX"])
def test_every_option_is_taken_over_or_noted_or_refused(folder, code):
    line = SDXL_LINE.rstrip("\\\n ") if code == "SDXL" else FLUX_LINE.replace(" --tlora", "")
    line = line.replace('--mixed_precision="no"', "")
    for name, option in getattr(reference, code).items():
        given = f"--{name}" if option.default is False else f"--{name}={other_value(name, option, folder)}"
        needed = f"--class_data_dir={folder}/dogs" if name == "with_prior_preservation" else ""
        before = job_of(f"{line} {needed}", folder)
        try:
            after = job_of(f"{line} {needed} {given}", folder)
        except WrongArguments as error:
            assert name in str(error), name
        else:
            assert after != before, name


@pytest.mark.parametrize(
    "more, said",
    [
        ("--learning_rat=1", "unknown option --learning_rat=1"),
        ("surplus", "unknown option surplus"),
        ("--adam_epsilon=1e-6", "adam_epsilon is 1e-06, and only 1e-08 is supported"),
        ("--sig_type=first", "sig_type"),
        ("--lora_rank=many", "lora_rank"),
        ("--output_dir=$NOWHERE", "output_dir is $NOWHERE, a variable that is not set"),
        ("--train_data_dir=gone", "train_data_dir is gone"),
        ("--one_image=03.jpg", "holds no picture 03.jpg"),
        ("--with_prior_preservation", "class_data_dir is missing"),
        ("--pretrained_model_name_or_path=stabilityai/x", "name the file of that model for ComfyUI with --model"),
        ("--class_name='dog", "cannot be read"),
        ("--prompts=a", "this one draws"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_sentence(folder, more, said, capsys):
    line = f"{SDXL_LINE.rstrip(chr(92) + chr(10) + ' ')} {more}".replace("{folder}", str(folder))
    assert cli.main(["train", "--from-reference", line]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: --from-reference") and said in error and error.count("\n") == 1


def test_a_hash_in_a_word_or_in_quotes_begins_no_comment(folder):
    line = SDXL_LINE.replace('"a {0} in bed#a {0} swimming" \\  # separated by #', "a#b \\")
    assert job_of(line, folder)["inputs"]["validation_prompts"] == "a\nb"
    assert job_of(line.replace("=a#b", ' "#a"'), folder)["inputs"]["validation_prompts"] == "a"


def test_options_beside_a_line_win(folder):
    job = job_of(SDXL_LINE, folder, *"--image x.png --model m --token qqq --set rank=8 --out o".split())
    assert (job["files"]["image"], job["parts"]["model"], job["out"]) == (["x.png"], "m", "o")
    assert (job["inputs"]["token"], job["inputs"]["rank"]) == ("qqq", "8")


def test_the_key_of_the_tracking_service_goes_where_its_package_looks(folder):
    job = job_of(SDXL_LINE.rstrip("\\\n ") + " --wandb_api_key=secret", folder)
    assert job["inputs"]["wandb"] is True and job["environment"] == {"WANDB_API_KEY": "secret"}
    assert "secret" not in json.dumps({**job, "environment": {}})


def test_the_page_has_a_row_for_every_option():
    page = (REPO / "docs" / "REFERENCE_COMMANDS.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"`--(\w+)", "\n".join(line for line in page.splitlines() if line.startswith("|"))))
    assert {*reference.SDXL, *reference.FLUX} - rows == set()
