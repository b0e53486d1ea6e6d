"""Default settings of the host's families: how a model is trained, and how pictures are drawn with it."""

from dataclasses import replace

import pytest
import torch

PROMPT = "a photo of a dog"


def usual(family, **said):
    """The defaults of the family, or of one whose config says something else; no network is made."""
    import random_models

    from tlora_core.hosts.comfy.model.defaults import defaults_of

    small = random_models.SMALL[family]
    return defaults_of(random_models.config_of(replace(small, config={**small.config, **said})))


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("sdxl", ("tlora", 800, 1e-4, "adamw", 1024, 0.0, {"lora": 500, "vanilla_tlora": 500})),
        ("flux", ("vanilla_tlora", 500, 1e-4, "prodigy", 1024, 1.0, {"lora": 400})),
        ("sd3", ("vanilla_tlora", 500, 1e-4, "prodigy", 1024, 1.0, {"lora": 400})),
    ],
)
def test_training_settings_are_the_papers(comfy, name, wanted):
    from dataclasses import astuple

    assert astuple(replace(usual(name), guidance=None))[:-1] == wanted


def test_tiny_base_has_defaults_of_its_own(base):
    from tlora_core.hosts.comfy.model.defaults import defaults_for
    from tlora_core.hosts.comfy.training.personalize import filled_in

    tiny = defaults_for(base[0])
    assert (tiny.steps, tiny.learning_rate, tiny.resolution) == (350, 1.5e-3, 64)
    asked = filled_in(
        base[0], {"steps": 0, "learning_rate": 0.0}, token="sks", class_word="heart", method="auto", resolution=0
    )
    assert (asked.config.steps, asked.config.learning_rate, asked.resolution, asked.method) == (
        350,
        1.5e-3,
        64,
        "tlora",
    )


@pytest.mark.filterwarnings("ignore:.*copy construct", "ignore:__array_wrap__")
def test_a_model_is_told_a_guidance_where_its_network_takes_one_and_only_there(comfy):
    """By the network itself: the module that embeds the guidance is there or is not."""
    import random_models

    from tlora_core.hosts.comfy.model.defaults import defaults_for

    told = {}
    for family in random_models.SMALL:
        model = random_models.small(family, device=torch.device("meta"))
        takes_it = any(
            True for _ in getattr(model.model.diffusion_model, "guidance_in", torch.nn.Identity()).parameters()
        )
        guidance = defaults_for(model).guidance
        assert (guidance.told is not None) == (guidance.told_in_training is not None) == takes_it, family
        if takes_it:
            assert guidance.scale == 1 and not guidance.has_negative_prompt, family
            told[family] = guidance.told
    assert {"flux", "flux2-dev", "hunyuan-video", "hunyuan-video-i2v", "hunyuan-image21-distilled"} <= told.keys()
    assert (told["flux"], told["flux2-dev"], told["hunyuan-video"]) == (3.5, 4.0, 6.0)


RESOLUTIONS = {
    "pixart-alpha": 512,
    "pixart-sigma": 1024,
    "cascade-c": 768,
    "hunyuan-image21": 2048,
    "hunyuan-image21-distilled": 2048,
    "hidream-o1": 2048,
    "hidream": 1024,
    "sd3": 1024,
    "flux": 1024,
    "z-image": 1024,
    "wan": 960,
    "wan22-5b": 960,
    "hunyuan-video": 960,
    "ltxv": 640,
    "kandinsky5": 640,
    "kandinsky5-image": 1024,
    "cogvideox-2b": 576,
}


def test_pictures_have_the_size_that_a_family_was_trained_on(comfy):
    assert {family: usual(family).resolution for family in RESOLUTIONS} == RESOLUTIONS


@pytest.mark.parametrize(
    "family, said, resolution",
    [
        ("sd15", {"context_dim": 768}, 512),
        ("sd2", {"context_dim": 1024}, 768),
        ("sdxl", {"context_dim": 2048}, 1024),
        ("pixart-sigma", {"input_size": 256, "pe_interpolation": 4}, 2048),
        ("wan", {"dim": 1536}, 640),
        ("cogvideox-2b", {"patch_size_t": 2}, 1024),
    ],
)
def test_pictures_follow_what_a_models_config_says_of_itself(comfy, family, said, resolution):
    assert usual(family, **said).resolution == resolution


class Clip:
    """Gives a family's random texts."""

    def __init__(self, model):
        self.model = model

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        import random_models

        return random_models.conditioning(self.model, 5, len(text))


class Vae:
    first_stage_model = None

    def __init__(self, model):
        import random_models

        self.shape = random_models.latent(model).shape

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        return torch.zeros(self.shape)

    def decode(self, latent):
        return torch.zeros(1, 64, 64, 3)


# (guidance scale, guidance told); a scale of 1 leaves the negative prompt out.
DRAWN = {
    "sdxl": (5.0, None),
    "flux": (1.0, 3.5),
    "flux-inpaint": (1.0, 30.0),
    "flux-schnell": (1.0, None),
    "flux2-dev": (1.0, 4.0),
    "flux2-klein": (5.0, None),
    "ovis": (5.0, None),
    "longcat": (4.0, None),
    "chroma": (3.5, None),
    "hunyuan-video": (1.0, 6.0),
    "hunyuan-video-i2v": (1.0, 6.0),
    "hunyuan-image21": (3.5, None),
    "hunyuan-image21-distilled": (1.0, 3.25),
    "z-image": (4.0, None),
    "qwen-image": (4.0, None),
    "wan": (6.0, None),
}


@pytest.mark.parametrize("family, guided", DRAWN.items())
def test_pictures_are_drawn_with_the_guidance_of_the_family(comfy, monkeypatch, family, guided):
    import comfy.sample
    import random_models

    from tlora_core.hosts.comfy.draw import draw

    seen = []

    def sample(model, noise, steps, scale, sampler, scheduler, positive, negative, latent, **options):
        seen.append((scale, positive[0][1].get("guidance")))
        assert positive[0][1].get("guidance") == negative[0][1].get("guidance")
        return latent

    monkeypatch.setattr(comfy.sample, "sample", sample)
    model = random_models.small(family, device=torch.device("meta"))
    draw(model, Clip(model), Vae(model), [PROMPT], 64, [0])
    assert seen == [guided]


@pytest.mark.parametrize("family, told", [("flux", 1.0), ("hunyuan-video", 1.0), ("qwen-image", None), ("ovis", None)])
def test_a_training_tells_a_guidance_of_1_where_it_is_distilled_in(comfy, family, told):
    import random_models
    from training_runs import images

    from tlora_core.hosts.comfy.training.personalize import Personalization, filled_in

    model = random_models.small(family)
    fields = {"token": "sks", "class_word": "dog", "method": "lora", "rank": 1, "min_rank": 1, "resolution": 64}
    asked = filled_in(model, {"steps": 1}, **fields)
    made = Personalization(model, Clip(model), Vae(model), images(1), asked)
    assert made.samples[0].conditioning[0][1].get("guidance") == told


def test_the_panel_says_during_a_training_how_the_model_is_guided(base, output):
    from training_runs import run

    from tlora_core.hosts.comfy.page.training import LiveRun

    run(base)
    title = list(LiveRun._runs.values())[-1].title
    asked = "sks heart: tlora, rank 4, min_rank 2, alpha 1; 6 steps of adamw at 0.01, 64 pixels"
    assert title.startswith(f"{asked}, pictures at CFG 5, 88 layers")


def test_guidance_is_told_in_words(comfy):
    says = {family: str(usual(family).guidance) for family in ("flux", "flux-schnell", "z-image")}
    assert says == {
        "flux": "guidance 1 in training and 3.5 in pictures, without a negative prompt",
        "flux-schnell": "pictures without CFG",
        "z-image": "pictures at CFG 4",
    }
