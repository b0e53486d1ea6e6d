"""The layers that a training finds in a model of the host by evaluating it."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


def seen(family, which="attention", model=None):
    import random_models

    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.hosts.comfy.training.targets import seen_layers
    from tlora_core.training.config import TrainConfig

    model = model or random_models.small(family)
    sample = Sample(random_models.latent(model)[0], None, None, random_models.conditioning(model, 5))
    with torch.inference_mode():
        return seen_layers(model, sample, TrainConfig(), which)


def test_flux_has_the_papers_layers_and_with_feed_forward_all_rows_of_its_single_blocks(comfy):
    thirds = {"double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "single_blocks.0.linear1"}
    attention = {f"{path}@{row}" for path in thirds for row in (0, 256, 512)} | {"double_blocks.0.img_attn.proj"}
    layers, words = seen("flux")
    assert set(layers) == attention
    assert words == "10 layers (3 query, 3 key, 3 value, 1 output)"
    more = set(seen("flux", "attention+feed-forward").layers) - attention
    in_double = {f"double_blocks.0.{stream}_mlp.{number}" for stream in ("img", "txt") for number in (0, 2)}
    assert more == {"single_blocks.0.linear1@768", "single_blocks.0.linear2", *in_double}
    layer = layers["single_blocks.0.linear1@256"]
    assert (layer.row, layer.rows, layer.role) == (256, 256, "key")
    assert set(seen("flux", "*linear1@512, *.img_mlp.*").layers) == {
        "single_blocks.0.linear1@512",
        "double_blocks.0.img_mlp.0",
        "double_blocks.0.img_mlp.2",
    }


def test_refiners_of_the_picture_are_trained_and_those_of_the_text_are_not(comfy):
    found = {name.path.partition(".")[0] for name in seen("z-image").layers}
    assert found == {"noise_refiner", "layers"}


def test_layers_that_read_the_text_before_the_steps_are_no_targets(comfy):
    assert not any(name.startswith("llm_adapter") for name in seen("anima").layers)


def test_the_model_is_left_as_it_was(comfy):
    import random_models
    from host_models import is_untouched

    model = random_models.small("flux")
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    seen("flux", model=model)
    assert is_untouched(model)
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())


def test_a_model_without_attention_over_the_picture_is_refused(comfy, monkeypatch):
    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.training import targets

    watched = targets.watched

    def nothing(*args, **options):
        found = watched(*args, **options)
        found.parts.clear()
        return found

    monkeypatch.setattr(targets, "watched", nothing)
    with pytest.raises(TLoRAError, match="Flux.*no attention layers.*patterns"):
        seen("flux")


def test_attention_that_cannot_be_trained_is_named(comfy, monkeypatch):
    from tlora_core.hosts.comfy.training import targets

    watched = targets.watched

    def one_more(*args, **options):
        found = watched(*args, **options)
        found.unreached.append("blocks.7.attn")
        return found

    monkeypatch.setattr(targets, "watched", one_more)
    assert "not trained: what the attention of blocks.7.attn gets" in seen("flux").in_words
