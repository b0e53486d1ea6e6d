"""Files of the paper's own code: recognised, matched and converted without loss, with the schedule from beside them."""

import pytest
import torch
from foreign_files import (
    FLUX_LAYERS,
    RANK,
    assert_close,
    masked,
    orthogonal_parts,
    pairs,
    reference_flux,
    reference_flux_run,
    reference_key,
    reference_orthogonal,
    reference_plain,
    reference_run,
    unused_of_single_blocks,
    update,
)
from safetensors.torch import save_file

from tlora_core import LowRank, RankSchedule, TLoRAError, TLoRAFile
from tlora_core.files.foreign import load_any


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


def test_reference_without_hparams_gets_half_the_rank_and_a_note(tmp_path):
    save_file(reference_orthogonal()[0], tmp_path / "pytorch_lora_weights.safetensors")
    loaded = load_any(tmp_path / "pytorch_lora_weights.safetensors")
    assert loaded.tlora.schedule == RankSchedule(4, 2)
    (note,) = loaded.notes
    assert "it is assumed: min_rank 2, half the rank" in note and "own default is 1." in note and "set min_rank" in note
    assert note in loaded.report
    given = load_any(tmp_path / "pytorch_lora_weights.safetensors", min_rank=3, alpha=0.5)
    assert given.tlora.schedule == RankSchedule(4, 3, 0.5) and not given.notes


@pytest.mark.parametrize("run_of_rank", [None, 64])
def test_pairs_that_older_diffusers_writes_too_are_not_masked_unless_asked(tmp_path, run_of_rank):
    def write(path):
        save_file(reference_plain()[0], path)

    if run_of_rank is None:
        path = tmp_path / "pytorch_lora_weights.safetensors"
        write(path)
    else:
        path = reference_run(tmp_path, write, rank=run_of_rank)
    loaded = load_any(path)
    assert (loaded.tlora.method, loaded.tlora.schedule) == ("lora", RankSchedule(4, 4))
    (note,) = loaded.notes
    assert (
        "all ranks are on" in note
        and "the paper's is 2, half the rank" in note
        and "own default is 1." in note
        and note in loaded.report
    )
    assert "plain LoRA of older diffusers" in loaded.kind
    given = load_any(path, min_rank=2)
    assert (given.tlora.method, given.tlora.schedule) == ("vanilla_tlora", RankSchedule(4, 2)) and not given.notes


def test_a_plain_lora_of_older_diffusers_acts_with_all_its_ranks_at_every_evaluation(unet, tmp_path):
    import sampling_runs as runs

    from tlora_core.hosts.comfy.model.description import describe_model

    module = "mid_block.attentions.0.transformer_blocks.0.attn1"
    path = "middle_block.1.transformer_blocks.0.attn1"
    state, layers = {}, {}
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        weight = unet.model.diffusion_model.get_submodule(f"{path}.{projection}").weight
        ((name, (up, down)),) = pairs([(f"{path}.{projection}", *weight.shape)]).items()
        key = reference_key(f"{module}.{projection}")
        layers[name] = state[key + "up.weight"], state[key + "down.weight"] = up * 0.1, down * 0.1
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    tlora = load_any(tmp_path / "pytorch_lora_weights.safetensors", describe_model(unet)).tlora
    whole = TLoRAFile(
        {name: LowRank(*pair, 1) for name, pair in layers.items()}, "lora", RankSchedule(4, 4), 1000, "discrete", "sdxl"
    )
    recorded = runs.Evaluations(unet)
    runs.sample(runs.apply(recorded.model, tlora), *runs.texts())
    recorded.assert_merged((whole, 1.0))


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


def test_flux_without_hparams_reports_the_trainers_default(tmp_path):
    torch.save(reference_flux()[0], tmp_path / "lora.pt")
    (note,) = load_any(tmp_path / "lora.pt").notes
    assert "it is assumed: min_rank 2, half the rank" in note and "own default is 4." in note  # 16, and the rank is 4
    state = {
        key: torch.cat([tensor] * 8, dim=int(key.endswith("up.weight"))) for key, tensor in reference_flux()[0].items()
    }
    torch.save(state, tmp_path / "lora.pt")
    (note,) = load_any(tmp_path / "lora.pt").notes
    assert "it is assumed: min_rank 16, half the rank" in note and "own default is 16." in note


@pytest.mark.parametrize(
    ("tlora", "method", "schedule"),
    [("true", "vanilla_tlora", RankSchedule(4, 1)), ("false", "lora", RankSchedule(4, 4))],
)
def test_flux_hparams_tell_whether_it_is_masked(tmp_path, tlora, method, schedule):
    loaded = load_any(reference_flux_run(tmp_path, reference_flux()[0], tlora))
    assert (loaded.tlora.method, loaded.tlora.schedule) == (method, schedule) and not loaded.notes
    assert (loaded.tlora.token, loaded.tlora.class_word) == ("sks", "dog")


def test_flux_hparams_of_another_run_are_not_used(tmp_path):
    loaded = load_any(reference_flux_run(tmp_path, reference_flux()[0], "false", rank=16, min_rank=16))
    assert (loaded.tlora.method, loaded.tlora.schedule) == ("vanilla_tlora", RankSchedule(4, 2))
    assert "is for rank 16, not 4" in loaded.notes[0]


def test_flux_hparams_that_are_neither_true_nor_false_are_one_sentence(tmp_path):
    with pytest.raises(TLoRAError, match="tlora in the hparams.yml beside it is 'perhaps', not true or false"):
        load_any(reference_flux_run(tmp_path, reference_flux()[0], "perhaps"))


def test_unused_adapters_of_single_blocks_are_left_out(tmp_path):
    state, layers = reference_flux()
    unused = unused_of_single_blocks(state)
    loaded = load_any(reference_flux_run(tmp_path, state | unused))
    assert loaded.tlora.layers.keys() == layers.keys() and loaded.unmatched.keys() == unused.keys() and len(unused) == 8
    assert "8 keys unmatched" in loaded.report and "never uses it" in loaded.report


def test_a_flux_file_of_the_reference_reaches_the_rows_of_the_hosts_model(comfy, tmp_path):
    import comfy.sd
    import comfy.utils
    import random_models

    from tlora_core.hosts.comfy.model.description import describe_model

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
    torch.save(state | unused_of_single_blocks(state), tmp_path / "lora.pt")
    tlora = load_any(tmp_path / "lora.pt", describe_model(model)).tlora
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
