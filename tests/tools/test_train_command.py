"""`tools/host.py train` and tlora_core.train: the same runs as the node's, their results and how they end."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hostlib import cli, commands
from hostlib.build import Host
from places import REPO
from trainlib import arguments, job

JOB = REPO / "tools" / "trainlib" / "job.py"
INPUTS = {
    "method": "tlora",
    "rank": "4",
    "min_rank": "2",
    "steps": "8",
    "learning_rate": "0.01",
}


def write_picture(path, seed=5):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def parsed(*argv):
    return arguments.job_of(cli.parse(["train", *map(str, argv)]))


def asked(picture, *more, **inputs):
    sets = [f"--set={name}={value}" for name, value in {**INPUTS, "file_name": "run/command", **inputs}.items()]
    return parsed("--model", "tiny", "--image", picture, "--class-word", "heart", *sets, "--json", *more)


@pytest.fixture
def in_process(comfy, output, monkeypatch, capsys):
    """Runs a job in this process, with the folders of `output`; gives its status, the JSON and what it said."""
    monkeypatch.setattr(job, "make_importable", lambda comfyui: None)
    monkeypatch.setattr(job, "start_as_usual", lambda options: None)

    def run(asked):
        status = job.main({**asked, "comfyui": "", "host_arguments": []})
        said = capsys.readouterr()
        return status, json.loads(said.out), said.err

    return run


# --- in a process of its own, beside the real server ---


def started(server, asked):
    options = ["--cpu", "--base-directory", str(server.workspace)]
    whole = {**asked, "comfyui": str(server.host.comfyui), "host_arguments": options}
    environment = commands.script_environment(server.host)
    return subprocess.Popen(
        [sys.executable, str(JOB), json.dumps(whole)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate()
    assert out, err
    return process.returncode, json.loads(out), err


def declared(server, node):
    """The node's inputs with their defaults."""
    groups = server.object_info()[node]["input"].values()
    return {name: dict(*given[1:2]).get("default") for group in groups for name, given in group.items()}


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_node_and_the_command_find_each_others_runs_and_make_the_same_bytes(server):
    from graphs import TinyGraph

    picture = write_picture(server.workspace / "input" / "command.png")
    mask = write_picture(server.workspace / "input" / "command_mask.png", seed=6)

    options = declared(server, "TLoRATrainingOptions")
    del options["prior_images"]

    def by_node(file_name):
        graph = TinyGraph()
        node = graph.train(
            image=graph.add("LoadImage", image=picture.name)[0],
            mask=graph.add("LoadImageMask", image=mask.name, channel="red")[0],
            options=graph.add("TLoRATrainingOptions", **{**options, "outside_mask": 0.25})[0],
            class_word="heart",
            steps=8,
            learning_rate=0.01,
            file_name=file_name,
        )
        [name] = server.run(graph).outputs[node.id]["text"]
        return server.workspace / "models" / "loras" / name

    def by_command(**inputs):
        status, result, _ = finished(started(server, asked(picture, "--mask", mask, outside_mask="0.25", **inputs)))
        assert status == 0
        return result["state"], Path(result["file"])

    of_node = by_node("run/command")
    assert by_command(file_name="run/command") == ("found", of_node)
    state, of_command = by_command(file_name="run/again", rerun="restart")
    assert state == "done" and of_command != of_node and digest(of_command) == digest(of_node)
    assert by_node("run/again") == of_command


# --- the job, in this process ---


def test_a_job_prints_one_json_object_and_copies_its_results(in_process, tmp_path):
    prompt = ("--validation-prompt", "a {} on snow", "--set", "validate_every=1")
    mine = asked(write_picture(tmp_path / "heart.png"), "--out", tmp_path / "out", *prompt, steps=1)
    status, result, said = in_process(mine)
    assert (status, result["state"], result["steps"]) == (0, "done", 1)
    assert result["name"] == "run/command_00001_.safetensors"
    assert "training, loss" in said and "1 steps of adamw" in said
    copied = {"command_00001_.safetensors", "step_000001.png", "loss.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied
    assert digest(tmp_path / "out" / "command_00001_.safetensors") == digest(result["file"])
    assert in_process(mine)[1]["state"] == "found" and len(list((tmp_path / "out").iterdir())) == len(copied)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_state_and_the_same_command_goes_on(in_process, tmp_path, monkeypatch, number, status):
    import training_runs

    before = signal.getsignal(number)
    mine = asked(write_picture(tmp_path / "heart.png"), checkpoint_every=0)
    with monkeypatch.context() as patch:
        training_runs.Wish(patch, 3, lambda live: signal.raise_signal(number))
        ended, result, said = in_process(mine)
    assert (ended, result["state"]) == (status, "cancelled") and signal.getsignal(number) == before
    assert said.splitlines()[-1] == result["error"] and "The same command goes on." in result["error"]
    ended, result, said = in_process(mine)
    assert (ended, result["state"], result["steps"]) == (0, "done", 8) and "resuming an earlier run at step" in said


@pytest.mark.parametrize(
    "inputs, status, said",
    [
        ({"rnak": 4}, 2, 'There is no input "rnak"'),
        ({"rank": "four"}, 2, "rank is 'four'; give a whole number."),
        ({"flip": "maybe"}, 2, "flip is 'maybe'; give true or false."),
        ({"min_rank": 9}, 2, "min_rank"),
        ({"prior_weight": -1}, 2, "prior_weight is -1.0; set it to 0 or more."),
        ({"rerun": "never"}, 2, 'rerun is "never"; choose one of auto, continue, restart.'),
        ({"memory": "high"}, 1, 'memory is "high"; choose one of'),
        ({"keep": "best"}, 2, 'keep is "best", but nothing scores the steps'),
    ],
)
def test_wrong_inputs_end_with_one_sentence(in_process, tmp_path, inputs, status, said):
    ended, result, errors = in_process(asked(write_picture(tmp_path / "heart.png"), **inputs))
    assert (ended, result["state"]) == (status, "failed") and said in result["error"]
    assert errors == f"Error: {result['error']}\n"


@pytest.mark.parametrize(
    "option, value, said",
    [
        ("--image", "gone.png", "there is no such file"),
        ("--image", __file__, "cannot read as a picture"),
        ("--model", "gone.safetensors", "neither a file nor in"),
        ("--model", "model.gguf", "in a workflow"),
        ("--vae", "gone.safetensors", "neither a file nor in"),
        ("--clip", "gone.safetensors", "clip_type is missing"),
    ],
)
def test_a_missing_or_wrong_file_is_named(in_process, tmp_path, option, value, said):
    status, result, _ = in_process(asked(write_picture(tmp_path / "heart.png"), option, value))
    name = option.removeprefix("--")
    assert status == 1 and said in result["error"] and (value in result["error"] or "clip_type" in said), name


def test_a_job_scores_its_steps_and_tells_which_one_it_kept(in_process, tmp_path):
    scored = {"scorer": "tiny world", "keep": "best", "validate_every": 2, "score_seeds": 1, "steps": 4}
    mine = asked(write_picture(tmp_path / "heart.png"), "--validation-prompt", "a {} in the snow", **scored)
    status, result, _ = in_process(mine)
    assert (status, result["state"], result["steps"]) == (0, "done", 4)
    assert [scores["step"] for scores in result["scores"]] == [0, 2, 4]
    assert all(-1 <= scores["likeness"] <= 1 and 0 <= scores["obedience"] <= 1 for scores in result["scores"])
    assert result["why"].startswith(f"The file holds step {result['kept_step']}: ") and result["kept_step"] in (2, 4)
    found = in_process(mine)[1]
    assert found["state"] == "found" and all(found[name] == result[name] for name in ("scores", "why", "kept_step"))


def test_an_unexpected_error_is_one_line_without_verbose(in_process, tmp_path, monkeypatch):
    import tlora_core

    def broken(**everything):
        print("Packages print here, where only the JSON may stand.")
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(tlora_core, "train", broken)
    mine = asked(write_picture(tmp_path / "heart.png"))
    assert in_process(mine)[2].endswith("\nError: RuntimeError: two lines (--verbose shows where)\n")
    assert "Traceback" in in_process({**mine, "verbose": True})[2]


# --- the call ---


def test_a_call_takes_what_is_loaded_and_finds_the_nodes_run(base, output):
    import training_runs

    import tlora_core

    model, clip, vae = base
    pixels = training_runs.images()[0].pixels[None]
    of_node = training_runs.run(base, file_name="run/heart")
    plain = {"class_word": "heart", "method": "tlora", "rank": 4, "min_rank": 2, "alpha": 1, "resolution": 64}
    found = tlora_core.train(
        model, pixels, clip=clip, vae=vae, steps=6, learning_rate=0.01, file_name="run/heart", **plain
    )
    assert (found.file, found.losses) == (of_node.file, of_node.losses)
    assert found.path == output / "loras" / of_node.file and found.folder == training_runs.folders(output)[0]


def test_a_call_has_the_inputs_and_the_defaults_of_the_nodes(server, base, output, monkeypatch):
    import training_runs

    import tlora_core
    from tlora_core.hosts.comfy.training import by_name, headless

    inputs = {**declared(server, "TLoRATrainFromImage"), **declared(server, "TLoRATrainingOptions")}
    sockets = {"model", "clip", "vae", "image", "mask", "more_images", "options", "prior_images", "clip_vision"}
    hidden = {"unique_id", "prompt", "extra_pnginfo"}
    plain = {name: value for name, value in inputs.items() if name not in sockets | hidden}
    assert set(plain) == set(by_name.input_kinds()) - {"beta1", "beta2"}
    asked = []
    monkeypatch.setattr(by_name, "train_or_find", lambda *given: asked.append(given[4:]))
    model, clip, vae = base
    del plain["captions"]
    images = training_runs.images()
    by_name.trained(images, model=model, clip=clip, vae=vae, **plain)
    tlora_core.train(model, images[0].pixels[None], clip=clip, vae=vae, class_word="dog")
    assert asked[0] == asked[1]
    assert headless.DEFAULTS == {name: plain[name] for name in headless.DEFAULTS}


def test_three_files_go_through_the_hosts_own_loaders(comfy, tmp_path, monkeypatch):
    import comfy.clip_vision
    import comfy.sd
    import comfy.utils
    import folder_paths

    from tlora_core.hosts.comfy.loaders import load_clip_vision
    from tlora_core.hosts.comfy.training.headless import loaded

    class Vae:
        def __init__(self, sd, metadata=None):
            self.sd, self.patcher = sd, type("Patcher", (), {})()

        def throw_exception_if_invalid(self):
            pass

    # Two of them have one name, in two folders.
    paths = {name: str(tmp_path / name / f"{name.strip('2')}.safetensors") for name in ("u", "a", "a2", "v")}
    for path in map(Path, paths.values()):
        path.parent.mkdir()
        path.touch()
    before = {kind: list(folders[0]) for kind, folders in folder_paths.folder_names_and_paths.items()}
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda path, model_options: ("unet", path, model_options))
    monkeypatch.setattr(
        comfy.sd, "load_clip", lambda ckpt_paths, clip_type, **others: ("clip", ckpt_paths, clip_type.name)
    )
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda path, **others: (path, {}))
    monkeypatch.setattr(comfy.sd, "VAE", Vae)
    kept = {"vae": paths["v"], "weight_dtype": "fp8_e4m3fn"}
    unet, clip, vae = loaded(None, paths["u"], [paths["a"], paths["a2"]], clip_type="flux", **kept)
    assert unet[:2] == ("unet", paths["u"]) and str(unet[2]["dtype"]) == "torch.float8_e4m3fn"
    assert clip == ("clip", [paths["a"], paths["a2"]], "FLUX") and vae.sd == paths["v"]
    for name in ("a", "a2"):
        _, clip, _ = loaded(None, paths["u"], paths[name], clip_type="lumina2", **kept)
        assert clip == ("clip", [paths[name]], "LUMINA2")
    assert before == {kind: list(folders[0]) for kind, folders in folder_paths.folder_names_and_paths.items()}
    monkeypatch.setattr(comfy.clip_vision, "load", lambda path: ("clip vision", path))
    assert load_clip_vision(paths["a"]) == ("clip vision", paths["a"])
    with pytest.raises(ValueError, match='clip_type is "fluks"; choose one of .*lumina2'):
        loaded(None, paths["u"], paths["a"], clip_type="fluks", **kept)
    with pytest.raises(ValueError, match="vae is missing"):
        loaded(None, paths["u"], paths["a"], None, "lumina2", "default")


def test_prompts_are_drawn_every_hundred_steps_if_nothing_else_is_said(comfy, output):
    from tlora_core.hosts.comfy.training.headless import completed_inputs

    prompts = {"class_word": "dog", "validation_prompts": "a {}"}
    assert completed_inputs(prompts)["validate_every"] == 100
    assert completed_inputs({**prompts, "validate_every": 0})["validate_every"] == 0
    assert completed_inputs({"class_word": "dog", "scorer": "tiny world"})["validate_every"] == 100
    assert completed_inputs({"class_word": "dog", "keep": "best"}, has_clip_vision=True)["validate_every"] == 100


# --- the command line ---


def test_the_command_starts_the_job_in_the_hosts_environment(monkeypatch, tmp_path):
    ran = []
    host = Host(tmp_path / "ComfyUI", Path(sys.executable), "0", ours=False)
    monkeypatch.setattr(commands, "chosen_host", lambda args: host)
    monkeypatch.setattr(commands, "has_accelerator", lambda python: False)
    monkeypatch.setattr(commands, "run_foreground", lambda *given: ran.append(given) or 7)
    flux = ["--unet", "u", "--clip", "a", "b", "--clip-type", "flux", "--vae", "v"]
    assert (
        cli.main(["train", *flux, "--image", "x.png", "y.png", "--class-word", "dog", "--set", "curve=0:4, 1:2"]) == 7
    )
    [[command, environment]] = ran
    assert command[:2] == [sys.executable, str(JOB)]
    started = json.loads(command[2])
    assert started["parts"] == {"unet": "u", "clip": ["a", "b"], "clip_type": "flux", "vae": "v"}
    assert started["files"] == {"image": ["x.png", "y.png"]}
    assert started["inputs"] == {"class_word": "dog", "curve": "0:4, 1:2"}
    assert started["host_arguments"] == ["--cpu"] and environment["TLORA_COMFYUI"] == str(host.comfyui)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--model", "m", "--image", "i"], "--class-word is missing"),
        (["--model", "m", "--class-word", "dog"], "--image is missing"),
        (["--image", "i", "--class-word", "dog"], "Give either --model, or --unet"),
        (["--model", "m", "--unet", "u", "--image", "i", "--class-word", "dog"], "Give either --model, or --unet"),
        (["--model", "m", "--image", "i", "--class-word", "dog", "--set", "rank"], "--set needs NAME=VALUE"),
    ],
)
def test_wrong_arguments_end_with_status_2(argv, said, capsys):
    assert cli.main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and said in error and error.count("\n") == 1
