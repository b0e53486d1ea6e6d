"""Which trainings on the tiny base count as equal to an earlier one, whose T-LoRA is then used."""

import json

import pytest
import torch
from training_runs import folders, images, record, request, run, same


def test_finished_run_is_found_again_and_a_changed_one_is_trained(base, output):
    first = run(base)
    again = run(base)
    assert again.file == first.file and again.losses == first.losses and same(again.tlora, first.tlora)
    assert len(folders(output)) == 1 and record(output)["state"] == "done" and len(first.losses) == 6
    renamed = run(base, file_name="run/other")
    assert renamed.file != first.file and same(renamed.tlora, first.tlora) and len(folders(output)) == 1
    assert run(base, file_name="run/other").file == renamed.file
    run(base, request(config={"seed": 1}))
    assert len(folders(output)) == 2
    anew = run(base, rerun="restart")
    assert anew.file != first.file and same(anew.tlora, first.tlora) and len(folders(output)) == 3


def test_the_files_note_is_shown_at_the_end_and_when_the_run_is_found_again(base, output, monkeypatch):
    from tlora_core import TLoRAFile
    from tlora_core.hosts.comfy.page.training import LiveRun

    said, finish = [], LiveRun.finish
    monkeypatch.setattr(TLoRAFile, "note", "Other programs find some of it.")
    monkeypatch.setattr(LiveRun, "finish", lambda live, *told: (said.append(told), finish(live, *told))[1])
    name = run(base).file
    run(base)
    assert (
        said == [(state, TLoRAFile.note, name) for state in ("done", "found")]
        and record(output)["message"] == TLoRAFile.note
    )


def test_an_unfinished_run_of_the_first_version_is_recognised_and_trained_again(base, output, monkeypatch):
    from tlora_core.hosts.comfy.page.training import LiveRun

    whole = run(base)
    unfinished = folders(output)[0]
    said, note = [], LiveRun.note
    monkeypatch.setattr(LiveRun, "note", lambda live, text: (said.append(text), note(live, text))[1])
    # It had no "format", and the parameters of each layer apart.
    state = {
        "step": 3,
        "losses": [0.1] * 3,
        "parameters": [torch.zeros(4, 8)],
        "buffers": [],
        "optimizer": {},
        "average": None,
        "lr_schedule": None,
        "scaler": None,
    }
    torch.save(state, unfinished / "checkpoint.pt")
    kept = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps({**kept, "state": "cancelled", "files": {}}))
    again = run(base)
    assert len(folders(output)) == 2 and again.losses == whole.losses and same(again.tlora, whole.tlora)
    assert said == ["The first 3 steps were trained by an older version and cannot be resumed; training starts again."]


def test_a_finished_run_of_every_version_is_found(base, output, monkeypatch):
    from tlora_core.hosts.comfy.training import found

    for steps, version in ((1, "0.1.0"), (2, "0.2.0")):
        with monkeypatch.context() as patch:
            patch.setattr(found, "RESULTS_OF", version)
            first = run(base, request(steps))
        monkeypatch.setattr("tlora_core.version.__version__", "9.9.9")
        assert run(base, request(steps)).file == first.file and len(folders(output)) == steps
    assert run(base, request(1), rerun="restart").file != first.file and len(folders(output)) == 3


def test_run_whose_file_was_changed_is_trained_again(base, output):
    first = run(base)
    (output / "loras" / first.file).write_bytes(b"something else")
    again = run(base)
    assert again.file != first.file and same(again.tlora, first.tlora)


def test_everything_that_the_result_depends_on_changes_the_key(base, output):
    from tlora_core.hosts.comfy.sampling import apply_tlora
    from tlora_core.hosts.comfy.training.fingerprint import fingerprint

    model, clip, vae = base
    tlora = run(base).tlora
    patched = model.clone()
    key = next(k for k in model.model.state_dict() if k.endswith("attn1.to_q.weight"))
    patched.add_patches({key: (torch.ones(1),)}, 0.5)
    other = model.clone()
    other.add_patches({key: (torch.ones(1),)}, 0.6)
    sampled = model.clone()
    sampled.model_options["sampler_cfg_function"] = lambda args: args["cond"]
    keys = [
        fingerprint(m)
        for m in (model, patched, other, apply_tlora(model, tlora), apply_tlora(model, tlora, 0.5), sampled)
    ]
    assert len(set(keys)) == 6
    assert fingerprint(model.clone()) == keys[0] and fingerprint(apply_tlora(model, tlora)) == keys[3]
    assert fingerprint(sampled) != keys[5], "what cannot be told apart is never the same"
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    before = weight.detach().clone()
    with torch.inference_mode():
        weight.mul_(1.5)
        assert fingerprint(model) != keys[0]
        weight.copy_(before)
    assert fingerprint(model) == keys[0]
    assert len({fingerprint(images()), fingerprint(images(2)), fingerprint(images(size=65))}) == 3


def test_a_clip_with_hooks_is_taken_for_no_other(base):
    """Hooks change the text encoder's weights outside its patches, as of Set CLIP Hooks."""
    import comfy.hooks

    from tlora_core.hosts.comfy.training.fingerprint import fingerprint

    patcher = base[1].patcher.clone()
    assert fingerprint(patcher) == fingerprint(base[1].patcher)
    patcher.forced_hooks = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0)
    assert len({fingerprint(patcher), fingerprint(patcher), fingerprint(base[1].patcher)}) == 3


def test_patches_that_act_only_while_sampling_change_no_fingerprint_unless_class_pictures_are_drawn(base, output):
    from comfy_extras.nodes_easycache import EasyCacheNode
    from comfy_extras.nodes_model_advanced import RescaleCFG

    def steered():
        model = RescaleCFG().patch(base[0], 0.7)[0]
        return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False)[0], *base[1:]

    first = run(steered())
    assert run(steered()).file == run(base).file == first.file
    assert run(base, rerun="restart").losses == first.losses
    drawing = request(2, config={"prior_weight": 1.0, "prior_count": 1})
    assert run(steered(), drawing).file != run(base, drawing).file


def test_a_merged_model_is_known_again_and_told_from_other_merges(base):
    import host_models as models
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    from tlora_core.hosts.comfy.training.fingerprint import fingerprint

    def merged(seed, ratio=0.7, strength=0.0):
        other = models.random_unet(seed)
        key = next(k for k in other.model.state_dict() if k.endswith("attn1.to_q.weight"))
        other.add_patches({key: (torch.ones(1),)}, strength)
        return ModelMergeSimple().merge(base[0], other, ratio)[0]

    assert fingerprint(merged(3)) == fingerprint(merged(3))
    made = merged(3), merged(4), merged(3, 0.6), merged(3, strength=0.5), base[0]
    assert len({fingerprint(model) for model in made}) == len(made)


@pytest.mark.parametrize("size", [64, 512, 1024])
def test_every_pixel_of_pictures_and_masks_counts(comfy, size):
    from tlora_core.hosts.comfy.training.fingerprint import fingerprint
    from tlora_core.training.dataset import TrainingImage

    white, masked = torch.ones(size, size, 3), torch.zeros(size, size)
    other, repainted = white.clone(), masked.clone()
    other[size // 2, size // 2 + 1, 2] = 0.9
    repainted[3, size - 2] = 1
    made = [
        TrainingImage(white),
        TrainingImage(other),
        TrainingImage(white, mask=masked),
        TrainingImage(white, mask=repainted),
        TrainingImage(white, "a dog"),
    ]
    assert len({fingerprint([image]) for image in made}) == len(made) and fingerprint(made) == fingerprint(list(made))


def test_run_on_another_picture_on_the_same_ground_is_another_run(base, output):
    from tlora_core.training.dataset import training_images

    first, second = torch.ones(2, 1, 512, 512, 3)
    first[:, 200:300, 200:300], second[:, 150:350, 250:350] = 0, 0.5
    asked = request(2, rate=1e-3)
    done = [run(base, asked, pictures=training_images(pixels)) for pixels in (first, second, first)]
    assert not same(done[0].tlora, done[1].tlora) and same(done[0].tlora, done[2].tlora) and len(folders(output)) == 2


def test_reporting_to_the_page_changes_no_fingerprint(base):
    from comfy.patcher_extension import WrappersMP

    from tlora_core import RankSchedule
    from tlora_core.hosts.comfy.page.rank import _Teller
    from tlora_core.hosts.comfy.training.fingerprint import fingerprint

    told = base[0].clone()
    told.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tlora-live-x", _Teller(RankSchedule(4, 2), "7", None))
    assert fingerprint(told) == fingerprint(told.clone())


def test_a_lora_that_the_host_injects_beside_the_layers_is_trained_on_and_no_other_taken_for_it(base, output):
    """Its node Load LoRA (Bypass)."""
    import comfy.sd
    import comfy.utils
    import host_models as models

    models.random_tlora(base[0], 4, 4, 1.0).save(output / "lora.safetensors", torch.float32)

    def losses(load, strength):
        with torch.inference_mode():  # as in a node
            model = load(base[0], None, comfy.utils.load_torch_file(str(output / "lora.safetensors")), strength, 0)[0]
        return run((model, *base[1:]), request(2)).losses

    bypassed = [losses(comfy.sd.load_bypass_lora_for_models, strength) for strength in (1.0, 0.5)]
    assert bypassed[0] == pytest.approx(losses(comfy.sd.load_lora_for_models, 1.0), rel=1e-4)
    assert bypassed[1] == pytest.approx(losses(comfy.sd.load_lora_for_models, 0.5), rel=1e-4)
    assert bypassed[0] != pytest.approx(bypassed[1], rel=1e-2)
