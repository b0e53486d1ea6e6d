"""What goes wrong in a training is said of what it is: clip or vae of another model, a patch, a layer by its name."""

import pytest
import torch
from training_runs import images, request, run

SAME_MODEL = "connect model, clip and vae of the same model."


def error_of(base, **changes):
    from tlora_core import TLoRAError

    with pytest.raises(TLoRAError) as raised:
        run(base, **changes)
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".") and "Traceback" not in message
    return message


def test_clip_and_vae_of_another_model_are_told_apart_before_the_model_runs(base, output, monkeypatch):
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser

    _, clip, vae = base
    monkeypatch.setattr(HostDenoiser, "__init__", lambda *args: pytest.fail("the model has run"))
    encode, encode_text = vae.encode, clip.encode_from_tokens_scheduled
    with monkeypatch.context() as patch:
        patch.setattr(vae, "encode", lambda pixels: encode(pixels)[:, :4])
        assert error_of(base) == f"vae encodes a picture into 4 channels, but model takes 16; {SAME_MODEL}"
    monkeypatch.setattr(
        clip, "encode_from_tokens_scheduled", lambda tokens: [[t[..., :96], o] for t, o in encode_text(tokens)]
    )
    assert error_of(base) == f"clip encodes text 96 wide, but model takes 128; {SAME_MODEL}"


def test_every_family_takes_the_encodings_that_its_own_clip_and_vae_give(comfy):
    """What a family's config says of its text and latents is what its models are called with."""
    import random_models

    from tlora_core.hosts.comfy.training.encode import Takes

    known = {}
    for name in random_models.SMALL:
        model = random_models.small(name, device=torch.device("meta"))
        takes = Takes.of(model)
        assert takes.text in (0, random_models.conditioning(model, 8)[0][0].shape[-1]), name
        kind = model.model.latent_format
        packed = kind.process_in(torch.zeros(1, kind.latent_channels, *(1,) * (kind.latent_dimensions - 2), 8, 8))
        assert takes.channels == (kind.latent_channels if packed.shape[1] == kind.latent_channels else 0), name
        known[name] = takes.text
    assert all(known[name] for name in ("sd15", "flux"))


@pytest.mark.parametrize("part", ["vae", "clip"])
def test_a_part_that_fails_is_named_with_the_words_of_its_error(base, output, monkeypatch, part):
    from comfy.model_management import InterruptProcessingException

    _, clip, vae = base
    place, name = (vae, "encode") if part == "vae" else (clip, "encode_from_tokens_scheduled")

    def failing(error):
        def fail(*args):
            raise error

        monkeypatch.setattr(place, name, fail)

    failing(AttributeError("'Model' object\nhas no 'encoder'"))
    what = "a picture" if part == "vae" else '"a photo of sks heart"'
    assert error_of(base) == (
        f"{part} failed to encode {what} (AttributeError: 'Model' object has no 'encoder'); connect another "
        f"{part.upper()}."
    )
    for passing in (InterruptProcessingException(), torch.OutOfMemoryError("no memory")):
        failing(passing)
        with pytest.raises(type(passing)):
            run(base)


def raising(output, options):
    raise ValueError("blur needs\n an odd radius")


def overwriting(output, options):
    twice = 2 * output
    squared = twice * twice
    twice.add_(1)
    return squared


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_nodes_patch_that_raises_is_named_with_its_layer(base, output, memory):
    patched = base[0].clone()
    patched.set_model_attn1_output_patch(raising)
    assert error_of((patched, *base[1:]), memory=memory) == (
        f'model has a patch that cannot be trained through: "raising" of {__name__}, at the layer '
        '"input_blocks.1.1.transformer_blocks.0" (ValueError: blur needs an odd radius); connect the model from before '
        "the node that adds the patch, and put that node after Train."
    )
    assert run(base, memory=memory).file


def test_a_wrapper_that_raises_is_named_with_its_pack(base, output, monkeypatch, tmp_path):
    from comfy.patcher_extension import WrappersMP

    file = tmp_path / "custom_nodes" / "ComfyUI-Blur" / "nodes.py"
    names = {"__name__": "x"}
    code = (
        "class Blur:\n    def __call__(self, executor, *args, **kwargs):\n        return executor(*args, **kwargs)[99]"
    )
    exec(compile(code, str(file), "exec"), names)
    patched = base[0].clone()
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "blur", names["Blur"]())
    message = error_of((patched, *base[1:]), memory="fast")
    assert 'through: "Blur.__call__" of ComfyUI-Blur, at the layer UNetModel (IndexError: ' in message


def without_overwriting(output, options):
    return (2 * output).square()


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_patch_inside_a_block_may_overwrite_what_the_backward_pass_needs(base, output, memory):
    losses = []
    for patch in (overwriting, without_overwriting):
        patched = base[0].clone()
        patched.set_model_attn1_output_patch(patch)
        losses.append(run((patched, *base[1:]), memory=memory).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) > 1


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_patch_outside_of_blocks_that_overwrites_what_the_backward_pass_needs_is_named(base, output, memory):
    """Autograd notices that only as it goes back, and says neither where nor who."""
    patched = base[0].clone()
    patched.set_model_input_block_patch(overwriting)
    message = error_of((patched, *base[1:]), memory=memory)
    assert "modified by an inplace operation" in message
    if memory == "fast":
        assert 'model has a patch that cannot be trained through: "overwriting" of' in message


def test_a_layer_that_gets_another_width_is_named(base, output, monkeypatch):
    _, clip, _ = base
    encode = clip.encode_from_tokens_scheduled
    monkeypatch.setattr(
        clip,
        "encode_from_tokens_scheduled",
        lambda tokens: [[t, {**o, "pooled_output": o["pooled_output"][:, :99]}] for t, o in encode(tokens)],
    )
    message = error_of(base, memory="fast")
    assert message.startswith('model failed at the layer "label_emb.0.0" in step 1 (mat1 and mat2 shapes cannot be')
    assert message.endswith(
        "); check that clip and vae belong to this model; if a node patches the model, connect the model from before "
        "it, otherwise report this with the log."
    )


def test_a_later_step_is_named_too(base, output, monkeypatch):
    from tlora_core.layers.trained import _AddBranches

    calls, backward = [], _AddBranches.backward

    def failing(ctx, gradient):
        calls.append(1)
        if len(calls) == 100:
            raise NotImplementedError("no kernel")
        return backward(ctx, gradient)

    monkeypatch.setattr(_AddBranches, "backward", staticmethod(failing))
    message = error_of(base, memory="fast")
    assert "blocks." in message and " in step 2 (NotImplementedError: no kernel); if" in message


def test_what_fails_outside_the_model_is_not_said_of_it(base, output):
    from tlora_core.hosts.comfy.training.personalize import Personalization

    def fail(step, loss):
        raise RuntimeError("the disk is gone")

    with torch.inference_mode(), pytest.raises(RuntimeError, match="^the disk is gone$"):
        Personalization(*base, images(), request()).train(2, fail)
