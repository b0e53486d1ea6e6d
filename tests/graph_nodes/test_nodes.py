"""The nodes on the real server: train, save, load, apply, prompts and preview."""

import io

import numpy as np
import pytest
import torch
from failing_graphs import CancelAt
from foreign_files import plain_layers, plain_state
from graphs import TinyGraph, bare_and_adapted, cached_nodes, difference, error_of, files_below, pixels
from PIL import Image
from places import REPO
from safetensors.torch import load_file, save_file

from tlora_core import LowRank, RankSchedule, TLoRAFile

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    assert {tensor.dtype for key, tensor in load_file(loras / name).items() if not key.endswith(".alpha")} == {
        DTYPES[dtype]
    }
    _, adapted = bare_and_adapted(server, name)
    assert difference(adapted, expected) <= tolerance * effect


def test_a_graph_may_end_with_the_training_which_is_not_made_again(server, loras):
    graph = TinyGraph()
    training = graph.train(file_name="tests/the_end")
    result = server.run(graph)
    assert result.outputs[training.id]["text"] == [path.relative_to(loras).as_posix() for path in result.tlora_files]
    before = files_below(loras)
    assert training.id in cached_nodes(server, server.run(graph)) and files_below(loras) == before


def test_strength_zero_is_exactly_the_bare_model(server, trained):
    graph = TinyGraph()
    bare = graph.picture(graph.model)
    loaded = graph.add("TLoRALoad", file=trained[0], strength=0.0, model=graph.model)
    through_load = graph.picture(loaded[0])
    through_apply = graph.picture(graph.add("TLoRAApply", model=graph.model, tlora=loaded[1], strength=0.0)[0])
    result = server.run(graph)
    for node in (through_load, through_apply):
        assert np.array_equal(pixels(result, node), pixels(result, bare))


def test_save_and_info_say_where_other_programs_do_not_find_the_layers(server, loras):
    layers = {
        f"layers.0.attention.qkv@{row}": LowRank(torch.ones(rows, 2), torch.ones(2, 6), 1)
        for row, rows in ((0, 6), (6, 2), (8, 2))
    }
    tlora = TLoRAFile(layers, "lora", RankSchedule(2, 2), 1.0, "flow", "lumina2")
    loras.mkdir(parents=True, exist_ok=True)
    tlora.save(loras / "parts_of_layers.safetensors")
    graph = TinyGraph()
    loaded = graph.add("TLoRALoad", file="parts_of_layers.safetensors", strength=1.0)
    saved = graph.add("TLoRASave", tlora=loaded[1], file_name="tests/parts", dtype="float32")
    info = graph.add("PreviewAny", source=graph.add("TLoRAInfo", tlora=loaded[1])[0])
    result = server.run(graph)
    assert "find 1 of the file's 3 layers" in tlora.note and tlora.note in result.outputs[info.id]["text"][0]
    assert f"{result.outputs[saved.id]['text'][0]}: {tlora.note}" in server.log()


def test_load_without_a_model_gives_the_tlora_and_says_that_model_is_missing(server, trained, good):
    graph = TinyGraph()
    loaded = graph.add("TLoRALoad", file=trained[0], strength=1.0)
    applied = graph.picture(graph.add("TLoRAApply", model=graph.model, tlora=loaded[1], strength=1.0)[0])
    assert np.array_equal(pixels(server.run(graph), applied), good[1])
    graph.picture(loaded[0])
    assert "connect a model to use its MODEL output" in error_of(server, graph)


def test_files_with_other_endings_that_can_be_read_are_listed_and_loaded(server, loras, trained, good):
    ours = loras / trained[0]
    (loras / "tests" / "ending.sft").write_bytes(ours.read_bytes())
    torch.save(load_file(ours), loras / "tests" / "ending.bin")  # without metadata a plain LoRA
    (_, same), (bare, plain) = (bare_and_adapted(server, f"tests/ending.{ending}") for ending in ("sft", "bin"))
    assert (same == good[1]).all() and difference(bare, plain) > 0


def test_hosts_own_training_node_gets_a_fresh_copy_of_the_tiny_base(server, good):
    graph = TinyGraph()
    text = graph.add("CLIPTextEncode", clip=graph.clip, text="a photo of sks flower")
    latent = graph.add("VAEEncode", pixels=graph.concept(), vae=graph.vae)
    trained = graph.add(
        "TrainLoraNode",
        model=graph.model,
        latents=latent[0],
        positive=text[0],
        batch_size=1,
        grad_accumulation_steps=1,
        steps=2,
        learning_rate=0.01,
        rank=2,
        optimizer="AdamW",
        loss_function="MSE",
        seed=0,
        training_dtype="fp32",
        lora_dtype="fp32",
        quantized_backward=False,
        algorithm="LoRA",
        gradient_checkpointing=False,
        checkpoint_depth=1,
        offloading=False,
        existing_lora="[None]",
        bucket_mode=False,
        bypass_mode=False,
    )
    graph.add("SaveLoRA", lora=trained[0], prefix="loras/host", steps=2)
    server.run(graph)
    assert list((server.workspace / "output" / "loras").glob("host*.safetensors"))
    # Another graph of the same server still draws with the model as it was.
    bare = TinyGraph()
    picture = bare.picture(bare.model)
    assert np.array_equal(pixels(server.run(bare), picture), good[0])


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
    plots = [
        graph.save(graph.add("TLoRASchedulePreview", rank=4, min_rank=3, alpha=1.0, **inputs)[0]) for inputs in more
    ]
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
    shown = [
        graph.add("PreviewAny", source=graph.add("TLoRAPrompts", prompts=lines, subject="xyz cat", **more)[0])
        for more in ({}, {"tlora": tlora})
    ]
    result = server.run(graph)
    assert result.outputs[shown[0].id]["text"] == ["a photo of xyz cat", "xyz cat and xyz cat", "nothing"]
    assert result.outputs[shown[1].id]["text"] == ["a photo of sks flower", "sks flower and sks flower", "nothing"]


def test_prompts_take_a_foreign_files_trigger_phrase_and_the_subject_where_it_has_none(server, loras):
    graph, plain = TinyGraph(), plain_state("kohya", plain_layers())
    loras.mkdir(parents=True, exist_ok=True)
    save_file(plain, loras / "nameless.safetensors")
    save_file(plain, loras / "named.safetensors", {"modelspec.trigger_phrase": "ohwx teapot"})
    shown = []
    for name in ("nameless", "named"):
        tlora = graph.add("TLoRALoad", file=f"{name}.safetensors", strength=1.0)[1]
        prompts = graph.add("TLoRAPrompts", prompts="a photo of {}", subject="xyz cat", tlora=tlora)
        shown.append(graph.add("PreviewAny", source=prompts[0]))
    result = server.run(graph)
    assert [result.outputs[node.id]["text"] for node in shown] == [["a photo of xyz cat"], ["a photo of ohwx teapot"]]

    graph = TinyGraph()
    tlora = graph.add("TLoRALoad", file="nameless.safetensors", strength=1.0)[1]
    graph.add("PreviewAny", source=graph.add("TLoRAPrompts", prompts="a photo of {}", subject=" ", tlora=tlora)[0])
    assert (
        error_of(server, graph)
        == 'subject is empty, and no T-LoRA provides it; write what {} stands for, such as "sks dog".'
    )


def test_quickstart_trains_saves_and_ends_in_one_sheet_of_eight_pictures(server):
    result = server.run(REPO / "workflows" / "01 Quickstart.json", {"TLoRATrainFromImage.steps": 5})
    (tlora,) = result.tlora_files
    assert tlora.is_file()
    [sheet] = [image.path for image in result.images if image.kind == "output"]
    with Image.open(sheet) as picture:
        assert picture.height > 4 * 160 and picture.width > 2 * 160


class StopAt(CancelAt):
    """Presses Stop and keep when a training reports this step."""

    def __init__(self, server, step: int, steps: int):
        super().__init__(server, step, steps)
        self.asked = False

    def step(self, _node, _title, value, total):
        if total != self.steps:
            return
        self.last_step = value
        if value >= self.step_to_cancel and not self.asked:
            run = next(run for run in self.server.client.get_json("/tlora/runs") if run["state"] == "running")
            self.server.client.request(f"/tlora/runs/{run['id']}/stop", {})
            self.asked = True


@pytest.mark.parametrize("rerun, goes_on", [("continue", True), ("auto", False)])
def test_running_a_stopped_graph_again_resumes_it_if_asked_and_only_once(server, rerun, goes_on):
    graph = TinyGraph()
    training = graph.train(
        steps=60, learning_rate=1e-3, seed=40 + goes_on, file_name=f"tests/stopped_{rerun}", rerun=rerun
    )
    stop, again = StopAt(server, 5, 60), StopAt(server, 999, 60)
    server.run(graph, listener=stop)
    result = server.run(graph, listener=again)
    assert 5 <= stop.last_step < 60
    assert (again.last_step == 60) == goes_on == (training.id not in cached_nodes(server, result))
    assert training.id in cached_nodes(server, server.run(graph))


def test_last_validation_picture_is_shown_by_load_and_by_the_hosts_list_of_models(server):
    graph = TinyGraph()
    training = graph.train(seed=7, file_name="tests/pictured", validation_prompts="a photo of {}", validate_every=2)
    name = server.run(graph).outputs[training.id]["text"][0]
    assert server.client.get_json(f"/tlora/files?name={name}")["thumbnail"]
    for path in (f"/tlora/thumbnail?name={name}", f"/experiment/models/preview/loras/0/{name}"):
        assert Image.open(io.BytesIO(server.client.request(path))).size == (256, 256)
