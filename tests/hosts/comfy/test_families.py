"""Which layers of the host's models a T-LoRA is trained on."""

import gc
import re
import weakref
from collections import Counter

import pytest
import torch

UNET = {f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")}


@pytest.fixture(scope="module")
def make(comfy):
    import random_models

    return {
        "sdxl": lambda: random_models.sdxl(64),
        "flux": lambda: random_models.flux(256, (1, 2), 64, 32),
        "sd3": lambda: random_models.small("sd3"),
    }


@pytest.fixture(scope="module")
def sdxl(make):
    return make["sdxl"]()


def test_sdxl_has_the_560_attention_projections_of_the_paper(sdxl):
    from tlora_core.hosts.comfy.model.families import target_layers

    layers = target_layers(sdxl)
    assert len(layers) == 560
    assert {re.search(r"transformer_blocks\.\d+\.(.*)", path)[1] for path in layers} == UNET
    assert all(layer.shape == tuple(layer.module.weight.shape) for layer in layers.values())


def test_flux_has_the_papers_projections_as_rows_of_the_hosts_fused_layers(make):
    from tlora_core.hosts.comfy.model.families import target_layers

    layers = target_layers(make["flux"]())
    double = [f"double_blocks.0.{stream}_attn.qkv@{row}" for stream in ("img", "txt") for row in (0, 256, 512)]
    single = [f"single_blocks.{i}.linear1@{row}" for i in (0, 1) for row in (0, 256, 512)]
    assert set(layers) == {*double, "double_blocks.0.img_attn.proj", *single}
    assert {layer.shape for layer in layers.values()} == {(256, 256)}
    key = layers["single_blocks.1.linear1@256"]
    assert torch.equal(key.weight, key.module.weight[256:512]) and key.weight.dtype == torch.float32


def test_sd3_trains_the_text_streams_inputs_but_not_its_output(make):
    from tlora_core.hosts.comfy.model.families import target_layers

    counts = Counter(re.sub(r"\.\d+\.", ".", path).partition("@")[0] for path in target_layers(make["sd3"]()))
    assert counts == {
        "joint_blocks.x_block.attn.qkv": 6,
        "joint_blocks.x_block.attn.proj": 2,
        "joint_blocks.context_block.attn.qkv": 6,
    }


@pytest.mark.parametrize(
    "name, more",
    [
        (
            "flux",
            {
                "double_blocks.0.img_mlp.0",
                "double_blocks.0.img_mlp.2",
                "double_blocks.0.txt_mlp.0",
                "double_blocks.0.txt_mlp.2",
                "single_blocks.0.linear1@768",
                "single_blocks.1.linear1@768",
                "single_blocks.0.linear2",
                "single_blocks.1.linear2",
            },
        ),
        (
            "sd3",
            {
                f"joint_blocks.{i}.{stream}.mlp.fc{n}"
                for i in range(2)
                for stream in ("x_block", "context_block")
                for n in (1, 2)
            }
            - {"joint_blocks.1.context_block.mlp.fc1", "joint_blocks.1.context_block.mlp.fc2"},
        ),
    ],
)
def test_feed_forward_layers_come_beside_the_attentions(make, name, more):
    from tlora_core.hosts.comfy.model.families import target_layers

    model = make[name]()
    with_them = target_layers(model, "attention+feed-forward")
    assert set(with_them) - set(target_layers(model)) == more
    assert all(layer.row + layer.rows <= layer.module.out_features for layer in with_them.values())


def test_krea_2_learns_in_its_blocks_and_not_where_it_reads_the_text(comfy):
    import random_models

    from tlora_core.hosts.comfy.model.families import target_layers

    found = target_layers(random_models.small("krea2"))
    assert set(found) == {f"blocks.{i}.attn.w{each}" for i in range(2) for each in "qkvo"}
    # Keys and values have fewer heads than queries.
    assert [found[f"blocks.0.attn.w{each}"].shape for each in "qkvo"] == [(256, 256), (64, 256), (64, 256), (256, 256)]


def test_patterns_choose_any_linear_layer_by_its_path(make, sdxl):
    from tlora_core.hosts.comfy.model.families import target_layers

    assert set(target_layers(sdxl, "time_embed.*, label_emb.0.0")) == {"time_embed.0", "time_embed.2", "label_emb.0.0"}
    assert len(target_layers(sdxl, "*.attn2.to_k\n*.attn2.to_v")) == 140
    flux = make["flux"]()
    assert set(target_layers(flux, "double_blocks.*.img_attn.qkv")) == {
        f"double_blocks.0.img_attn.qkv@{r}" for r in (0, 256, 512)
    }
    assert set(target_layers(flux, "*linear1@512")) == {"single_blocks.0.linear1@512", "single_blocks.1.linear1@512"}


@pytest.mark.parametrize("which, word", [("*.attn3.*", "attn3.*input_blocks"), (" , ", "empty"), ("attn1", '"attn1"')])
def test_a_pattern_that_nothing_matches_is_refused_with_examples(sdxl, which, word):
    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.model.families import target_layers

    with pytest.raises(TLoRAError, match=word):
        target_layers(sdxl, which)


def test_looking_at_a_models_layers_does_not_keep_it_in_memory(make):
    from tlora_core.hosts.comfy.model.families import target_layers

    model = make["flux"]()
    network = weakref.ref(model.model.diffusion_model)
    layers = target_layers(model)
    del model, layers
    gc.collect()
    assert network() is None


def test_layers_are_those_that_the_model_has_now(make):
    """A node may put another module in a layer's place, and back again."""
    import random_models

    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.model.layers import linear_modules
    from tlora_core.hosts.comfy.sampling import apply_tlora

    model = make["flux"]()
    tlora, block = random_models.random_tlora(model, 4), model.model.diffusion_model.double_blocks[0].img_attn
    own = block.proj
    block.proj = torch.nn.Linear(own.in_features, own.out_features)
    apply_tlora(model, tlora)
    assert linear_modules(model)["double_blocks.0.img_attn.proj"] is block.proj
    block.proj = torch.nn.Linear(own.in_features, own.out_features + 1)
    with pytest.raises(TLoRAError, match="made for another model"):
        apply_tlora(model, tlora)
    block.proj = own
    gc.collect()
    apply_tlora(model, tlora)
    assert linear_modules(model)["double_blocks.0.img_attn.proj"] is own
