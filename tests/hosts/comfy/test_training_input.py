"""Input that a training run refuses before its first step, and the sentence for it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from training_runs import request, run


def test_white_space_in_token_and_class_word_becomes_one_space_and_hidden_characters_are_refused(base, output):
    from tlora_core import TLoRAError, TLoRAFile
    from tlora_core.hosts.comfy.training.personalize import TrainRequest

    plain = request(2, token="sks", class_word="red heart")
    asked = request(2, token="\u3000sks\xa0", class_word="red\u2003 heart\t")
    assert asked == plain and asked.prompt == "a photo of sks red heart"
    saved = TLoRAFile.load(output / "loras" / run(base, asked).file)
    assert (saved.token, saved.class_word) == ("sks", "red heart")
    for name, hidden in (("token", "\u200d"), ("class_word", "\ufeff"), ("class_word", "\x00")):
        shown = hidden.encode("unicode_escape").decode()
        with pytest.raises(TLoRAError) as raised:
            TrainRequest(**{"token": "sks", "class_word": "dog", name: f"a{hidden}b"})
        assert str(raised.value) == f"{name} is 'a{shown}b'; it must be one line of text, without {shown}."
    with pytest.raises(TLoRAError, match="both empty"):
        request(token="\u3000", class_word="\t")


@pytest.mark.parametrize("missing", ["clip", "vae"])
def test_model_file_without_clip_or_vae_is_reported_before_any_step(base, output, missing):
    from tlora_core.errors import TLoRAError

    model, clip, vae = base
    # What the host's Load Checkpoint gives for a file without them: None, and a VAE without a network.
    parts = (model, None, vae) if missing == "clip" else (model, clip, SimpleNamespace())
    with pytest.raises(
        TLoRAError, match=f"^{missing} is empty.*connect the {missing} of a Load {missing.upper()} node"
    ):
        run(parts)
    assert not (output / "tlora_runs").exists()


def test_patch_that_cannot_be_trained_through_is_named_and_not_taken_for_another_models(base, output):
    """As of IP-Adapter, whose tensors were made by its node."""
    from tlora_core import TLoRAError

    patched = base[0].clone()
    with torch.inference_mode():
        scale = torch.full((1,), 1.1)
    patched.set_model_attn2_output_patch(lambda output, options: output * scale)
    with pytest.raises(
        TLoRAError,
        match="patch that cannot be trained through: .* of .*test_training_input, .* connect the model from before",
    ):
        run((patched, *base[1:]))
    assert run(base).file


@pytest.mark.parametrize("broken", ["vae", "clip"])
def test_nan_from_vae_or_clip_is_reported_before_any_step(base, output, monkeypatch, broken):
    from tlora_core import TLoRAError

    _, clip, vae = base
    encode, encode_text = vae.first_stage_model.encode, clip.cond_stage_model.encode_token_weights
    if broken == "vae":
        monkeypatch.setattr(vae.first_stage_model, "encode", lambda pixels: encode(pixels) * float("nan"))
        message = (
            "vae encodes a picture into NaN or infinite values; start ComfyUI with --fp32-vae, or connect another VAE."
        )
    else:
        monkeypatch.setattr(
            clip.cond_stage_model,
            "encode_token_weights",
            lambda tokens: [x * float("inf") for x in encode_text(tokens)],
        )
        message = (
            'clip encodes "a photo of sks heart" into NaN or infinite values; start ComfyUI with '
            "--fp32-text-enc, or connect another CLIP."
        )
    with pytest.raises(TLoRAError) as raised:
        run(base)
    assert str(raised.value) == message and not list(output.rglob("run.json"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"validate_every": -1}, "validate_every"),
        ({"checkpoint_every": -5}, "checkpoint_every"),
        ({"rerun": "x"}, "rerun"),
        ({"validate_every": 5}, "validation_prompts is empty"),
        ({"keep": "first"}, 'keep is "first"; choose one of last, best, stop when past it.'),
        ({"patience": 0}, "patience is 0; set it to 1 or more."),
        ({"score_seeds": 0}, "score_seeds is 0; set it to 1 or more."),
        ({"keep": "best", "validate_every": 5, "validation_prompts": ("a",)}, "nothing scores the steps; choose a "),
        ({"scorer": "x"}, 'scorer is "x", but validate_every is 0, so no step is scored; set it to '),
        ({"clip_vision": True}, "clip_vision is connected, but validate_every is 0, so no step is scored; set it to "),
        ({"clip_vision": True, "scorer": "x", "validate_every": 5}, "and clip_vision is connected; disconnect it, or "),
    ],
)
def test_invalid_keeping_is_refused(comfy, changes, message):
    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.training.keeping import Keeping

    with pytest.raises(TLoRAError, match=message):
        Keeping(**changes)


def test_missing_packages_are_named_before_anything_is_trained(comfy, monkeypatch):
    from tlora_core import TLoRAError, make_adapters
    from tlora_core.hosts.comfy.training.keeping import Keeping
    from tlora_core.training.config import TrainConfig
    from tlora_core.training.trainer import Trainer

    for package in ("wandb", "prodigyopt", "diffusers.optimization"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TLoRAError, match="input wandb needs the Python package wandb .* pip install wandb.$"):
        Keeping(wandb=True)
    with pytest.raises(TLoRAError, match="optimizer prodigy needs the Python package prodigyopt"):
        Trainer(make_adapters("lora", "last_random", {"x": (4, 4)}, 2, 0), TrainConfig(optimizer="prodigy"))
    with pytest.raises(
        TLoRAError,
        match='lr_schedule cosine needs the Python package diffusers .* pip install "diffusers>=[0-9.]+,<[0-9.]+".$',
    ):
        Trainer(make_adapters("lora", "last_random", {"x": (4, 4)}, 2, 0), TrainConfig(lr_schedule="cosine"))
