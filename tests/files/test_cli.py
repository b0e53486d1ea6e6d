"""`python -m tlora_core`: the files it writes, its output and its exit status."""

import re
import subprocess
import sys

import pytest
import torch
from foreign_files import WIDTH, reference_orthogonal, unet_layers
from places import REPO
from safetensors.torch import save_file

from tlora_core import RankSchedule, TLoRAFile, __version__
from tlora_core.cli import main
from tlora_core.files.foreign import load_any


@pytest.fixture
def lora_file(tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(reference_orthogonal()[0], path)
    return path


def test_convert_to_our_file(lora_file, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(lora_file), str(out), "--min-rank", "1", "--alpha", "2", "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n" and "16 layers matched" in printed.err
    assert TLoRAFile.load(out).schedule == RankSchedule(4, 1, 2.0)


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "comfyui"])
def test_convert_to_a_plain_lora(lora_file, tmp_path, layout):
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(lora_file), str(out), "--to", layout]) == 0
    assert load_any(out).tlora.method == "lora"


def test_convert_to_the_references_folder(lora_file, tmp_path, capsys):
    assert main(["convert", str(lora_file), str(tmp_path / "run"), "--to", "reference", "--min-rank", "3"]) == 0
    assert load_any(capsys.readouterr().out.strip()).tlora.schedule == RankSchedule(4, 3)


def test_info(lora_file, capsys):
    assert main(["info", str(lora_file)]) == 0
    printed = capsys.readouterr().out
    assert "reference file" in printed and "min_rank 2" in printed and "effective rank" in printed


@pytest.mark.parametrize(
    ("how", "names"),
    [
        (["--at", "1"], ["out.safetensors"]),
        (["--interval", "1", "0"], ["out.safetensors"]),
        (["--parts", "3"], ["outpart1.safetensors", "outpart2.safetensors", "outpart3.safetensors"]),
    ],
)
def test_bake(lora_file, tmp_path, how, names, capsys):
    folder = tmp_path / "baked"
    folder.mkdir()
    assert main(["bake", str(lora_file), str(folder / "out.safetensors"), *how]) == 0
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len(capsys.readouterr().out.splitlines()) == len(names)
    assert all(load_any(path).tlora.method == "lora" for path in folder.iterdir())


@pytest.mark.parametrize("command", [["convert"], ["bake", "--at", "1"]])
def test_a_file_that_is_there_stays_unless_forced(lora_file, tmp_path, command, capsys):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    arguments = [command[0], str(lora_file), str(out), *command[1:]]
    assert main(arguments) == 1
    assert "already exists" in capsys.readouterr().err and out.read_bytes() == b"old"
    assert main([*arguments, "--force"]) == 0 and out.read_bytes() != b"old"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["info"],
        ["convert", "a", "b", "--to", "x"],
        ["bake", "a", "b"],
        ["bake", "a", "b", "--at", "1", "--parts", "2"],
        ["info", "a", "--min-rank", "x"],
    ],
)
def test_a_command_that_cannot_be_understood_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: python -m tlora_core" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["--version"]])
def test_help_and_version_end_with_0(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and (__version__ in printed or "usage: python -m tlora_core" in printed)


def test_a_refused_value_is_one_sentence(lora_file, tmp_path, capsys):
    assert main(["convert", str(lora_file), str(tmp_path / "out"), "--min-rank", "5"]) == 1
    assert capsys.readouterr().err == (
        'error: "pytorch_lora_weights.safetensors": min_rank is 5; '
        "set it to a whole number from 0 to the rank, which is 4.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [([], 0, "16 layers matched"), (["--min-rank", "5"], 1, "min_rank is 5"), (["-x"], 2, "usage:")],
)
def test_it_runs_as_a_module_without_comfyui_and_ends_with_its_status(lora_file, arguments, status, words):
    command = [sys.executable, "-m", "tlora_core", "info", str(lora_file), *arguments]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == status and words in (ended.stderr if status else ended.stdout)
    assert "Traceback" not in ended.stderr


def test_ctrl_c_ends_with_130(monkeypatch, lora_file):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tlora_core.cli.load_any", interrupted)
    assert main(["info", str(lora_file)]) == 130


DIFFUSERS_FLUX = {  # rows of double_blocks.0.img_attn.qkv
    "transformer_blocks.0.attn.to_q": 0,
    "transformer_blocks.0.attn.to_k": 1,
    "transformer_blocks.0.attn.to_v": 2,
}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_base_terms_from_a_model_file_of_either_layout(tmp_path, capsys, layout, model):
    g = torch.Generator().manual_seed(0)
    if model == "sdxl":
        name, path, row = *next(unet_layers())[:2], 0
        weights = {name: torch.randn(WIDTH, WIDTH, generator=g)}
        original = {f"model.diffusion_model.{path}.weight": weights[name]}
    else:
        name, path, row = "transformer_blocks.0.attn.to_v", "double_blocks.0.img_attn.qkv", 2 * WIDTH
        weights = {module: torch.randn(WIDTH, WIDTH, generator=g) for module in DIFFUSERS_FLUX}
        original = {f"{path}.weight": torch.cat(list(weights.values()))}
    U, S, Vh = torch.linalg.svd(weights[name])
    key = "lycoris_" + name.replace(".", "_")
    trained = {"q_layer.weight": Vh[:3] + 0.01, "p_layer.weight": U[:, :3] - 0.01, "lambda_layer": S[None, :3] * 1.1}
    save_file(
        {f"{key}.{part}": value.contiguous() for part, value in trained.items()}, tmp_path / "lycoris.safetensors"
    )
    stored = original if layout == "original" else {f"{module}.weight": weight for module, weight in weights.items()}
    save_file(stored, tmp_path / "model.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["convert", str(tmp_path / "lycoris.safetensors"), str(out), "--dtype", "float32"]
    assert main(arguments) == 1 and "connect the model" in capsys.readouterr().err
    assert main([*arguments, "--model", str(tmp_path / "lycoris.safetensors")]) == 1
    assert "holds no U-Net or FLUX transformer" in capsys.readouterr().err
    assert main([*arguments, "--model", str(tmp_path / "model.safetensors")]) == 0
    assert "base terms recomputed: 1 of 1\n" in capsys.readouterr().err
    layer = TLoRAFile.load(out).layers[path + (f"@{row}" if row else "")]
    want = (U[:, :3] - 0.01) * (S[:3] * 1.1) @ (Vh[:3] + 0.01) - U[:, :3] * S[:3] @ Vh[:3]
    torch.testing.assert_close(layer.up @ layer.down, want, rtol=1e-3, atol=1e-4)


def test_a_model_that_cannot_be_used_is_one_sentence(lora_file, tmp_path, capsys):
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    one_block = {f"down_blocks.0.resnets.{i}.time_emb_proj.weight": torch.ones(2, 2) for i in range(3)}
    save_file(one_block, tmp_path / "three.safetensors")
    for name, words in {
        "gone.safetensors": "there is no such file",
        "other.safetensors": "holds no U-Net or FLUX transformer; .* of a diffusers pipeline.",
        "model-00001-of-00002.safetensors": "one of several parts",
        "three.safetensors": "3 residual blocks a level",
    }.items():
        assert main(["info", str(lora_file), "--model", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f'error: model "{name}": ') and re.search(words, error) and error.count("\n") == 1, (
            error
        )
