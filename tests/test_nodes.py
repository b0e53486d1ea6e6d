"""The nodes on the real server: what they offer, what they make, and what they say about bad input."""
import json
import os
import pickle
import re
import subprocess
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import Graph, TinyGraph, cached_nodes, difference, pixels
from hostlib.server import PACK_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file

REPO = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((REPO / "workflows").glob("*.json"))
NODES = {
    "TLoRAImages": "T-LoRA Images",
    "TLoRATrainingOptions": "T-LoRA Training Options",
    "TLoRATrainFromImage": "Train T-LoRA from Image",
    "TLoRALoad": "Load T-LoRA",
    "TLoRAApply": "Apply T-LoRA",
    "TLoRASave": "Save T-LoRA",
    "TLoRAExport": "Export T-LoRA",
    "TLoRABake": "Bake T-LoRA",
    "TLoRAInfo": "T-LoRA Info",
    "TLoRASchedulePreview": "T-LoRA Schedule Preview",
    "TLoRAPrompts": "Prompts (T-LoRA)",
    "TLoRACompare": "Compare (T-LoRA)",
    "TLoRAEvaluate": "T-LoRA Evaluate",
    "TLoRATinyBaseModel": "Tiny Base Model (T-LoRA)",
    "TLoRATinySampleConcept": "Sample Concept (T-LoRA)",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def loras(server) -> Path:
    """The server's loras folder."""
    return server.workspace / "models" / "loras"


@pytest.fixture(scope="module")
def trained(server):
    """Two T-LoRAs, by name, that change the picture in different ways."""
    graph = TinyGraph()
    nodes = [graph.train(seed=seed, file_name=f"tests/seed{seed}") for seed in (1, 2)]
    result = server.run(graph)
    return [result.outputs[node.id]["text"][0] for node in nodes]


def bare_and_adapted(server, name):
    """Pictures of the tiny base without and with a T-LoRA file, from one prompt."""
    graph = TinyGraph()
    bare = graph.picture(graph.model)
    adapted = graph.picture(graph.add("TLoRALoad", file=name, strength=1.0, model=graph.model)[0])
    result = server.run(graph)
    return pixels(result, bare), pixels(result, adapted)


@pytest.fixture(scope="module")
def good(server, trained):
    """What a prompt that has nothing wrong gives before anything went wrong."""
    return bare_and_adapted(server, trained[0])


def files_below(folder: Path) -> set[str]:
    """Every file, hidden and temporary ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def same_tensors(path: Path, other: Path) -> bool:
    ours, theirs = load_file(path), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def error_of(server, graph) -> str:
    """The one error of a prompt that fails, without the node's name."""
    result = server.run(graph, check=False)
    assert len(result.errors) == 1, result.errors
    return result.errors[0].partition(": ")[2]


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and not re.search(r"[.!?] +[A-Z]", text)


def declared(info: dict) -> dict[str, tuple]:
    """A class's inputs by name: (type, options)."""
    groups = (info["input"].get(group, {}) for group in ("required", "optional"))
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for group in groups for name, spec in group.items()}


# --- what the server offers ---


def test_every_node_of_the_pack_is_registered_in_its_category(server):
    module = f"custom_nodes.{PACK_NAME}"
    ours = {name: info for name, info in server.object_info().items() if info["python_module"] == module}
    assert {name: info["display_name"] for name, info in ours.items()} == NODES
    assert {info["category"] for info in ours.values()} == {"T-LoRA"}
    assert all(info["description"] for info in ours.values())


@pytest.mark.parametrize("node", NODES)
def test_every_input_has_a_tooltip_and_no_seed_changes_by_itself(server, node):
    inputs = declared(server.object_info()[node])
    assert [name for name, (_, options) in inputs.items() if not options.get("tooltip")] == []
    # Without an explicit no, the interface adds a "control after generate" to every input with this name.
    assert all(options.get("control_after_generate") is False for name, (_, options) in inputs.items() if "seed" in name)


@pytest.mark.parametrize("node", NODES)
def test_help_page_is_served_and_explains_every_input_and_output(server, node):
    page = server.client.request(f"/extensions/{PACK_NAME}/docs/{node}.md").decode()
    info = server.object_info()[node]
    assert page.startswith(f"# {NODES[node]}\n")
    explained = set(re.findall(r"^- \*\*`(.+?)`\*\*", page, flags=re.MULTILINE))
    shown = {options.get("display_name") or name for name, (_, options) in declared(info).items()}
    assert explained == shown | set(info["output_name"])


def test_workflows_of_the_pack_are_listed_and_served_as_templates(server):
    listed = server.client.get_json("/workflow_templates")[PACK_NAME]
    assert sorted(listed) == [path.stem for path in WORKFLOWS] and "quickstart" in listed
    for path in WORKFLOWS:
        assert server.client.get_json(f"/api/workflow_templates/{PACK_NAME}/{path.name}") == json.loads(path.read_text())


# --- train, save, load, apply ---


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.0), ("float16", 0.05), ("bfloat16", 0.2)])
def test_saved_tlora_loads_in_a_later_prompt_and_gives_the_same_picture(server, loras, dtype, tolerance):
    graph = TinyGraph()
    training = graph.train(file_name=f"tests/{dtype}")
    bare, from_training = graph.picture(graph.model), graph.picture(training[1])
    applied = graph.picture(graph.add("TLoRAApply", model=graph.model, tlora=training[0], strength=1.0)[0])
    saved = graph.add("TLoRASave", tlora=training[0], file_name=f"tests/again_{dtype}", dtype=dtype)
    result = server.run(graph)
    name = result.outputs[saved.id]["text"][0]
    expected = pixels(result, applied)
    effect = difference(expected, pixels(result, bare))
    assert effect > 2 and np.array_equal(pixels(result, from_training), expected)
    assert {tensor.dtype for key, tensor in load_file(loras / name).items() if not key.endswith(".alpha")} == {DTYPES[dtype]}
    _, adapted = bare_and_adapted(server, name)
    assert difference(adapted, expected) <= tolerance * effect


def test_strength_zero_is_exactly_the_bare_model(server, trained):
    graph = TinyGraph()
    bare = graph.picture(graph.model)
    loaded = graph.add("TLoRALoad", file=trained[0], strength=0.0, model=graph.model)
    through_load = graph.picture(loaded[0])
    through_apply = graph.picture(graph.add("TLoRAApply", model=graph.model, tlora=loaded[1], strength=0.0)[0])
    result = server.run(graph)
    for node in (through_load, through_apply):
        assert np.array_equal(pixels(result, node), pixels(result, bare))


def test_load_without_a_model_gives_the_tlora_and_says_that_model_is_missing(server, trained, good):
    graph = TinyGraph()
    loaded = graph.add("TLoRALoad", file=trained[0], strength=1.0)
    applied = graph.picture(graph.add("TLoRAApply", model=graph.model, tlora=loaded[1], strength=1.0)[0])
    assert np.array_equal(pixels(server.run(graph), applied), good[1])
    graph.picture(loaded[0])
    assert "connect a model to use its MODEL output" in error_of(server, graph)


def test_branches_with_two_tloras_and_a_bare_branch_do_not_see_each_other(server, trained):
    graph = TinyGraph()
    alone = [bare_and_adapted(server, name)[1] for name in trained]
    plain = graph.picture(graph.model)
    never_adapted = pixels(server.run(graph), plain)
    graph = TinyGraph()
    adapted = [graph.add("TLoRALoad", file=name, strength=1.0, model=graph.model)[0] for name in trained]
    models = [graph.model, adapted[0], graph.model, adapted[1], adapted[0], graph.model]
    branches = [graph.picture(model) for model in models]
    result = server.run(graph)
    shown = [pixels(result, branch) for branch in branches]
    for picture, expected in zip(shown, (never_adapted, alone[0], never_adapted, alone[1], alone[0], never_adapted)):
        assert np.array_equal(picture, expected)
    assert min(difference(a, b) for a, b in ((shown[0], shown[1]), (shown[0], shown[3]), (shown[1], shown[3]))) > 2


def test_tlora_can_be_trained_on_top_of_another(server, trained, good):
    graph = TinyGraph()
    first = graph.add("TLoRALoad", file=trained[0], strength=1.0, model=graph.model)[0]
    alone, both = graph.picture(first), graph.picture(graph.train(model=first)[1])
    result = server.run(graph)
    assert np.array_equal(pixels(result, alone), good[1]) and difference(pixels(result, both), good[1]) > 2


def test_schedule_preview_is_a_picture_with_the_samplers_steps_on_it(server, trained):
    graph = TinyGraph()
    sigmas = graph.add("BasicScheduler", model=graph.model, scheduler="normal", steps=5, denoise=1.0)
    tlora = graph.add("TLoRALoad", file=trained[0], strength=1.0)[1]
    more = ({}, {"model": graph.model, "sigmas": sigmas[0]}, {"tlora": tlora})
    plots = [graph.save(graph.add("TLoRASchedulePreview", rank=4, min_rank=3, alpha=1.0, **inputs)[0]) for inputs in more]
    plots.append(graph.save(graph.add("TLoRASchedulePreview", rank=4, min_rank=2, alpha=1.0)[0]))
    result = server.run(graph)
    plain, with_steps, of_the_file, same_as_file = (pixels(result, plot)[0] for plot in plots)
    assert plain.shape == (360, 640, 3) and len(np.unique(plain.reshape(-1, 3), axis=0)) > 3
    marks = lambda picture: int((picture == (255, 176, 80)).all(axis=2).sum())  # noqa: E731
    assert marks(plain) == 0 and marks(with_steps) > 100
    assert np.array_equal(of_the_file, same_as_file) and not np.array_equal(plain, of_the_file)


def test_prompts_come_out_one_a_line_with_the_subject_in_place(server, trained):
    graph = TinyGraph()
    tlora = graph.add("TLoRALoad", file=trained[0], strength=1.0)[1]
    lines = "a photo of {}\n\n  {} and {}  \nnothing"
    shown = [graph.add("PreviewAny", source=graph.add("TLoRAPrompts", prompts=lines, subject="xyz cat", **more)[0])
             for more in ({}, {"tlora": tlora})]
    result = server.run(graph)
    assert result.outputs[shown[0].id]["text"] == ["a photo of xyz cat", "xyz cat and xyz cat", "nothing"]
    assert result.outputs[shown[1].id]["text"] == ["a photo of sks flower", "sks flower and sks flower", "nothing"]


def test_quickstart_trains_saves_and_shows_four_pictures_with_and_four_without(server):
    result = server.run(REPO / "workflows" / "quickstart.json", {"TLoRATrainFromImage.steps": 5})
    (tlora,) = result.tlora_files
    assert tlora.is_file()
    saved = [image.path for image in result.images if image.kind == "output"]
    for prefix in ("with_", "without_"):
        pictures = [path.read_bytes() for path in saved if path.name.startswith(prefix)]
        assert len(pictures) == 4 and len(set(pictures)) == 4


# --- info and bake ---


def test_info_reports_settings_ranks_and_blocks_as_text_and_picture(server, loras, trained):
    with safe_open(loras / trained[0], framework="pt") as file:
        recorded = json.loads(file.metadata()["tlora"])["training"]["effective_rank_B"]
    assert len(recorded) == 88 and all(type(rank) is int and 1 <= rank <= 4 for rank in recorded.values())
    graph = TinyGraph()
    info = graph.add("TLoRAInfo", tlora=graph.add("TLoRALoad", file=trained[0], strength=1.0)[1])
    text, picture = graph.add("PreviewAny", source=info[0]), graph.save(info[1])
    result = server.run(graph)
    report = result.outputs[text.id]["text"][0]
    for words in ("method tlora, rank 4, min_rank 2, alpha 1", "1: 2, 0.75: 2, 0.5: 3, 0.25: 3, 0: 4", "88 layers",
                  'class word "flower"', f"{min(recorded.values())}/", "\n  middle_block"):
        assert words in report
    assert "not recorded" not in report
    assert pixels(result, picture).shape == (1, 720, 640, 3)


def bake(graph, name, mode, **changes):
    """Bake T-LoRA on a file, in float32 so that nothing is rounded."""
    inputs = {"mode": mode, "interval_start": 1.0, "interval_end": 0.0, "noise_level": 1.0, "parts": 3,
              "file_name": f"tests/baked_{mode}", "dtype": "float32", **changes}
    return graph.add("TLoRABake", tlora=graph.add("TLoRALoad", file=name, strength=1.0)[1], **inputs)


@pytest.mark.parametrize("mode", ["timestep", "interval"])
def test_baked_file_acts_the_same_in_the_hosts_own_loader(server, loras, trained, good, mode):
    graph = TinyGraph()
    baking = bake(graph, trained[0], mode)
    name = server.run(graph).outputs[baking.id]["text"][0]
    ranks = {tensor.shape[0] for key, tensor in load_file(loras / name).items() if key.endswith("lora_down.weight")}
    # Two columns a component: at pure noise two components are on, and over the whole interval a third for a while.
    assert ranks == {"timestep": {4}, "interval": {6}}[mode]
    with safe_open(loras / name, framework="pt") as file:
        baked = json.loads(file.metadata()["tlora"])
    assert baked["method"] == "lora" and baked["training"]["baked"]["mode"] == mode and baked["training"]["steps"] == 3
    graph = TinyGraph()
    plain = graph.picture(graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=name, strength_model=1.0)[0])
    shown = pixels(server.run(graph), plain)
    bare, adapted = bare_and_adapted(server, name)
    effect = difference(adapted, bare)
    assert effect > 2 and difference(shown, adapted) <= 0.05 * effect
    assert difference(shown, good[1]) > 2 * difference(shown, adapted), "a constant LoRA is not the T-LoRA"


def hooked_picture(graph, start_percents):
    """A picture like TinyGraph.picture's, of the bare model with plain LoRAs that come on by the host's own hooks.

    start_percents: file -> its percent; None is always on."""
    hooks = None
    for name, percent in start_percents.items():
        hook = graph.add("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0)[0]
        if percent is not None:
            off = graph.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)[0]
            on = graph.add("CreateHookKeyframe", strength_mult=1.0, start_percent=percent, prev_hook_kf=off)[0]
            hook = graph.add("SetHookKeyframes", hooks=hook, hook_kf=on)[0]
        hooks = hook if hooks is None else graph.add("CombineHooks2", hooks_A=hooks, hooks_B=hook)[0]
    saved = graph.picture(graph.model)
    sampler = next(node for node in reversed(graph.values()) if node["class_type"] == "KSampler")["inputs"]
    props = graph.add("PairConditioningSetProperties", positive_NEW=sampler["positive"], negative_NEW=sampler["negative"],
                      strength=1.0, set_cond_area="default", hooks=hooks)
    sampler["positive"], sampler["negative"] = props[0], props[1]
    return saved


def test_split_files_switched_on_by_the_hosts_hooks_are_the_tlora(server, loras, trained, good):
    graph, before = TinyGraph(), files_below(loras)
    baking = bake(graph, trained[0], "steps")
    result = server.run(graph)
    lines = result.outputs[baking.id]["text"][0].splitlines()
    names = [line.partition(": ")[0] for line in lines]
    assert set(names) == files_below(loras) - before and len(result.tlora_files) == 3
    stem = names[0].removesuffix("part1.safetensors")
    assert names == [f"{stem}part{part}.safetensors" for part in (1, 2, 3)]
    assert lines[0].endswith(": always on")
    percents = [float(re.search(r": start_percent (\S+) \(noise level", line)[1]) for line in lines[1:]]
    assert percents == [0.5, 0.999]
    graph = TinyGraph()
    hooked = hooked_picture(graph, dict(zip(names, (None, *percents))))
    always = hooked_picture(graph, dict.fromkeys(names))
    result = server.run(graph)
    effect = difference(good[1], good[0])
    assert difference(pixels(result, hooked), good[1]) <= 0.05 * effect
    assert difference(pixels(result, always), good[1]) > 0.05 * effect, "without keyframes it is a plain LoRA"


def test_a_second_bake_into_parts_overwrites_nothing(server, loras, trained):
    graph = TinyGraph()
    bakes = [bake(graph, trained[seed], "steps", file_name="tests/twice") for seed in (0, 1)]
    before = files_below(loras)
    result = server.run(graph)
    names = [line.partition(": ")[0] for node in bakes for line in result.outputs[node.id]["text"][0].splitlines()]
    assert len(set(names)) == 6 and set(names) == files_below(loras) - before


# --- cancel ---


class CancelAt:
    """Presses cancel when a training reports this step, and notes the last step reported."""

    def __init__(self, server, step: int):
        self.server, self.step_to_cancel, self.last_step, self.cancelled = server, step, 0, 0.0

    def step(self, _node, _title, value, _total):
        self.last_step = value
        if value >= self.step_to_cancel and not self.cancelled:
            self.server.client.interrupt()
            self.cancelled = time.monotonic()

    def node_started(self, *_): ...

    def finish(self): ...


def test_cancelled_training_stops_within_steps_and_leaves_no_trace(server, loras, trained, good):
    graph, before = TinyGraph(), files_below(loras)
    graph.picture(graph.train(steps=200, file_name="tests/cancelled")[1])
    cancel = CancelAt(server, step=4)
    result = server.run(graph, check=False, listener=cancel)
    assert result.errors == ["The run was cancelled."]
    assert 4 <= cancel.last_step < 20 and time.monotonic() - cancel.cancelled < 10
    assert files_below(loras) == before
    graph = TinyGraph()
    bare = graph.picture(graph.model)
    result = server.run(graph)
    assert graph.base.id in cached_nodes(server, result), "the model that was trained on should still be in memory"
    assert np.array_equal(pixels(result, bare), good[0])
    assert np.array_equal(bare_and_adapted(server, trained[0])[1], good[1])


# --- bad input ---


def bad_training(**changes):
    """A case: a training with these inputs changed; a callable is given the graph."""
    def build():
        graph = TinyGraph()
        graph.train(**{name: value(graph) if callable(value) else value for name, value in changes.items()})
        return graph
    return build


def image_with_alpha(graph):
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=255)
    alpha = graph.add("SolidMask", value=0.5, width=64, height=64)
    return graph.add("JoinImageWithAlpha", image=image[0], alpha=alpha[0])[0]


def empty_image(width, height):
    return lambda graph: graph.add("EmptyImage", width=width, height=height, batch_size=1, color=255)[0]


def diffusion_transformer(graph):
    return graph.add("UNETLoader", unet_name="tests_sd3.safetensors", weight_dtype="default")[0]


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


def saving_as(file_name):
    def build():
        graph = TinyGraph()
        tlora = graph.add("TLoRALoad", file="tests/good.safetensors", strength=1.0)[1]
        graph.add("TLoRASave", tlora=tlora, file_name=file_name, dtype="float16")
        return graph
    return build


def baking(**changes):
    """A case: the good file baked with these inputs."""
    def build():
        graph = TinyGraph()
        bake(graph, "tests/good.safetensors", **{"mode": "interval", **changes})
        return graph
    return build


OUTSIDE = Path(tempfile.gettempdir()) / f"tlora_test_{uuid.uuid4().hex}"  # no test may make it

BAD = {
    "image with alpha": (bad_training(image=image_with_alpha), "image has 4 channels instead of 3"),
    "image of one pixel": (bad_training(image=empty_image(1, 1)), "image is 1x1 pixels"),
    "image of one row": (bad_training(image=empty_image(64, 1)), "image is 64x1 pixels"),
    "rank above a layer's width": (bad_training(rank=97, min_rank=2), "rank is 97, but the layer .* is 96 x 96"),
    "min_rank above rank": (bad_training(rank=4, min_rank=5), "min_rank is 5; .* from 0 to the rank, which is 4"),
    "no token and no class word": (bad_training(token=" ", class_word=""), "token and class_word are both empty"),
    "resolution that the VAE cannot encode": (bad_training(resolution=68), "resolution is 68; set it to a multiple of 8"),
    "model of another family": (bad_training(model=diffusion_transformer), "model could not be run on .* clip and vae of one checkpoint"),
    "file for another model": (load_of("tests/plain.safetensors"), '"plain.safetensors": none of its 2 keys fits'),
    "file that is cut off": (load_of("tests/cut.safetensors"), '"cut.safetensors": it cannot be read as a safetensors file'),
    "file that is a pickle": (load_of("tests/pickle.safetensors"), '"pickle.safetensors": it cannot be read as a safetensors'),
    "file that is empty": (load_of("tests/empty.safetensors"), '"empty.safetensors": it cannot be read as a safetensors file'),
    "no prompts": (single("TLoRAPrompts", prompts=" \n\n", subject="sks dog"), "prompts is empty; write at least one line"),
    "sigmas without their model": (preview_of_sigmas_without_a_model, "model is not connected"),
    "preview with min_rank above rank": (single("TLoRASchedulePreview", rank=4, min_rank=5, alpha=1.0), "min_rank is 5"),
    "training into a folder above": (bad_training(file_name="../x"), r'file_name is "\.\./x", which leaves the loras'),
    "file in a folder above": (saving_as("../x"), "which leaves the loras folder"),
    "file at an absolute path": (saving_as(str(OUTSIDE / "x")), "which leaves the loras folder"),
    "file up and down again": (saving_as("a/../../x"), "which leaves the loras folder"),
    "file without a name": (saving_as("tests/"), 'file_name is "tests/"; give a name'),
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
    """Files that the cases name: good.safetensors is a T-LoRA, the others are not. Returns what the pickle would make."""
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
    # The few tensors by which the host tells that a file is a Stable Diffusion 3 transformer, of one block.
    save_file(
        {
            "joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(192, 64),
            "x_embedder.proj.weight": torch.zeros(64, 16, 2, 2), "final_layer.linear.weight": torch.zeros(64, 64),
            "context_embedder.weight": torch.zeros(64, 32), "y_embedder.mlp.0.weight": torch.zeros(64, 32),
            "pos_embed": torch.zeros(1, 16, 64),
        },
        models / "tests_sd3.safetensors")
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


def test_training_after_a_failed_one_is_the_same_as_before_it(server, loras, trained):
    assert "rank is 97" in error_of(server, bad_training(rank=97, min_rank=2)())
    graph = TinyGraph()
    training = graph.train(seed=1, file_name="tests/again")
    name = server.run(graph).outputs[training.id]["text"][0]
    assert same_tensors(loras / name, loras / trained[0])


# --- a loss that is no number ---


def overflow_above(timestep: float) -> dict[str, torch.Tensor]:
    """A plain LoRA file's tensors that leave the tiny base as it is below `timestep` and overflow above it."""
    width, hidden = 96, 384
    # The embedding's last column is sin(t * slow), which grows with t all the way.
    slow = 10000 ** -((width // 2 - 1) / (width // 2))
    slope, step, threshold = torch.zeros(hidden, width), torch.zeros(hidden, hidden), torch.zeros(hidden)
    slope[0, -1], threshold[0], step[:, 0] = 1e30, -1e30 * np.sin(timestep * slow), 1e30
    name = "diffusion_model.time_embed"
    return {f"{name}.0.diff": slope, f"{name}.0.diff_b": threshold, f"{name}.2.diff": step}


def test_loss_that_is_no_number_stops_the_training_and_keeps_the_last_good_state(server, loras, good, trained):
    save_file(overflow_above(970), loras / "overflow.safetensors")

    def training(steps):
        graph = TinyGraph()
        model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name="overflow.safetensors", strength_model=1.0)
        node = graph.train(model=model[0], steps=steps, learning_rate=0.01, rank=2, min_rank=1, seed=1, file_name=f"tests/nan{steps}")
        return graph, node

    before = files_below(loras)
    message = error_of(server, training(60)[0])
    found = re.search(r"because the loss was no longer a finite number; lower learning_rate\. .* back at step (\d+), .*"
                      r"It is saved as (tests/nan60_\S+\.safetensors)\.$", message)
    assert found and "\n" not in message, message
    kept, name = int(found[1]), found[2]
    assert files_below(loras) - before == {name}
    assert kept > 0, "choose a seed with which the training gets further"
    graph, node = training(kept)
    result = server.run(graph)
    assert same_tensors(loras / name, loras / result.outputs[node.id]["text"][0])
    with safe_open(loras / name, framework="pt") as file:
        assert json.loads(file.metadata()["tlora"])["training"]["steps_done"] == kept
    assert np.array_equal(bare_and_adapted(server, trained[0])[1], good[1])


# --- a disk that is full ---


@contextmanager
def small_disk(server, folder: Path):
    """A file system of 64 KiB at `folder`."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs more rights")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small_files(server, folder: Path):
    """The server may write no file beyond 64 KiB, which it learns as it would of a full disk: while writing."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux limits another process")
    limits = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("obstacle", [small_disk, small_files])
@pytest.mark.parametrize("what", ["training", "saving", "baking"])
@pytest.mark.usefixtures("bad_files")
def test_full_disk_while_saving_is_said_and_leaves_no_half_written_file(server, loras, good, trained, obstacle, what):
    folder = loras / f"{obstacle.__name__}_{what}"
    folder.mkdir(exist_ok=True)
    cases = {"training": bad_training, "saving": saving_as, "baking": baking}
    case = cases[what](file_name=f"{folder.name}/x")
    with obstacle(server, folder):
        message = error_of(server, case())
        left = files_below(folder)
    assert re.match(r'"x_00001_\.safetensors" was not saved \(.+\); free some disk space', message)
    assert "\n" not in message and left == set()
    server.run(case())
    assert len(files_below(folder)) >= 1
    assert np.array_equal(bare_and_adapted(server, trained[0])[1], good[1])
