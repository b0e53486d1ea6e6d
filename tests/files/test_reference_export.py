"""T-LoRAs in the layout of the paper's own code, loaded as that code loads them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign_files import (
    assert_close,
    assert_same_updates,
    load_of,
    orthogonal_parts,
    reference_flux,
    reference_orthogonal,
    unused_of_single_blocks,
    update,
)
from safetensors.torch import load_file

from tlora_core import RankSchedule, TLoRAError, TLoRAFile
from tlora_core.files.export import LAYOUTS, export
from tlora_core.files.foreign import load_any
from tlora_core.method.adapters import LowRank


def made_in(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize("moved", [1e-3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_reference_export_of_a_small_update_survives_half_precision(tmp_path, moved, dtype, tolerance):
    from tlora_core.files.foreign.orthogonal import as_low_rank

    parts = orthogonal_parts(12, 12, moved=moved)
    layer = as_low_rank(*(tuple(part.float() for part in triple) for triple in parts))
    tlora = TLoRAFile(
        {"middle_block.1.transformer_blocks.0.attn1.to_q": layer}, "tlora", RankSchedule(4, 2), 1000, "discrete", "sdxl"
    )
    loaded = load_any(export(tlora, tmp_path / "out", "reference", dtype)).tlora
    assert_same_updates(loaded, tlora, tolerance)


def test_reference_export_names_the_tensors_as_the_reference_does(tmp_path):
    tlora = load_of("orthogonal", tmp_path)
    state, _ = reference_orthogonal()
    written = load_file(export(tlora, tmp_path / "out", "reference"))
    assert {key: tensor.shape for key, tensor in written.items()} == {
        key.removeprefix("unet."): tensor.shape for key, tensor in state.items()
    }


def as_the_reference_loads(attention, path, widths, rank, orthogonal):
    """Adapters loaded as the reference's inference does: strictly, into one for each projection of each attention of
    the model."""
    from diffusers.loaders import AttnProcsLayers
    from torch import nn

    def term(names, rows, columns):
        down, up, size = names
        parts = {down: nn.Linear(columns, rank, bias=False), up: nn.Linear(rank, rows, bias=False)}
        return nn.ModuleDict(parts), size

    def adapter(rows, columns):
        if not orthogonal:
            return term(("down", "up", None), rows, columns)[0]
        both = nn.ModuleDict()
        for names in (("q_layer", "p_layer", "lambda_layer"), ("base_q", "base_p", "base_lambda")):
            parts, size = term(names, rows, columns)
            both.update(parts)
            both.register_parameter(size, nn.Parameter(torch.ones(1, rank)))
        return both

    processors = {
        name: nn.ModuleDict({f"{projection}_lora": adapter(*shape) for projection, shape in widths(name).items()})
        for name in attention
    }
    layers = AttnProcsLayers(processors)
    layers.load_state_dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))
    return layers.state_dict()


@pytest.fixture(scope="module")
def sdxl_attention():
    """Names of SDXL's attention processors -> their widths."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    modules = dict(unet.named_modules())
    return {
        name: {
            f"to_{x}": tuple((attention.to_out[0] if x == "out" else getattr(attention, f"to_{x}")).weight.shape)
            for x in ("q", "k", "v", "out")
        }
        for name in unet.attn_processors
        for attention in [modules[name.removesuffix(".processor")]]
    }


@pytest.mark.parametrize("method", ["tlora", "vanilla_tlora"])
def test_the_reference_loads_its_sdxl_layout_strictly(tmp_path, sdxl_attention, method):
    group = 2 if method == "tlora" else 1
    name = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"  # the one layer trained; the rest is as it was
    layers = {name: LowRank(torch.randn(640, 2 * group), torch.randn(2 * group, 2048), group)}
    tlora = TLoRAFile(layers, method, RankSchedule(2, 1, 1.5), 1000, "discrete", "sdxl", "sks", "dog")
    path = export(tlora, tmp_path / "out", "reference", torch.float32)
    state = as_the_reference_loads(sdxl_attention, path, sdxl_attention.get, 2, group == 2)
    trained = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora."
    ups = {key: tensor for key, tensor in state.items() if key.endswith(("up.weight", "p_layer.weight"))}
    assert len(ups) == 560 and {key.rpartition("_lora.")[0] + "_lora." for key, up in ups.items() if up.any()} == {
        trained
    }
    loaded = load_any(path).tlora
    assert_close(update(loaded.layers[name], 2), update(layers[name], 2))
    assert (loaded.method, loaded.schedule) == (method, tlora.schedule)


@pytest.mark.parametrize("method", ["vanilla_tlora", "lora"])
def test_the_reference_loads_its_flux_layout_strictly(tmp_path, method):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        attention = list(FluxTransformer2DModel().attn_processors)
    name = "single_blocks.3.linear1@3072"
    layers = {name: LowRank(torch.randn(3072, 2), torch.randn(2, 3072), 1)}
    tlora = TLoRAFile(
        layers, method, RankSchedule(2, 1 if method == "vanilla_tlora" else 2), 1.0, "flow", "flux", "sks", "dog"
    )
    path = export(tlora, tmp_path / "out", "reference")
    shapes = dict.fromkeys(("to_q", "to_k", "to_v", "to_out", "to_q_proj", "to_k_proj", "to_v_proj"), (3072, 3072))
    state = as_the_reference_loads(attention, path, lambda name: shapes, 2, False)
    assert {key for key, tensor in state.items() if tensor.any()} == {
        f"single_transformer_blocks.3.attn.processor.to_k_lora.{part}.weight" for part in ("up", "down")
    }
    assert load_any(path).tlora.schedule == tlora.schedule


def test_flux_of_another_width_gets_the_unused_tensors_of_its_single_blocks(tmp_path):
    state, _ = reference_flux()
    torch.save(state, tmp_path / "lora.pt")
    written = torch.load(
        export(load_any(tmp_path / "lora.pt").tlora, tmp_path / "out", "reference", torch.float32), weights_only=True
    )
    unused = unused_of_single_blocks(state)
    assert written.keys() == state.keys() | unused.keys()
    assert not any(written[key].any() for key in unused)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_reference_hparams_hold_what_its_inference_asks_for(tmp_path, family):
    import yaml

    if family == "sdxl":
        tlora = load_of("orthogonal", tmp_path)
        wanted = {
            "lora_rank": 4,
            "min_rank": 2,
            "alpha_rank_scale": 1.5,
            "sig_type": "last",
            "trainer_class": "sdxl_tlora",
            "trainer_type": "ortho_lora",
            "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
        }
    else:
        torch.save(reference_flux()[0], tmp_path / "lora.pt")
        tlora = load_any(tmp_path / "lora.pt").tlora
        wanted = {
            "rank": 4,
            "min_rank": 2,
            "tlora": True,
            "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
        }
    path = export(
        replace(tlora, token="sks", class_word="dog", training={"steps": 500}),
        made_in(tmp_path / "it's") / "dog_v1.5",
        "reference",
    )
    hparams = yaml.safe_load((path.parents[1] / "logs" / "hparams.yml").read_text(encoding="utf-8"))
    assert hparams == wanted | {
        "placeholder_token": "sks",
        "class_name": "dog",
        "revision": None,
        "output_dir": str(tmp_path / "it's" / "dog_v1.5"),
    }
    assert Path(hparams["output_dir"], "checkpoint-500", path.name) == path and path.exists()


def test_a_tlora_of_flux_schnell_names_it_as_its_base(tmp_path):
    torch.save(reference_flux()[0], tmp_path / "lora.pt")
    tlora = replace(load_any(tmp_path / "lora.pt").tlora, base_model="fluxschnell")
    path = export(tlora, tmp_path / "out", "reference")
    assert (
        "pretrained_model_name_or_path: black-forest-labs/FLUX.1-schnell\n"
        in (path.parents[1] / "logs" / "hparams.yml").read_text()
    )


@pytest.mark.parametrize("alpha", [1, 0.05, 1e-05, 1.5e-05, 1e16])
def test_an_alpha_of_any_size_is_a_number_to_the_references_inference(tmp_path, alpha):
    import yaml

    tlora = replace(load_of("orthogonal", tmp_path), schedule=RankSchedule(4, 2, alpha))
    path = export(tlora, tmp_path / "out", "reference")
    read = yaml.safe_load((path.parents[1] / "logs" / "hparams.yml").read_text(encoding="utf-8"))["alpha_rank_scale"]
    assert type(read) is float and read == alpha
    assert load_any(path).tlora.schedule == tlora.schedule


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "tlora"}, 'method is "tlora".*only supports vanilla_tlora and lora'),
        ({"schedule": RankSchedule(2, 1, 0.5)}, "alpha is 0.5"),
        ({"base_model": "flux2"}, '"flux2".*only supports SDXL and FLUX.1'),
        ({"schedule": RankSchedule(4, 1)}, "attn.processor.to_out.* rank 2 and the schedule 4"),
    ],
)
def test_features_that_the_references_code_lacks_are_refused_in_a_sentence(tmp_path, changes, named):
    group = 2 if "method" in changes else 1
    layers = {"double_blocks.0.img_attn.proj": LowRank(torch.randn(6, 2 * group), torch.randn(2 * group, 6), group)}
    if "rank" in named:
        layers["double_blocks.0.img_attn.qkv@0"] = LowRank(torch.randn(6, 4), torch.randn(4, 6), 1)
    asked = {"method": "vanilla_tlora", "schedule": RankSchedule(2, 1), "base_model": "flux", **changes}
    with pytest.raises(TLoRAError, match=named):
        export(TLoRAFile(layers, num_timesteps=1.0, noise_domain="flow", **asked), tmp_path / "out", "reference")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base_model", ["sd15", "sd20"])
def test_older_unets_are_refused_by_the_references_layout(tmp_path, base_model):
    tlora = replace(load_of("plain", tmp_path), base_model=base_model)
    with pytest.raises(TLoRAError, match=f'"{base_model}".*only supports SDXL and FLUX.1'):
        export(tlora, tmp_path / "out", "reference")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dog_v1.5", "v1.5.dog", "dog_v1.5.safetensors", "dog.pt"])
def test_a_dot_in_the_name_stays_in_it(tmp_path, layout, name):
    path = export(load_of("plain", tmp_path), made_in(tmp_path / "out") / name, layout)
    made = [p.name for p in (tmp_path / "out").iterdir()]
    assert path.exists() and made == [name.removesuffix(".safetensors") if layout == "reference" else name]


def test_a_reference_export_that_fails_leaves_no_folder_behind(tmp_path, monkeypatch):
    def full(*args):
        raise TLoRAError("the disk is full.")

    tlora = load_of("orthogonal", tmp_path)
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(TLoRAError, match="disk is full"):
        patch.setattr(sys.modules["tlora_core.files.reference_layout"], "write_tensors", full)
        export(tlora, tmp_path / "out", "reference")
    assert sorted(tmp_path.iterdir()) == before
    weights = export(tlora, tmp_path / "out", "reference")
    assert weights.exists() and (tmp_path / "out" / "logs" / "hparams.yml").exists()
    with pytest.raises(TLoRAError, match='"out" could not be made'):
        export(tlora, tmp_path / "out", "reference")
