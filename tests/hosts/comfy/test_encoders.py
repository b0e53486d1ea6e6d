"""The host's CLIP_VISION as an encoder, and when the checkpoint's text encoder counts as belonging to it."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from tlora_core.errors import TLoRAError

CLIP_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 128,  # as long as the vectors of the tiny base's text encoder
    "hidden_act": "quick_gelu",
}
DINO_CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    "image_size": 518,
}
DINO_3_CONFIG = {
    **DINO_CONFIG,
    "model_type": "dinov3",
    "layer_norm_eps": 1e-5,
    "num_register_tokens": 4,
    "intermediate_size": 32,
    "num_channels": 3,
    "patch_size": 16,
    "rope_theta": 100.0,
    "image_size": 64,
}
SIGLIP_CONFIG = {k: v for k, v in CLIP_CONFIG.items() if k != "projection_dim"} | {"model_type": "siglip_vision_model"}


def vision_of(config):
    """A CLIP_VISION of the host with random weights."""
    from comfy.clip_vision import ClipVisionModel

    vision = ClipVisionModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in vision.model.named_parameters():
            weight.normal_(0, 0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1)
    return vision


@pytest.fixture
def clip(comfy):
    from tlora_core.tiny import WEIGHTS
    from tlora_core.tiny import comfy as tiny_base

    return tiny_base.load(str(WEIGHTS), disable_dynamic=True)[1]


@pytest.fixture
def pair(clip):
    """A CLIP_VISION, and the tiny base's CLIP with a text projection that maps the names of colours to what the image
    encoder sees in them."""
    from tlora_core.hosts.comfy import encoders

    vision = vision_of(CLIP_CONFIG)
    layer = clip.cond_stage_model.clip_l.transformer.text_projection
    with torch.no_grad():
        layer.weight.copy_(torch.eye(128))
    pooled = []
    hook = layer.register_forward_hook(lambda module, given, out: pooled.append(given[0][0].float()))
    encoders.Texts(clip, "l")([f"a plain {name} picture" for name in encoders.COLOURS])
    hook.remove()
    shown = torch.tensor(list(encoders.COLOURS.values())).reshape(-1, 1, 1, 3).expand(-1, 64, 64, 3)
    wanted = encoders.VisionEncoder(vision).images(shown)
    wanted = normalize(wanted - wanted.mean(0), dim=-1)  # random features of different pictures are nearly equal
    with torch.no_grad():
        layer.weight.copy_((torch.linalg.pinv(torch.stack(pooled)) @ wanted).T)
    return vision, clip


@pytest.mark.parametrize(
    "config", [CLIP_CONFIG, DINO_CONFIG, DINO_3_CONFIG, SIGLIP_CONFIG], ids=lambda config: config["model_type"]
)
def test_every_kind_of_clip_vision_gives_unit_vectors_that_tell_pictures_apart(comfy, config):
    from tlora_core.hosts.comfy.encoders import VisionEncoder

    encoder = VisionEncoder(vision_of(config))
    shown = torch.rand(3, 40, 50, 3, generator=torch.Generator().manual_seed(1))
    vectors = encoder.images(shown)
    assert len(vectors) == 3 and vectors.ndim == 2 and vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.equal(vectors[:1], vectors[:1]) and not torch.allclose(vectors[0], vectors[1], atol=1e-4)
    assert "Obedience is not measured" in encoder.why_no_text
    with pytest.raises(TLoRAError, match="Obedience is not measured"):
        encoder.follows(shown, ["a"] * 3)


def test_clips_image_vectors_are_those_of_its_projection(comfy):
    from tlora_core.hosts.comfy.encoders import VisionEncoder

    vision = vision_of(CLIP_CONFIG)
    shown = torch.rand(1, 32, 32, 3)
    wanted = vision.encode_image(shown)["image_embeds"]
    assert wanted.shape == (1, 128) and torch.allclose(
        VisionEncoder(vision).images(shown), normalize(wanted), atol=1e-6
    )


def test_all_patches_of_siglip_count(comfy):
    from tlora_core.hosts.comfy.encoders import VisionEncoder

    vision = vision_of(SIGLIP_CONFIG)
    shown = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    patches = vision.encode_image(shown)["image_embeds"]
    assert patches.shape == (2, 16, 16)
    assert torch.allclose(VisionEncoder(vision).images(shown), normalize(patches.mean(1), dim=-1), atol=1e-6)


def test_text_encoder_that_belongs_to_clip_vision_measures_obedience(pair):
    from tlora_core.hosts.comfy.encoders import Texts, VisionEncoder

    vision, clip = pair
    encoder = VisionEncoder(vision, clip)
    assert encoder.why_no_text == ""
    shown, prompts = torch.rand(2, 32, 32, 3), ["a red heart", "a star in the snow"]
    wanted = (encoder.images(shown) * Texts(clip, "l")(prompts)).sum(1)
    assert torch.allclose(encoder.follows(shown, prompts), wanted) and wanted.std() > 0
    assert torch.allclose(Texts(clip, "l")(prompts).norm(dim=1), torch.ones(2), atol=1e-5)


def test_of_a_long_prompt_the_first_part_is_read(pair, monkeypatch):
    from tlora_core.hosts.comfy.encoders import Texts

    clip = pair[1]
    parts = [clip.tokenize(text)["l"][0] for text in ("a red heart", "a star in the snow")]
    wanted = Texts(clip, "l")(["a red heart"])
    monkeypatch.setattr(clip, "tokenize", lambda prompt: {"l": parts})
    assert torch.equal(Texts(clip, "l")(["a prompt of two parts"]), wanted)


@pytest.mark.parametrize("wrong, tells", [(0, True), (1, True), (2, False)])
def test_all_colours_but_one_must_be_nearest_to_their_names(comfy, wrong, tells):
    from tlora_core.hosts.comfy.encoders import COLOURS, tells_colours_apart

    cosines = 0.1 * torch.eye(len(COLOURS))
    cosines[:, 2] += 0.5  # a text that is near to all pictures
    for place in range(wrong):
        cosines[place, place] -= 0.3
    encoder = SimpleNamespace(images=lambda pictures: torch.eye(len(COLOURS)))
    assert tells_colours_apart(encoder, lambda prompts: cosines.T) == tells


@pytest.mark.parametrize("name", ["l", "g", "h"])
def test_each_text_encoder_of_the_hosts_clips_may_be_the_one(comfy, monkeypatch, name):
    from tlora_core.hosts.comfy import encoders

    monkeypatch.setattr(encoders, "tells_colours_apart", lambda encoder, texts: True)
    sizes = {each: 7 if each == name else 5 for each in ("l", "g", "h")}
    inner = {
        f"clip_{each}": SimpleNamespace(transformer=SimpleNamespace(text_projection=torch.nn.Linear(3, size)))
        for each, size in sizes.items()
    }
    clip = SimpleNamespace(cond_stage_model=SimpleNamespace(**inner))
    assert encoders.paired_text(SimpleNamespace(projection=7), clip).name == name


def test_text_encoder_of_the_same_size_that_does_not_tell_colours_apart_does_not_count(pair):
    from tlora_core.hosts.comfy.encoders import VisionEncoder

    vision, clip = pair
    layer = clip.cond_stage_model.clip_l.transformer.text_projection
    with torch.no_grad():  # such as a projection that the checkpoint lacks
        layer.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    assert "Obedience is not measured" in VisionEncoder(vision, clip).why_no_text


def test_text_encoder_of_another_size_does_not_count(pair):
    from tlora_core.hosts.comfy.encoders import VisionEncoder

    assert VisionEncoder(vision_of({**CLIP_CONFIG, "projection_dim": 96}), pair[1]).why_no_text


def test_scorers_by_name(comfy, model_folders):
    import folder_paths

    from tlora_core.hosts.comfy import encoders

    folder_paths.add_model_folder_path("clip_vision", str(model_folders))
    assert encoders.scorer_names()[:2] == ["none", "tiny world"] and {"clip", "dino"} <= set(encoders.scorer_names())
    assert [encoders.load_scorer(name).name for name in ("tiny world", "clip", "dino")] == [
        "tiny world",
        "clip",
        "dino",
    ]
    assert encoders.load_scorer("clip").why_no_text == "" != encoders.load_scorer("dino").why_no_text


def test_a_folder_goes_to_the_card_once_there_is_room_or_to_the_cpu(comfy, model_folders, monkeypatch):
    import comfy.model_management
    import folder_paths

    from tlora_core.hosts.comfy import encoders

    folder_paths.add_model_folder_path("clip_vision", str(model_folders))
    freed = []
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: "card")
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *room: freed.append(room))
    monkeypatch.setattr(encoders, "FolderEncoder", lambda folder, types, device="cpu": (folder.name, device))
    assert encoders.load_scorer("clip", on_cpu=True) == ("clip", "cpu") and freed == []
    assert encoders.load_scorer("clip") == ("clip", "card")
    assert freed == [((model_folders / "clip" / "model.safetensors").stat().st_size, "card")]
