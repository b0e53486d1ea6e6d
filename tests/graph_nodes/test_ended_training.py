"""Trainings on the real server that a cancel, an error or a divergence ends, and what they leave behind."""

import json
import re

import numpy as np
import torch
from failing_graphs import CancelAt, bad_training
from graphs import TinyGraph, bare_and_adapted, cached_nodes, error_of, files_below, pixels, same_tensors
from safetensors import safe_open
from safetensors.torch import save_file


def test_cancelled_training_stops_within_steps_and_leaves_no_trace(server, loras, trained, good):
    graph, before = TinyGraph(), files_below(loras)
    graph.picture(graph.train(steps=200, file_name="tests/cancelled")[1])
    cancel = CancelAt(server, step=4, steps=200)
    result = server.run(graph, check=False, listener=cancel)
    assert result.errors == ["The run was cancelled."]
    assert 4 <= cancel.last_step < 20
    assert files_below(loras) == before
    graph = TinyGraph()
    bare = graph.picture(graph.model)
    result = server.run(graph)
    assert graph.base.id in cached_nodes(server, result), "the model that was trained on should still be in memory"
    assert np.array_equal(pixels(result, bare), good[0])
    assert np.array_equal(bare_and_adapted(server, trained[0])[1], good[1])


def test_training_after_a_failed_one_is_the_same_as_before_it(server, loras, trained):
    assert "rank is 97" in error_of(server, bad_training(rank=97, min_rank=2)())
    graph = TinyGraph()
    training = graph.train(seed=1, file_name="tests/again")
    name = server.run(graph).outputs[training.id]["text"][0]
    assert same_tensors(loras / name, loras / trained[0])


def overflow_above(timestep: float) -> dict[str, torch.Tensor]:
    """A plain LoRA file's tensors that leave the tiny base as it is below `timestep` and overflow above it."""
    width, hidden = 96, 384
    # The embedding's last column is sin(t * slow), which grows with t all the way.
    slow = 10000 ** -((width // 2 - 1) / (width // 2))
    slope, step, threshold = torch.zeros(hidden, width), torch.zeros(hidden, hidden), torch.zeros(hidden)
    slope[0, -1], threshold[0], step[:, 0] = 1e30, -1e30 * np.sin(timestep * slow), 1e30
    name = "diffusion_model.time_embed"
    return {f"{name}.0.diff": slope, f"{name}.0.diff_b": threshold, f"{name}.2.diff": step}


def test_nan_loss_stops_the_training_and_keeps_the_last_good_state(server, loras, good, trained):
    save_file(overflow_above(970), loras / "overflow.safetensors")

    def training(steps):
        graph = TinyGraph()
        model = graph.add(
            "LoraLoaderModelOnly", model=graph.model, lora_name="overflow.safetensors", strength_model=1.0
        )
        node = graph.train(
            model=model[0], steps=steps, learning_rate=0.01, rank=2, min_rank=1, seed=1, file_name=f"tests/nan{steps}"
        )
        return graph, node

    before = files_below(loras)
    message = error_of(server, training(60)[0])
    found = re.search(
        r"because the loss became NaN or infinite; lower learning_rate\. .* back at step (\d+), .*"
        r"It is saved as (tests/nan60_\S+\.safetensors)\.$",
        message,
    )
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
