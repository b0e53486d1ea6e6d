"""Wrong input to the nodes: one sentence, and nothing is harmed."""

import os
import pickle
import re
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from failing_graphs import bad_training, baking, saving_as
from graphs import Graph, TinyGraph, bare_and_adapted, error_of, files_below
from safetensors.torch import save_file


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and not re.search(r"[.!?] +[A-Z]", text)


def transparent_image(graph):
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=255)
    alpha = graph.add("SolidMask", value=1.0, width=64, height=64)
    return graph.add("JoinImageWithAlpha", image=image[0], alpha=alpha[0])[0]


def empty_image(width, height):
    return lambda graph: graph.add("EmptyImage", width=width, height=height, batch_size=1, color=255)[0]


def clip_that_changes_over_a_sampling(graph):
    hook = graph.add("CreateHookLora", lora_name="tests/good.safetensors", strength_model=1.0, strength_clip=1.0)[0]
    off = graph.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)[0]
    on = graph.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=off)[0]
    hooks = graph.add("SetHookKeyframes", hooks=hook, hook_kf=on)[0]
    return graph.add("SetClipHooks", clip=graph.clip, apply_to_conds=True, schedule_clip=True, hooks=hooks)[0]


def diffusion_transformer(graph):
    return graph.add("UNETLoader", unet_name="tests_sd3.safetensors", weight_dtype="default")[0]


def part_of_a_model_only_file(slot):
    return lambda graph: graph.add("CheckpointLoaderSimple", ckpt_name="tests_model_only.safetensors")[slot]


def training_without_image():
    graph = bad_training()()
    (training,) = (node for node in graph.values() if node["class_type"] == "TLoRATrainFromImage")
    del training["inputs"]["image"]
    return graph


def load_of(name):
    def build():
        graph = TinyGraph()
        graph.picture(graph.add("TLoRALoad", file=name, strength=1.0, model=graph.model)[0])
        return graph

    return build


def single(class_type, **inputs):
    """A case: one node whose first output is looked at."""

    def build():
        graph = Graph()
        graph.add("PreviewAny", source=graph.add(class_type, **inputs)[0])
        return graph

    return build


def preview_of_sigmas_without_a_model():
    graph = TinyGraph()
    sigmas = graph.add("BasicScheduler", model=graph.model, scheduler="normal", steps=5, denoise=1.0)
    graph.save(graph.add("TLoRASchedulePreview", rank=4, min_rank=2, alpha=1.0, sigmas=sigmas[0])[0])
    return graph


OUTSIDE = Path(tempfile.gettempdir()) / f"tlora_test_{uuid.uuid4().hex}"  # no test may make it


BAD = {
    "transparent image": (bad_training(image=transparent_image), "image 1 is transparent in all of it"),
    "image of one pixel": (bad_training(image=empty_image(1, 1)), "image is 1x1 pixels"),
    "image of one row": (bad_training(image=empty_image(64, 1)), "image is 64x1 pixels"),
    "rank above a layer's width": (bad_training(rank=97, min_rank=2), "rank is 97, but the layer .* is 96 x 96"),
    "min_rank above rank": (bad_training(rank=4, min_rank=5), "min_rank is 5; .* from 0 to the rank, which is 4"),
    "no token and no class word": (bad_training(token=" ", class_word=""), "token and class_word are both empty"),
    "token with a character that cannot be shown": (
        bad_training(token="sks\u200d"),
        r"token is 'sks\\u200d'; it must be one line of text, without",
    ),
    "resolution that the VAE cannot encode": (
        bad_training(resolution=68),
        "resolution is 68; set it to a multiple of 8",
    ),
    "model of another family": (
        bad_training(model=diffusion_transformer),
        r'^model failed at the layer "y_embedder\.mlp\.0" in step 1 \(mat1 and mat2 shapes .*\); check that clip and '
        "vae belong to this model; if a node patches the model, ",
    ),
    "clip of a model-only file": (
        bad_training(clip=part_of_a_model_only_file(1)),
        "^clip is empty, .* connect the clip of a Load CLIP node",
    ),
    "vae of a model-only file": (
        bad_training(vae=part_of_a_model_only_file(2)),
        "^vae is empty, .* connect the vae of a Load VAE node",
    ),
    "file for another model": (load_of("tests/plain.safetensors"), '"plain.safetensors": none of its 2 keys fits'),
    "file that is cut off": (
        load_of("tests/cut.safetensors"),
        '"cut.safetensors": it cannot be read as a safetensors file',
    ),
    "file that is a pickle": (
        load_of("tests/pickle.safetensors"),
        '"pickle.safetensors": it cannot be read as a safetensors',
    ),
    "file that is empty": (
        load_of("tests/empty.safetensors"),
        '"empty.safetensors": it cannot be read as a safetensors file',
    ),
    "no prompts": (
        single("TLoRAPrompts", prompts=" \n\n", subject="sks dog"),
        "prompts is empty; write at least one line",
    ),
    "sigmas without their model": (preview_of_sigmas_without_a_model, "model is not connected"),
    "preview with min_rank above rank": (
        single("TLoRASchedulePreview", rank=4, min_rank=5, alpha=1.0),
        "min_rank is 5",
    ),
    "clip that changes over a sampling": (
        bad_training(clip=clip_that_changes_over_a_sampling),
        "clip gives 2 scheduled encodings of a prompt",
    ),
    "training into a folder above": (bad_training(file_name="../x"), r'file_name is "\.\./x", which leaves the loras'),
    "file in a folder above": (saving_as("../x"), "which leaves the loras folder"),
    "file at an absolute path": (saving_as(str(OUTSIDE / "x")), "which leaves the loras folder"),
    "file up and down again": (saving_as("a/../../x"), "which leaves the loras folder"),
    "file without a name": (saving_as("tests/"), 'file_name is "tests/"; give a name'),
    "file with a name that no disk takes": (saving_as("x" * 240), 'file_name is "x+", which cannot be created here'),
    "training into such a file": (bad_training(file_name="x" * 300), 'file_name is "x+", which cannot be created here'),
    "file in a file": (
        saving_as("tests/plain.safetensors/x"),
        'file_name is "tests/plain.safetensors/x", which cannot be created here',
    ),
    "baking into a folder above": (baking(file_name="../x"), "which leaves the loras folder"),
    "baking without a name": (baking(mode="steps", file_name="tests/"), 'file_name is "tests/"; give a name'),
    "more parts than components": (baking(mode="steps", parts=4), "parts is 4; set it to a whole number from 2 to 3"),
}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def bad_files(server, loras, trained):
    """Files that the cases name: good.safetensors is a T-LoRA, the others are not. Returns what the pickle would
    make."""
    folder, trap = loras / "tests", server.workspace / "unpickled"
    whole = (loras / trained[0]).read_bytes()
    (folder / "good.safetensors").write_bytes(whole)
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "pickle.safetensors").write_bytes(pickle.dumps(Payload(trap)))
    plain = {"lora_unet_x.lora_up.weight": torch.ones(4, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 4)}
    save_file(plain, folder / "plain.safetensors")
    models = server.workspace / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    checkpoints = server.workspace / "models" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    # The few tensors by which the host tells that a file is a Stable Diffusion 3 transformer, of one block.
    save_file(
        {
            "joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(192, 64),
            "x_embedder.proj.weight": torch.zeros(64, 16, 2, 2),
            "final_layer.linear.weight": torch.zeros(64, 64),
            "context_embedder.weight": torch.zeros(64, 32),
            "y_embedder.mlp.0.weight": torch.zeros(64, 32),
            "pos_embed": torch.zeros(1, 16, 64),
        },
        models / "tests_sd3.safetensors",
    )
    (checkpoints / "tests_model_only.safetensors").write_bytes((models / "tests_sd3.safetensors").read_bytes())
    return trap


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_harmed(server, good, trained, bad_files, case):
    build, words = BAD[case]
    models = server.workspace / "models"
    before = files_below(models)
    message = error_of(server, build())
    assert re.search(words, message) and is_one_sentence(message)
    assert files_below(models) == before and not bad_files.exists() and not OUTSIDE.exists()
    for now, then in zip(bare_and_adapted(server, trained[0]), good):
        assert np.array_equal(now, then)


def test_missing_image_is_refused_before_anything_runs(server):
    result = server.run(training_without_image(), check=False)
    assert len(result.errors) == 1 and "Required input is missing (image)" in result.errors[0]
