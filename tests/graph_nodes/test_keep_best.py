"""The Train node on the real server, scored by the tiny world's own scorer: which step its file holds, and when it
ends."""

import json

from graphs import TinyGraph, error_of, same_tensors
from safetensors import safe_open

SCORED = {
    "scorer": "tiny world",
    "validation_prompts": "a photo of {} in the snow",
    "validate_every": 4,
    "score_seeds": 2,
    "learning_rate": 0.02,
}


def steps_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["tlora"])["training"]["steps_done"]


def test_it_ends_past_the_best_step_and_its_file_is_that_of_a_run_up_to_there(server, loras):
    graph = TinyGraph()
    node = graph.train(steps=40, keep="stop when past it", patience=2, file_name="tests/past", **SCORED)
    [name] = server.run(graph).outputs[node.id]["text"]
    [state] = [run for run in server.client.get_json("/tlora/runs") if run["file"] == name]
    scores = state["scores"]
    assert [step["step"] for step in scores["steps"]] == list(range(0, state["step"] + 1, 4))
    assert scores["past"] == 2 and 0 < scores["best"] == state["step"] - 8 < state["steps"] - 8
    assert steps_of(loras / name) == scores["best"] and scores["sentence"].startswith(f"step {scores['best']}: ")
    assert state["state"] == "done" and f"The file holds {scores['sentence']}" in state["message"]
    captions = ["a photo of sks flower", "a photo of sks flower in the snow"]
    assert [picture["captions"] for picture in state["pictures"]] == [captions] * len(scores["steps"])
    for neutral, snow in (picture["scores"] for picture in state["pictures"]):
        assert -1 <= neutral["likeness"] <= 1 and neutral["copying"] is None
        assert snow["likeness"] is None and 0 <= snow["copying"] <= 1 and 0 <= snow["obedience"] <= 1
    graph = TinyGraph()
    node = graph.train(steps=scores["best"], learning_rate=SCORED["learning_rate"], file_name="tests/short")
    [short] = server.run(graph).outputs[node.id]["text"]
    assert same_tensors(loras / name, loras / short)


def test_what_cannot_be_scored_is_said_before_anything_runs(server):
    def said(**inputs):
        graph = TinyGraph()
        graph.train(file_name="tests/refused", **inputs)
        return error_of(server, graph)

    assert "nothing scores the steps" in said(keep="best", validate_every=5, validation_prompts="{}")
    assert "validate_every is 0, so no step is scored" in said(scorer="tiny world")
