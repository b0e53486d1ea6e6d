"""T-LoRA Info and Bake T-LoRA on the real server."""

import json
import re

import pytest
from graphs import TinyGraph, bake, bare_and_adapted, difference, files_below, pixels
from safetensors import safe_open
from safetensors.torch import load_file


def test_info_reports_settings_ranks_and_blocks_as_text_and_picture(server, loras, trained):
    with safe_open(loras / trained[0], framework="pt") as file:
        recorded = json.loads(file.metadata()["tlora"])["training"]["effective_rank_B"]
    assert len(recorded) == 88 and all(type(rank) is int and 1 <= rank <= 4 for rank in recorded.values())
    graph = TinyGraph()
    info = graph.add("TLoRAInfo", tlora=graph.add("TLoRALoad", file=trained[0], strength=1.0)[1])
    text, picture = graph.add("PreviewAny", source=info[0]), graph.save(info[1])
    result = server.run(graph)
    report = result.outputs[text.id]["text"][0]
    for words in (
        "method tlora, rank 4, min_rank 2, alpha 1",
        "1: 2, 0.75: 2, 0.5: 3, 0.25: 3, 0: 4",
        "88 layers",
        'class word "flower"',
        f"{min(recorded.values())}/",
        "\n  middle_block",
    ):
        assert words in report
    assert "not recorded" not in report
    assert pixels(result, picture).shape == (1, 720, 640, 3)


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
    props = graph.add(
        "PairConditioningSetProperties",
        positive_NEW=sampler["positive"],
        negative_NEW=sampler["negative"],
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
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
