"""Each of the host's families, small and random: what is expected of it is in the table of `family_table`."""

import math

import host_models as models
import pytest
import sampling_runs as runs
import torch
from family_table import TABLE

from tlora_core import TLoRAError
from tlora_core.files.export import LAYOUTS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=TABLE)
def trial(request, comfy):
    from family_checks import Trial

    return Trial(request.param)


def test_the_table_has_a_row_for_every_family(comfy):
    import random_models

    assert TABLE.keys() == random_models.SMALL.keys()


def skip_with_sound(trial):
    if "sound" in trial.row.refused:
        pytest.skip("a training is refused, so the model is not evaluated in one")


def test_layers_are_those_of_attention_over_image_tokens(trial):
    import random_models
    from family_checks import Vae, expected_targets

    from tlora_core.hosts.comfy.model.layers import linear_modules
    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.hosts.comfy.training.targets import seen_layers
    from tlora_core.training.config import TrainConfig

    skip_with_sound(trial)
    linear = linear_modules(trial.model)
    wanted = {name: (start, stop) for name, (_, start, stop) in expected_targets(trial.row, linear).items()}
    vae = Vae(trial.model)
    side = random_models.SMALL[trial.name].side * vae.unit
    sample = Sample(vae.encode(torch.zeros(1, side, side, 3))[0], None, None, trial.texts[0])
    layers, in_words = seen_layers(trial.model, sample, TrainConfig())
    assert "not trained" not in in_words
    assert {name: (layer.row, layer.row + layer.rows) for name, layer in layers.items()} == wanted


def test_gradients_are_those_of_finite_differences(trial):
    from gradients import ALIKE, MIXED, Setting, slope

    skip_with_sound(trial)
    dtype = torch.float64 if trial.row.double else torch.float32
    setting = Setting(trial.name, dtype, layers=trial.row.patterns)
    names = [name for name in setting.adapters if name not in trial.row.idle]
    first, middle, last = names[0], names[len(names) // 2], names[-1]
    with setting.session():
        for levels, some in ((ALIKE, [middle]), (MIXED, [first, middle, last])):
            plain = [gradient.clone() for gradient in setting.gradients(levels)]
            for name in some:
                said, done = slope(setting, name, levels, trial.row.step)
                assert said == pytest.approx(done, rel=3e-3), (levels, name)
    with setting.session(checkpointing=True):
        for one, other in zip(plain, setting.gradients(MIXED)):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9 if trial.row.double else 1e-6)


@pytest.mark.parametrize(
    "method, memory, config", [("auto", "auto", {}), ("tlora", "low", {"batch_size": 2, "preservation_weight": 1.0})]
)
def test_training_moves_every_adapter_and_no_weight(trial, method, memory, config, monkeypatch):
    from family_checks import personalization

    monkeypatch.setattr(
        "tlora_core.hosts.comfy.draw.STEPS", 2
    )  # of the picture that it draws with the family's guidance

    before = trial.weights()
    if trial.row.refused:
        with pytest.raises(TLoRAError, match=trial.row.refused):
            personalization(trial, memory, method=method, config=config)
        return
    with torch.inference_mode():
        training = personalization(trial, memory, method=method, config=config)
        start = factors(training)
        training.train(2)
        assert all(map(math.isfinite, training.trainer.losses))
        still = [name for name, factor in factors(training).items() if all(map(torch.equal, factor, start[name]))]
        if method == "auto":
            side = training.request.resolution
            [drawn] = training.draw(training.tlora(), ["a dog"], [0])
            assert drawn.shape == (1, side, side, 3)
    assert set(still) <= set(trial.row.idle)
    trial.assert_untouched(before)


def factors(training):
    return {
        name: [parameter.data[adapter.index].clone() for parameter in adapter.module.parameters()]
        for name, adapter in training.adapters.items()
    }


def test_sampling_applies_the_rank_of_each_sigma_in_either_way(trial, monkeypatch):
    from family_checks import Trial

    fresh = Trial(trial.name)  # whose model keeps nothing of other samplings
    base, before = fresh.sample(fresh.model), trial.weights()
    tlora, pictures = trial.tlora(), []
    # Where cross-attention sees the text as it came, its keys and values are computed once for each text.
    folded = {"weight", *(["output"] if any("attn2.to_k" in name for name in trial.shapes) else [])}
    for fold, ways in ((None, folded), (False, {"product"})):
        recorded, used = runs.Evaluations(trial.model), runs.Ways(monkeypatch)
        pictures.append(trial.sample(runs.apply(recorded.model, tlora, -0.8, fold=fold)))
        monkeypatch.undo()
        assert used.used == ways
        recorded.assert_merged((tlora, -0.8))
    assert models.relative_error(*pictures) < 1e-5
    assert models.relative_error(pictures[0], base) > 1e-3
    assert torch.equal(trial.sample(trial.model), base)
    trial.assert_untouched(before)


def test_file_draws_the_same_in_our_loader_and_the_hosts_where_all_ranks_are_on(trial, tmp_path):
    """The host's loader is given the layout that the file's note recommends where it cannot find all layers itself."""
    from family_checks import Trial
    from host_lora import by_the_host

    from tlora_core import TLoRAFile
    from tlora_core.files.export import export

    tlora = trial.tlora(min_rank=8)
    tlora.save(tmp_path / "own.safetensors")
    again = TLoRAFile.load(tmp_path / "own.safetensors")
    assert again.schedule == tlora.schedule and again.heights == tlora.heights
    assert same_layers(again.layers, tlora.layers)
    assert "comfyui" in tlora.note or not tlora.note
    if tlora.note:
        export(tlora, tmp_path / "own.safetensors", "comfyui", torch.float32)
    ours = trial.sample(runs.apply(trial.model, again))
    fresh = Trial(trial.name)  # whose model keeps nothing of samplings without the host's LoRA
    theirs = fresh.sample(by_the_host(fresh.model, tmp_path / "own.safetensors"))
    assert models.relative_error(theirs, ours) < 1e-5
    assert models.relative_error(theirs, trial.sample(trial.model)) > 1e-3


def same_layers(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(layer.up, other[name].up) and torch.equal(layer.down, other[name].down)
        for name, layer in one.items()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports_are_read_back_whole(trial, layout, tmp_path):
    """By us in every layout, and by the host in its own. Two layouts are for some families only."""
    from host_lora import by_the_host, host_updates, our_updates

    from tlora_core.files.export import export
    from tlora_core.files.foreign import load_any
    from tlora_core.hosts.comfy.model.description import describe_model

    tlora = trial.tlora()
    try:
        path = export(tlora, tmp_path / "a.safetensors", layout, torch.float32)
    except TLoRAError as error:
        assert layout in ("diffusers", "reference") and "layout" in str(error)
        return
    wanted = our_updates(trial.model, tlora)
    torch.testing.assert_close(our_updates(trial.model, load_any(path, describe_model(trial.model)).tlora), wanted)
    if layout == "comfyui":
        torch.testing.assert_close(host_updates(by_the_host(trial.model, path)), wanted)
