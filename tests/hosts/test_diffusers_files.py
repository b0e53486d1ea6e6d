"""Files in diffusers: what a pipeline loads, how diffusers' own loader reads our files, and the README's example."""

import logging
import re

import pytest
import torch
from diffusers_twins import LAYERS, evaluate, with_layers
from foreign_files import pairs
from places import REPO
from safetensors.torch import save_file

import tlora_core
from tlora_core import RankSchedule
from tlora_core.files.layer_names import layer_of, plain_name

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; tools/host.py test installs it")
pytestmark = pytest.mark.usefixtures("one_thread")

README = REPO / "README.md"


def peft_file(twins, path):
    """A plain LoRA of rank 2 in PEFT's names on all of the denoiser's attention projections."""
    shapes = {
        name: (layer.out_features, layer.in_features)
        for name, layer in twins.denoiser.named_modules()
        if re.search(r"attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj)$", name)
    }
    layers, part = (
        pairs([(name, *shape) for name, shape in shapes.items()], 2),
        "unet" if twins.kind == "sdxl" else "transformer",
    )
    state = {}
    for name, (up, down) in layers.items():
        state |= {f"{part}.{name}.lora_B.weight": up * 0.1, f"{part}.{name}.lora_A.weight": down}
    save_file(state, path)
    return layers


def test_a_lora_of_peft_acts_as_merged(twins, tmp_path, caplog):
    layers = peft_file(twins, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        tlora = tlora_core.load(tmp_path / "a.safetensors", twins.pipe)
    assert len(tlora.layers) == len(layers) and tlora.schedule == RankSchedule(2, 2)
    assert "a.safetensors" in caplog.text and "set min_rank" in caplog.text
    with tlora_core.apply(twins.pipe, tlora):
        adapted = evaluate(twins, 0.5)
    kept = {name: twins.denoiser.get_submodule(name).weight.data.clone() for name in layers}
    for name, (up, down) in layers.items():
        twins.denoiser.get_submodule(name).weight.data += up * 0.1 @ down
    merged = evaluate(twins, 0.5)
    for name, weight in kept.items():
        twins.denoiser.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(adapted, merged, rtol=1e-3, atol=1e-4)
    scheduled = tlora_core.load(tmp_path / "a.safetensors", twins.pipe, min_rank=1)
    assert scheduled.schedule == RankSchedule(2, 1)


def test_diffusers_own_loader_reads_our_file_as_a_plain_lora(twins, tmp_path):
    tlora = twins.tlora(split=("qkv",))
    if twins.kind == "flux":  # rows of fused modules only, as trained on diffusers' projections
        tlora = with_layers(tlora, {name: layer for name, layer in tlora.layers.items() if "linear1" not in name})
    tlora.save(tmp_path / "a.safetensors")
    options = {"unet_config": twins.pipe.unet.config} if twins.kind == "sdxl" else {}
    state = twins.pipe.lora_state_dict(str(tmp_path / "a.safetensors"), **options)
    state = state[0] if isinstance(state, tuple) else state
    loaded = {}
    for key, tensor in state.items():
        module, part = re.fullmatch(r"(.+?)[._](lora_A|lora_B|lora\.down|lora\.up)\.weight", key).groups()
        loaded.setdefault(layer_of(plain_name(module)), {})[
            part.replace("lora.down", "lora_A").replace("lora.up", "lora_B")
        ] = tensor
    assert len(loaded) == len(tlora.layers)
    for place, parts in loaded.items():
        layer = tlora.layers[place.layer(parts["lora_A"].shape[1])]
        torch.testing.assert_close(parts["lora_B"] @ parts["lora_A"], layer.up @ layer.down, rtol=1e-4, atol=1e-4)


def test_lycoris_base_terms_come_from_the_pipelines_weights(twins, tmp_path):
    name, comfy_name, row = LAYERS[twins.kind]
    weight = twins.denoiser.get_submodule(name).weight.detach()
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    key = "lycoris_" + name.replace(".", "_")
    trained = {"q_layer.weight": Vh[:3] + 0.01, "p_layer.weight": U[:, :3] - 0.01, "lambda_layer": S[None, :3] * 1.1}
    save_file(
        {f"{key}.{part}": value.float().contiguous() for part, value in trained.items()}, tmp_path / "a.safetensors"
    )
    told = []
    tlora = tlora_core.load(tmp_path / "a.safetensors", twins.pipe, progress=lambda *count: told.append(count))
    (layer,) = tlora.layers.values()
    assert list(tlora.layers) == [comfy_name + (f"@{row}" if row else "")] and told == [(0, 1), (1, 1)]
    want = (U[:, :3] - 0.01) * (S[:3] * 1.1) @ (Vh[:3] + 0.01) - U[:, :3] * S[:3] @ Vh[:3]
    assert ((layer.up @ layer.down).double() - want).norm() < 1e-4 * want.norm()


def test_the_readmes_example_runs(twins, tmp_path, monkeypatch):
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
        if "tlora_core.apply" in block
    )
    ours = [line for line in example.splitlines() if "tlora_core" in line or line.startswith("handle")]
    assert len(ours) == 4 and ours[0].startswith("import"), ours
    twins.tlora().save(tmp_path / "my_subject.safetensors")
    monkeypatch.chdir(tmp_path)
    bare, names = evaluate(twins, 0.5), {"pipe": twins.pipe}
    exec("\n".join(ours[:3]), names)
    assert not torch.equal(evaluate(twins, 0.5), bare)
    exec(ours[3], names)
    assert torch.equal(evaluate(twins, 0.5), bare)
