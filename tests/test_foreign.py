"""Files of other programs: recognised, matched, converted without loss, and reported; exports are read back the same."""

import json
import warnings

import pytest
import torch
from foreign_files import (
    FLUX_LAYERS,
    RANK,
    SDXL_ATTENTION,
    generator,
    masked,
    orthogonal_parts,
    pairs,
    reference_flux,
    reference_key,
    reference_orthogonal,
    reference_plain,
    reference_run,
    unet_layers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlora_core import RankSchedule, TLoRAError, TLoRAFile
from tlora_core.export import LAYOUTS, export
from tlora_core.foreign import Target, load_any
from tlora_core.names import Place, diffusers_name, layer_of, plain_name


def update(layer, r):
    """The stored update with its first r components on, in float64."""
    columns = r * layer.group
    return layer.up[:, :columns].double() @ layer.down[:columns].double()


def assert_close(have, want, tolerance=1e-5):
    assert (have - want).norm() <= tolerance * want.norm()


def assert_same_updates(have, want, tolerance=1e-5):
    """At every rank."""
    assert have.layers.keys() == want.layers.keys()
    for name, layer in want.layers.items():
        for r in range(1, layer.rank + 1):
            assert_close(update(have.layers[name], r), update(layer, r), tolerance)


# --- the reference's checkpoints ---


@pytest.mark.parametrize(
    ("trainer_class", "method", "schedule"),
    [("sdxl_tlora", "tlora", RankSchedule(4, 1, 2.0)), ("sdxl_lora", "ortho_lora", RankSchedule(4, 4))],
)
def test_reference_orthogonal_gives_its_own_masked_difference(tmp_path, trainer_class, method, schedule):
    state, layers = reference_orthogonal()
    path = reference_run(tmp_path, lambda p: save_file(state, p), trainer_class, alpha=2)
    loaded = load_any(path)
    assert (loaded.tlora.method, loaded.tlora.schedule) == (method, schedule)
    assert not loaded.unmatched and not loaded.notes
    assert loaded.tlora.layers.keys() == layers.keys()
    for name, (trained, base) in layers.items():
        for r in range(1, RANK + 1):
            assert_close(update(loaded.tlora.layers[name], r), masked(trained, r) - masked(base, r))


def test_reference_that_has_hardly_moved_loses_no_digits(tmp_path):
    trained, base = orthogonal_parts(12, 12, moved=1e-3)
    trained, base = (tuple(part.float() for part in parts) for parts in (trained, base))
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora."
    names = ("p_layer.weight", "lambda_layer", "q_layer.weight"), ("base_p.weight", "base_lambda", "base_q.weight")
    state = {key + n: part.contiguous() for parts, ns in zip((trained, base), names) for n, part in zip(ns, parts)}
    save_file(state, tmp_path / "a.safetensors")
    tlora = load_any(tmp_path / "a.safetensors").tlora
    tlora.save(tmp_path / "b.safetensors", torch.float16)
    (layer,) = TLoRAFile.load(tmp_path / "b.safetensors").layers.values()
    assert_close(update(layer, RANK), masked(trained, RANK) - masked(base, RANK), 5e-4)


@pytest.mark.parametrize(
    ("trainer_class", "method", "schedule"),
    [("sdxl_tlora", "vanilla_tlora", RankSchedule(4, 1)), ("sdxl_lora", "lora", RankSchedule(4, 4))],
)
def test_reference_plain_pairs(tmp_path, trainer_class, method, schedule):
    state, layers = reference_plain()
    path = reference_run(tmp_path, lambda p: save_file(state, p), trainer_class, "lora")
    loaded = load_any(path)
    assert (loaded.tlora.method, loaded.tlora.schedule) == (method, schedule)
    for name, (up, down) in layers.items():
        for r in range(1, RANK + 1):
            assert_close(update(loaded.tlora.layers[name], r), up[:, :r].double() @ down[:r].double())


def test_hparams_tell_the_prompt_and_nothing_private(tmp_path):
    state, _ = reference_orthogonal()
    tlora = load_any(reference_run(tmp_path, lambda p: save_file(state, p))).tlora
    assert (tlora.token, tlora.class_word, dict(tlora.training)) == ("sks", "dog", {})


@pytest.mark.parametrize("make", [reference_orthogonal, reference_plain])
def test_reference_without_hparams_gets_half_the_rank_and_a_note(tmp_path, make):
    save_file(make()[0], tmp_path / "pytorch_lora_weights.safetensors")
    loaded = load_any(tmp_path / "pytorch_lora_weights.safetensors")
    assert loaded.tlora.schedule == RankSchedule(4, 2)
    (note,) = loaded.notes
    assert "min_rank is half the rank" in note and note in loaded.report
    given = load_any(tmp_path / "pytorch_lora_weights.safetensors", min_rank=3, alpha=0.5)
    assert given.tlora.schedule == RankSchedule(4, 3, 0.5) and not given.notes


def test_hparams_of_another_run_are_not_used(tmp_path):
    state, _ = reference_orthogonal()
    loaded = load_any(reference_run(tmp_path, lambda p: save_file(state, p), rank=64, min_rank=8))
    assert loaded.tlora.schedule == RankSchedule(4, 2)
    assert "is for rank 64, not 4" in loaded.notes[0]


@pytest.mark.parametrize(
    ("hparams", "named"),
    [
        ("min_rank: many\n", "min_rank .* 'many'"),
        ("alpha_rank_scale: [1]\n", "alpha_rank_scale .* not a number"),
        ("min_rank: 9\n", "min_rank is 9"),
        ("alpha_rank_scale: .nan\n", "alpha_rank_scale|alpha"),
        ("\xff", "cannot be read"),
        ("x" * 2_000_000, "too large"),
    ],
)
def test_bad_hparams_are_one_sentence(tmp_path, hparams, named):
    state, _ = reference_orthogonal()
    path = reference_run(tmp_path, lambda p: save_file(state, p))
    (path.parents[1] / "logs" / "hparams.yml").write_bytes(hparams.encode("latin-1"))
    with pytest.raises(TLoRAError, match=named):
        load_any(path)


def test_reference_flux_pickle_is_split_into_the_fused_rows(tmp_path):
    state, layers = reference_flux()
    torch.save(state, tmp_path / "lora.pt")
    loaded = load_any(tmp_path / "lora.pt")
    tlora = loaded.tlora
    assert (tlora.method, tlora.base_model, tlora.noise_domain, tlora.num_timesteps) == (
        "vanilla_tlora",
        "flux",
        "flow",
        1.0,
    )
    assert tlora.schedule == RankSchedule(4, 2) and not loaded.unmatched
    assert tlora.layers.keys() == layers.keys()
    for name, (up, down) in layers.items():
        assert_close(update(tlora.layers[name], RANK), up.double() @ down.double())


# --- plain LoRAs ---

NAMINGS = {
    "kohya": ("lora_unet_{ldm_}", "lora_up.weight", "lora_down.weight"),
    "kohya with diffusers names": ("lora_unet_{diffusers_}", "lora_up.weight", "lora_down.weight"),
    "comfyui": ("diffusion_model.{ldm}", "lora_up.weight", "lora_down.weight"),
    "diffusers": ("unet.{diffusers}", "lora_B.weight", "lora_A.weight"),
    "diffusers, older": ("unet.{diffusers}", "lora.up.weight", "lora.down.weight"),
    "peft": ("base_model.model.{diffusers}", "lora_B.weight", "lora_A.weight"),
    "peft with an adapter's name": ("base_model.model.unet.{diffusers}", "lora_B.default.weight", "lora_A.default.weight"),
}


def plain_state(naming, layers, alpha=None):
    pattern, up, down = NAMINGS[naming]
    state = {}
    for diffusers, ldm, _, _ in unet_layers():
        key = pattern.format(
            ldm=ldm, ldm_=ldm.replace(".", "_"), diffusers=diffusers, diffusers_=diffusers.replace(".", "_")
        )
        state[f"{key}.{up}"], state[f"{key}.{down}"] = layers[ldm]
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def plain_layers():
    return pairs((path, o, i) for _, path, o, i in unet_layers())


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_plain_lora_in_every_naming(tmp_path, naming, alpha):
    layers = plain_layers()
    save_file(plain_state(naming, layers, alpha), tmp_path / "a.safetensors")
    loaded = load_any(tmp_path / "a.safetensors")
    assert loaded.tlora.layers.keys() == layers.keys() and not loaded.unmatched
    assert (loaded.tlora.method, loaded.tlora.schedule) == ("lora", RankSchedule(4, 4))
    assert loaded.notes and "set min_rank" in loaded.notes[0]
    for name, (up, down) in layers.items():
        assert_close(update(loaded.tlora.layers[name], RANK), (alpha or 4) / 4 * up.double() @ down.double())


def test_a_schedule_can_be_put_on_a_plain_lora(tmp_path):
    save_file(plain_state("kohya", plain_layers()), tmp_path / "a.safetensors")
    loaded = load_any(tmp_path / "a.safetensors", min_rank=1)
    assert (loaded.tlora.method, loaded.tlora.schedule) == ("vanilla_tlora", RankSchedule(4, 1))
    assert load_any(tmp_path / "a.safetensors", min_rank=4).tlora.method == "lora"
    with pytest.raises(TLoRAError, match='"a.safetensors": min_rank is 5'):
        load_any(tmp_path / "a.safetensors", min_rank=5)


@pytest.mark.parametrize(
    ("config", "scale"),
    [({"unet.lora_alpha": 8, "unet.r": 4}, 2.0), ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0), ({}, 1.0)],
)
def test_pefts_scale_is_read_from_its_settings(tmp_path, config, scale):
    layers = plain_layers()
    save_file(plain_state("diffusers", layers), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    tlora = load_any(tmp_path / "a.safetensors").tlora
    for name, (up, down) in layers.items():
        assert_close(update(tlora.layers[name], RANK), scale * up.double() @ down.double())


def test_pefts_own_folder(tmp_path):
    layers = plain_layers()
    save_file(plain_state("peft", layers), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    tlora = load_any(tmp_path / "adapter_model.safetensors").tlora
    for name, (up, down) in layers.items():
        assert_close(update(tlora.layers[name], RANK), 0.5 * up.double() @ down.double())


@pytest.mark.parametrize(
    "config", ["[", "[1]", '{"lora_alpha": "x"}', '{"lora_alpha": 1, "alpha_pattern": {"a": 2}}', "[" * 10**5]
)
def test_peft_settings_that_leave_the_scale_unknown_are_refused(tmp_path, config):
    save_file(plain_state("diffusers", plain_layers()), tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(TLoRAError, match="PEFT settings"):
        load_any(tmp_path / "a.safetensors")


def test_what_does_not_match_is_reported_with_its_reason(tmp_path):
    state = plain_state("kohya", plain_layers())
    dora = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q"
    state |= {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 2),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4),
        "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight": torch.ones(4, 2, 1, 1),
        "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": torch.ones(2, 4, 3, 3),
        f"{dora}.lora_up.weight": torch.ones(12, 2),
        f"{dora}.lora_down.weight": torch.ones(2, 12),
        f"{dora}.dora_scale": torch.ones(12, 1),
        "lora_unet_something_else.lora_up.weight": torch.ones(4, 2),
        "lora_unet_something_else.lora_down.weight": torch.ones(2, 4),
        "step": torch.ones(1),
    }
    save_file(state, tmp_path / "a.safetensors")
    loaded = load_any(tmp_path / "a.safetensors")
    assert len(loaded.tlora.layers) == 16 and len(loaded.unmatched) == 10
    reasons = " ".join(loaded.unmatched.values())
    for words in ("text encoder", "convolution", "dora_scale changes", "not one of SD1.5", "no part of a LoRA"):
        assert words in reasons and words in loaded.report
    assert "16 layers matched" in loaded.report


# --- LyCORIS ---


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


def target_with(weights):
    shapes = {path: tuple(weight.shape) for path, weight in weights.items()}
    names = {plain_name(path): path for path in weights}
    names |= {plain_name(name): path for name, path, _, _ in unet_layers() if path in weights}
    return Target(names, shapes, lambda name, rows: weights[name][:rows].float(), "sdxl", 1000, "discrete")


@pytest.mark.parametrize(("first", "sign"), [(0, 1.0), (0, -1.0), (9, 1.0), (4, 1.0)])
def test_lycoris_base_is_made_again_from_the_weights(tmp_path, first, sign):
    # Principal, last and middle components; signs of singular vectors differ between machines.
    weights, updates = lycoris_file(tmp_path / "a.safetensors", first=first, sign=sign)
    loaded = load_any(tmp_path / "a.safetensors", target_with(weights))
    assert loaded.kind == "LyCORIS T-LoRA" and loaded.tlora.method == "tlora" and loaded.tlora.schedule == RankSchedule(3, 1)
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
    with pytest.raises(TLoRAError, match="random start, which cannot be made again"):
        load_any(tmp_path / "a.safetensors", target_with(weights))


# --- with a model ---


def test_layers_of_another_shape_and_files_without_a_match_are_refused(tmp_path):
    save_file(plain_state("kohya", plain_layers()), tmp_path / "a.safetensors")
    weights = {path: torch.zeros(o, i) for _, path, o, i in unet_layers()}
    assert len(load_any(tmp_path / "a.safetensors", target_with(weights)).tlora.layers) == 16
    first = next(iter(weights))
    few = load_any(tmp_path / "a.safetensors", target_with({first: weights[first]}))
    assert list(few.tlora.layers) == [first] and set(few.unmatched.values()) == {"the model has no such layer"}
    with pytest.raises(TLoRAError, match=f"made for another model: its layer {first} is 12x12 and the model's 13x12"):
        load_any(tmp_path / "a.safetensors", target_with({first: torch.zeros(13, 12)}))
    with pytest.raises(TLoRAError, match="none of its 32 keys fits; .* the model has no such layer"):
        load_any(tmp_path / "a.safetensors", target_with({"x": weights[first]}))


# --- export ---


def load_of(name, tmp_path):
    state, path = {"orthogonal": reference_orthogonal, "plain": reference_plain}[name]()[0], tmp_path / f"{name}.safetensors"
    save_file(state, path)
    return load_any(path, min_rank=2, alpha=1.5).tlora


@pytest.mark.parametrize("kind", ["orthogonal", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_read_back_the_same(tmp_path, kind, layout):
    tlora = load_of(kind, tmp_path)
    path = export(tlora, tmp_path / "out.safetensors", layout, torch.float32)
    loaded = load_any(path).tlora
    if layout == "reference":
        assert (loaded.method, loaded.schedule) == (tlora.method, tlora.schedule)
        assert_same_updates(loaded, tlora)
        return
    assert loaded.method == "lora" and "tlora" not in safe_open(path, "pt").metadata()
    assert loaded.layers.keys() == tlora.layers.keys()
    for name, layer in tlora.layers.items():
        assert_close(update(loaded.layers[name], loaded.layers[name].rank), update(layer, layer.rank))


@pytest.mark.parametrize("moved", [1e-3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_reference_export_of_a_small_update_survives_half_precision(tmp_path, moved, dtype, tolerance):
    from tlora_core.foreign.orthogonal import difference_form

    parts = orthogonal_parts(12, 12, moved=moved)
    layer = difference_form(*(tuple(part.float() for part in triple) for triple in parts))
    tlora = TLoRAFile(
        {"middle_block.1.transformer_blocks.0.attn1.to_q": layer}, "tlora", RankSchedule(4, 2), 1000, "discrete", "sdxl"
    )
    loaded = load_any(export(tlora, tmp_path / "out", "reference", dtype)).tlora
    assert_same_updates(loaded, tlora, tolerance)


def test_reference_export_names_the_tensors_as_the_reference_does(tmp_path):
    tlora = load_of("orthogonal", tmp_path)
    state, _ = reference_orthogonal()
    written = load_file(export(tlora, tmp_path / "out", "reference"))
    assert {key: tensor.shape for key, tensor in written.items()} == {key: tensor.shape for key, tensor in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flux_rows_are_exported_and_read_back(tmp_path, layout):
    torch.save(reference_flux()[0], tmp_path / "lora.pt")
    tlora = load_any(tmp_path / "lora.pt").tlora
    loaded = load_any(export(tlora, tmp_path / "out.safetensors", layout, torch.float32)).tlora
    if layout in ("diffusers", "reference"):
        assert_same_updates(loaded, tlora)
        return
    # One update of the whole fused module, which holds the same at the same rows.
    whole = {name: update(layer, layer.rank) for name, layer in loaded.layers.items()}
    for name, layer in tlora.layers.items():
        path, _, row = name.partition("@")
        row = int(row or 0)
        assert_close(whole[path][row : row + 6], update(layer, layer.rank))
    assert whole["single_blocks.3.linear1"].shape == (42, 6) and not whole["single_blocks.3.linear1"][18:].any()


def test_our_own_file_of_flux_rows_has_names_that_others_read(comfy, tmp_path):
    import comfy.utils

    torch.save(reference_flux()[0], tmp_path / "lora.pt")
    tlora = load_any(tmp_path / "lora.pt").tlora
    tlora.save(tmp_path / "a.safetensors")
    assert_same_updates(TLoRAFile.load(tmp_path / "a.safetensors"), tlora)
    table = comfy.utils.flux_to_diffusers({"depth": 1, "depth_single_blocks": 4, "hidden_size": 6})
    known = {"lora_transformer_" + name.removesuffix(".weight").replace(".", "_") for name in table}
    assert {key.split(".")[0] for key in load_file(tmp_path / "a.safetensors")} <= known


def test_a_fused_update_is_split_for_diffusers(tmp_path):
    layers = pairs([("double_blocks.0.img_attn.qkv", 18, 6), ("single_blocks.3.linear1", 42, 6)])
    state = {}
    for name, (up, down) in layers.items():
        state[f"diffusion_model.{name}.lora_up.weight"], state[f"diffusion_model.{name}.lora_down.weight"] = up, down
    save_file(state, tmp_path / "a.safetensors")
    written = load_any(
        export(load_any(tmp_path / "a.safetensors").tlora, tmp_path / "b.safetensors", "diffusers", torch.float32)
    )
    for name, layer in written.tlora.layers.items():
        path, _, row = name.partition("@")
        up, down = layers[path]
        assert_close(update(layer, RANK), (up.double() @ down.double())[int(row) : int(row) + len(layer.up)])
    assert len(written.tlora.layers) == 7


def test_a_layer_without_a_name_in_the_layout_is_refused_and_nothing_is_written(tmp_path):
    save_file(
        {
            "diffusion_model.blocks.0.lora_up.weight": torch.ones(4, 2),
            "diffusion_model.blocks.0.lora_down.weight": torch.ones(2, 4),
        },
        tmp_path / "a.safetensors",
    )
    tlora = load_any(tmp_path / "a.safetensors").tlora
    for layout in ("diffusers", "reference"):
        with pytest.raises(TLoRAError, match='"blocks.0" is not known; choose the layout kohya'):
            export(tlora, tmp_path / "out.safetensors", layout)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# --- names, against the host's own tables ---


def sdxl_config():
    return {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "model_channels": 320,
    }


def sd15_config():
    return {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "model_channels": 320,
    }


@pytest.mark.parametrize("config", [sdxl_config, sd15_config])
def test_names_of_u_nets_are_the_hosts(comfy, config):
    import comfy.utils

    table = comfy.utils.unet_to_diffusers(config())
    checked = 0
    for name, path in table.items():
        if not name.endswith(".weight") or not any(
            word in name for word in (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net", "proj_")
        ):
            continue
        name, path = name.removesuffix(".weight"), path.removesuffix(".weight")
        assert layer_of(plain_name(name)) == layer_of(plain_name(path)) == Place(path)
        assert diffusers_name(path) == name
        checked += 1
    assert checked > 150


def test_names_of_flux_are_the_hosts(comfy):
    import comfy.utils

    width, checked = 3072, 0
    for name, place in comfy.utils.flux_to_diffusers({"depth": 19, "depth_single_blocks": 38, "hidden_size": width}).items():
        others = ("norm_", ".linear_", "to_qkv_mlp_proj")  # no linear layers, or FLUX.2's
        is_flux2 = any(word in name for word in others) or name.startswith("single_") and ".attn.to_out." in name
        if not name.endswith(".weight") or "_blocks" not in name or is_flux2:
            continue
        key, (_, row, _) = place if isinstance(place, tuple) else (place, (0, None, None))
        path, name = key.removesuffix(".weight"), name.removesuffix(".weight")
        found = layer_of(plain_name(name))
        assert found and found.layer(width) == (path if row is None else f"{path}@{row}"), name
        assert diffusers_name(path, None if row is None else row // width) == name
        assert layer_of(plain_name(path)) == Place(path)
        checked += 1
    assert checked > 300


def test_every_row_of_the_tests_tables_is_a_rule():
    for module, (path, _) in SDXL_ATTENTION.items():
        assert layer_of(plain_name(f"unet.{module}.processor.to_out")) == Place(f"{path}.to_out.0")
    for name, (layer, _, in_features) in FLUX_LAYERS.items():
        assert layer_of(plain_name(name)).layer(in_features) == layer


# --- the host's models ---


def test_all_names_the_host_knows_reach_the_model(comfy, tmp_path):
    import comfy.lora
    from host_models import random_unet

    from tlora_core.comfy_host.families import target_layers
    from tlora_core.comfy_host.targets import target_of

    model = random_unet()
    target = target_of(model)
    assert target.noise_domain == "discrete" and target.num_timesteps == 1000
    wanted = {path: layer.shape for path, layer in target_layers(model).items()}
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    by_layer: dict[str, set[str]] = {}
    for name, key in keys.items():
        by_layer.setdefault(key.removeprefix("diffusion_model.").removesuffix(".weight"), set()).add(name)
    styles = {
        style: next(name for name in by_layer[next(iter(wanted))] if name.startswith(style))
        for style in ("lora_unet_input", "lora_unet_down", "lycoris_", "unet.", "diffusion_model.", "down_blocks")
    }
    for style in styles:
        layers = pairs(
            [(path, *shape) for path, shape in wanted.items() if any(n.startswith(style) for n in by_layer[path])]
        )
        state = {}
        for path, (up, down) in layers.items():
            key = next(name for name in by_layer[path] if name.startswith(style))
            state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"] = up, down
        save_file(state, tmp_path / "a.safetensors")
        assert load_any(tmp_path / "a.safetensors", target).tlora.layers.keys() == layers.keys() and layers


@pytest.mark.parametrize("train_on", ["model", "patched model"])
def test_a_file_of_the_real_lycoris_gives_its_own_output(comfy, tmp_path, train_on):
    warnings.simplefilter("ignore")
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed; tools/host.py test installs it")
    from host_models import random_unet

    from tlora_core.comfy_host.targets import target_of

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
    loaded = load_any(tmp_path / "a.safetensors", target_of(model)).tlora
    assert list(loaded.layers) == [path]
    for r in range(1, 7):
        lycoris.set_timestep_mask(torch.tensor([[1.0] * r + [0.0] * (6 - r)]))
        with torch.no_grad():
            own = plain(x) - torch.nn.functional.linear(x, plain.weight)
        lycoris.clear_timestep_mask()
        assert_close(torch.nn.functional.linear(x.double(), update(loaded.layers[path], r)), own.double(), 1e-4)
    model.unpatch_model()


def test_a_flux_checkpoint_of_the_reference_reaches_the_rows_of_the_hosts_model(comfy, tmp_path):
    import comfy.sd
    import comfy.utils
    import random_models

    from tlora_core.comfy_host.targets import target_of

    model = random_models.flux(256, (1, 1), 64, 32)
    layers = pairs(
        [
            (name.replace("blocks.3", "blocks.0").replace("@6", "@256").replace("@12", "@512"), 256, 256)
            for name, _, _ in FLUX_LAYERS.values()
        ]
    )
    state = {}
    for name, (up, down) in zip(FLUX_LAYERS, layers.values()):
        key = reference_key(name.replace("blocks.3", "blocks.0"), flux=True)
        state |= {key + "up.weight": up, key + "down.weight": down}
    torch.save(state, tmp_path / "lora.pt")
    tlora = load_any(tmp_path / "lora.pt", target_of(model)).tlora
    assert (tlora.base_model, tlora.noise_domain, tlora.num_timesteps) == ("flux", "flow", 1.0)
    assert tlora.layers.keys() == layers.keys()
    # Saved by us and loaded by the host's own loader it is the full-rank update of the same rows.
    tlora.save(tmp_path / "a.safetensors")
    weights = comfy.utils.load_torch_file(str(tmp_path / "a.safetensors"))
    stock, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0)
    for path in {name.partition("@")[0] for name in layers}:
        key = f"diffusion_model.{path}.weight"
        before = comfy.utils.get_attr(model.model, key).double()
        change = comfy.lora.calculate_weight(stock.patches[key], before.clone().float(), key).double() - before
        for name, (up, down) in layers.items():
            if name.partition("@")[0] == path:
                row = int(name.partition("@")[2] or 0)
                assert_close(change[row : row + 256], up.double() @ down.double(), 1e-4)
