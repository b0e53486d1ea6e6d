"""LyCORIS' T-LoRAs: their base term is recomputed from the model's weights, or the file is refused."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from foreign_files import assert_close, generator, masked, reference_orthogonal, target_with, unet_layers, update
from graphs import TinyGraph
from places import REPO
from safetensors import safe_open
from safetensors.torch import save_file

from tlora_core import RankSchedule, TLoRAError, TLoRAFile
from tlora_core.files.foreign import load_any, orthogonal
from tlora_core.files.foreign.orthogonal import singular_vectors
from tlora_core.files.layer_names import plain_name
from tlora_core.method.starts import exact_device

TINY_BASE = REPO / "tlora_core" / "tiny" / "weights" / "tiny_base.safetensors"


def lycoris_file(path, rank=3, first=0, alpha=2.0, moved=0.05, sign=1.0, start=None):
    """A LyCORIS file of two layers; returns its weights by ComfyUI's name, and the updates at each rank."""
    g, state, weights, updates = generator(3), {}, {}, {}
    for diffusers, ldm, o, i in list(unet_layers())[:2]:
        weight = weights[ldm] = torch.randn(o, i, generator=g)
        U, S, Vh = torch.linalg.svd(weight if start is None else torch.randn(o, i, generator=g), full_matrices=False)
        kept = slice(first, first + rank)
        base = (U[:, kept] * sign, S[kept], Vh[kept] * sign)
        trained = tuple(part + moved * torch.randn(part.shape, generator=g) for part in base)
        key = "lycoris_" + diffusers.replace(".", "_")
        state |= {
            f"{key}.q_layer.weight": trained[2].contiguous(),
            f"{key}.p_layer.weight": trained[0].contiguous(),
            f"{key}.lambda_layer": trained[1][None],
            f"{key}.alpha": torch.tensor(alpha),
        }
        updates[ldm] = [alpha / rank * (masked(trained, r) - masked(base, r)) for r in range(1, rank + 1)]
    save_file(state, path)
    return weights, updates


@pytest.mark.parametrize(("first", "sign"), [(0, 1.0), (0, -1.0), (9, 1.0), (4, 1.0)])
def test_lycoris_base_is_made_again_from_the_weights(tmp_path, first, sign):
    # Principal, last and middle components; signs of singular vectors differ between machines.
    weights, updates = lycoris_file(tmp_path / "a.safetensors", first=first, sign=sign)
    loaded = load_any(tmp_path / "a.safetensors", target_with(weights))
    assert (
        loaded.kind == "LyCORIS T-LoRA"
        and loaded.tlora.method == "tlora"
        and loaded.tlora.schedule == RankSchedule(3, 1)
    )
    for name, by_rank in updates.items():
        for r, want in enumerate(by_rank, 1):
            assert_close(update(loaded.tlora.layers[name], r), want, 1e-4)


def test_lycoris_stays_a_small_difference_whatever_the_signs(tmp_path):
    weights, updates = lycoris_file(tmp_path / "a.safetensors", moved=1e-3, sign=-1.0)
    load_any(tmp_path / "a.safetensors", target_with(weights)).tlora.save(tmp_path / "b.safetensors", torch.float16)
    for name, layer in TLoRAFile.load(tmp_path / "b.safetensors").layers.items():
        assert_close(update(layer, 3), updates[name][-1], 5e-3)


def test_lycoris_without_the_model_is_refused(tmp_path):
    lycoris_file(tmp_path / "a.safetensors")
    with pytest.raises(TLoRAError, match="base term is not stored.* connect the model"):
        load_any(tmp_path / "a.safetensors")


def test_lycoris_from_a_random_start_or_another_model_is_refused(tmp_path):
    weights, _ = lycoris_file(tmp_path / "a.safetensors", start="random")
    with pytest.raises(TLoRAError, match="random start, which cannot be recomputed"):
        load_any(tmp_path / "a.safetensors", target_with(weights))


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
def test_the_decomposition_is_exact_for_every_component(shape):
    g = generator()
    weight = torch.randn(shape, generator=g) + 10 * torch.randn(shape[0], 2, generator=g) @ torch.randn(
        2, shape[1], generator=g
    )
    weight[:, -1] = weight[:, 0]  # singular, if it is not wide
    U, S, Vh = singular_vectors(weight)
    want = torch.linalg.svd(weight.double(), full_matrices=False)
    assert (S - want[1]).abs().max() < 1e-5 * S.max()
    for i in range(len(S) - 1):
        one, other = (u[:, i : i + 1] * s[i] @ v[i : i + 1] for u, s, v in ((U, S, Vh), want))
        assert_close(one, other, 1e-5)
    assert_close((U * S) @ Vh, weight.double(), 1e-12)


def test_the_base_term_is_right_to_float32_in_the_real_layers_size(tmp_path):
    g = generator()
    weight = torch.randn(640, 640, generator=g) * 0.02
    U, S, Vh = torch.linalg.svd(weight.double())
    for first in (0, (640 - 64) // 2, 640 - 64):
        kept = slice(first, first + 64)
        B, S_, A = (part.float() for part in (U[:, kept], S[kept], Vh[kept]))
        base = orthogonal._candidate(*singular_vectors(weight), first, (B, S_, A))
        for r in (1, 32, 64):
            assert_close(masked(base, r), U[:, kept][:, :r] * S[kept][:r] @ Vh[kept][:r], 1e-5)


def test_progress_counts_the_base_terms_and_may_stop(tmp_path):
    weights, _ = lycoris_file(tmp_path / "a.safetensors")
    told = []
    load_any(tmp_path / "a.safetensors", target_with(weights), progress=lambda *count: told.append(count))
    assert told == [(0, 2), (1, 2), (2, 2)]

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_any(tmp_path / "a.safetensors", target_with(weights), progress=stop)
    told.clear()
    save_file(reference_orthogonal()[0], tmp_path / "b.safetensors")
    load_any(tmp_path / "b.safetensors", target_with(weights), progress=lambda *count: told.append(count))
    assert not told


def test_weights_are_decomposed_on_the_targets_device(tmp_path):
    weights, _ = lycoris_file(tmp_path / "a.safetensors")
    on_cuda = replace(target_with(weights), device="cuda")
    if torch.cuda.is_available():
        assert load_any(tmp_path / "a.safetensors", on_cuda).tlora.layers
    else:
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            load_any(tmp_path / "a.safetensors", on_cuda)
    assert {exact_device(other).type for other in ("mps", "xpu", "privateuseone")} == {"cpu"} and exact_device(
        torch.device("cuda", 1)
    ).index == 1


def tiny_base_file(path, rank=2):
    """A LyCORIS file of all attention projections of the tiny base; returns their number."""
    state, g = {}, generator()
    with safe_open(TINY_BASE, "pt") as opened:
        for key in opened.keys():
            if re.search(r"diffusion_model\..*attn\d\.to_(q|k|v|out\.0)\.weight$", key):
                U, S, Vh = torch.linalg.svd(opened.get_tensor(key).float(), full_matrices=False)
                name = "lycoris_" + plain_name(key.removesuffix(".weight"))
                state |= {
                    f"{name}.q_layer.weight": (
                        Vh[:rank] + 0.1 * torch.randn(Vh[:rank].shape, generator=g)
                    ).contiguous(),
                    f"{name}.p_layer.weight": U[:, :rank].contiguous(),
                    f"{name}.lambda_layer": S[None, :rank].contiguous(),
                }
    save_file(state, path)
    return len(state) // 3


class Steps:
    """Records what a node reports."""

    def __init__(self):
        self.seen = []

    def step(self, node, _title, value, total):
        self.seen.append((node, value, total))

    def node_started(self, *_): ...

    def finish(self): ...


def test_the_node_shows_progress(server):
    folder = server.workspace / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    count = tiny_base_file(folder / "lycoris.safetensors")
    graph, steps = TinyGraph(), Steps()
    load = graph.add("TLoRALoad", file="lycoris.safetensors", strength=1.0, model=graph.model)
    report = graph.add("PreviewAny", source=load[2])
    result = server.run(graph, listener=steps)
    assert f"LyCORIS T-LoRA: {count} layers matched" in result.outputs[report.id]["text"][0]
    seen = [(value, total) for node, value, total in steps.seen if node == load.id]
    assert seen[-1] == (count, count) and len(seen) > 1


def test_cancel_is_heard_between_layers(comfy, tmp_path):
    import comfy.model_management
    import comfy.utils

    from tlora_core.hosts.comfy.progress import counting

    weights, _ = lycoris_file(tmp_path / "a.safetensors")
    done = []

    def on_progress(value, total, *_, **__):  # as the server's own hook does
        comfy.model_management.throw_exception_if_processing_interrupted()
        done.append(value)

    comfy.utils.set_progress_bar_global_hook(on_progress)
    try:
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            load_any(tmp_path / "a.safetensors", target_with(weights), progress=counting("x", None))
        assert done == []
        load_any(tmp_path / "a.safetensors", target_with(weights), progress=counting("x", None))
        assert done == [1, 2]
    finally:
        comfy.utils.set_progress_bar_global_hook(None)


@pytest.mark.parametrize("train_on", ["model", "patched model"])
def test_a_file_of_the_real_lycoris_gives_its_own_output(comfy, tmp_path, train_on):
    warnings.simplefilter("ignore")
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed; tools/host.py test installs it")
    from host_models import random_unet

    from tlora_core.hosts.comfy.model.description import describe_model

    model = random_unet()
    unet = model.model.diffusion_model
    path = "middle_block.1.transformer_blocks.0.attn1.to_q"
    layer = unet.get_submodule(path)
    with torch.inference_mode(False):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight.data = layer.weight.detach().clone()
        holder = torch.nn.ModuleDict({path.replace(".", "_"): plain})
        lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear"]})
        network = lycoris.create_lycoris(holder, 1.0, linear_dim=6, linear_alpha=3, algo="tlora")
        network.apply_to()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        x = torch.randn(5, layer.in_features, generator=generator())
        for _ in range(3):
            optimizer.zero_grad()
            plain(x).square().mean().backward()
            optimizer.step()
        network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    if train_on == "patched model":  # another LoRA lies on the weight when the file is loaded
        model.add_patches({f"diffusion_model.{path}.weight": (torch.ones_like(layer.weight),)})
        model.patch_model()
    loaded = load_any(tmp_path / "a.safetensors", describe_model(model)).tlora
    assert list(loaded.layers) == [path]
    for r in range(1, 7):
        lycoris.set_timestep_mask(torch.tensor([[1.0] * r + [0.0] * (6 - r)]))
        with torch.no_grad():
            own = plain(x) - torch.nn.functional.linear(x, plain.weight)
        lycoris.clear_timestep_mask()
        assert_close(torch.nn.functional.linear(x.double(), update(loaded.layers[path], r)), own.double(), 1e-4)
    model.unpatch_model()
