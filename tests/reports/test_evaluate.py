"""T-LoRA Evaluate: its measures on tiny CLIP and DINO models, and the node on the server."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from encoder_folders import PREPARATION, pictures, write_clip, write_dino
from graphs import Graph, error_of
from places import REPO
from torch.nn.functional import normalize

from tlora_core.errors import TLoRAError
from tlora_core.reports import prompt_sets
from tlora_core.reports.evaluation import (
    EvaluationProtocol,
    Scores,
    best,
    diversity,
    evaluate,
    table,
)
from tlora_core.reports.folder_encoder import CLIP_TYPES, DINO_TYPES, FolderEncoder
from tlora_core.reports.live_scores import LiveScorer, PictureScores, StepScores
from tlora_core.reports.picture_scores import masked, without_token
from tlora_core.reports.stopping import verdict
from tlora_core.training.dataset import training_images


@pytest.fixture(scope="module")
def clip(model_folders):
    return FolderEncoder(model_folders / "clip", CLIP_TYPES)


def test_scores_are_the_mean_cosines_of_the_models_own_features(clip, model_folders):
    dino, concept = FolderEncoder(model_folders / "dino", DINO_TYPES), pictures(2, 0, 16, 16)
    batches, prompts = [pictures(2, 1, 16, 16), pictures(3, 2, 16, 16)], ["a photo of sks dog", "a sks dog in the snow"]
    scores = evaluate("step 5", batches, prompts, concept, clip, dino, neutral_prompt=prompts[0], token="sks")
    mean, std = (torch.tensor(PREPARATION[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    pixels = lambda batch: (batch.movedim(-1, 1) - mean) / std  # noqa: E731
    with torch.inference_mode():

        def seen(batch):
            pooled = clip.model.vision_model(pixel_values=pixels(batch)).pooler_output
            return normalize(clip.model.visual_projection(pooled), dim=-1)

        ids = torch.tensor([[3, 4, 5, 6], [3, 6, 7, 8]]), torch.tensor([[3, 6, 7, 8, 9]])
        texts = [
            normalize(clip.model.text_projection(clip.model.text_model(input_ids=i[:1]).pooler_output), dim=-1)
            for i in ids
        ]
        looks = [
            normalize(dino.model(pixel_values=pixels(b)).last_hidden_state[:, 0], dim=-1) for b in (concept, batches[0])
        ]
        wanted = torch.cat([(seen(b) @ t.T).flatten() for b, t in zip(batches, texts)]).mean()
        likeness = (seen(concept) @ seen(batches[0]).T).mean()
    assert scores.image_similarity == pytest.approx(float(likeness), abs=1e-5)
    assert scores.dino_similarity == pytest.approx(float((looks[0] @ looks[1].T).mean()), abs=1e-5)
    assert scores.text_similarity == pytest.approx(float(wanted), abs=1e-5)
    assert (scores.label, scores.pictures, scores.neutral) == ("step 5", 5, 2)


def test_same_pictures_are_fully_alike_and_not_diverse(clip):
    one = pictures(1, 3)
    scores = evaluate("x", [one, one], ["a dog", "a dog"], one, clip)
    assert scores.image_similarity == pytest.approx(1, abs=1e-5) and scores.diversity == pytest.approx(0, abs=1e-5)
    assert scores.dino_similarity is None
    assert evaluate("x", [one, pictures(1, 4)], ["a dog", "a dog"], one, clip).diversity > 1e-4
    assert evaluate("x", [one, pictures(1, 4)], ["a dog", "a photo"], one, clip).diversity is None


def test_diversity_compares_only_pictures_of_one_prompt():
    x, y = torch.eye(2).unsqueeze(1)
    assert diversity([x, y, x], ["a", "a", "b"]) == 1
    assert diversity([torch.cat([x, x]), y], ["a", "b"]) == 0


def test_background_outside_the_mask_does_not_count_for_image_similarity(clip):
    subject, other = pictures(1, 5), pictures(1, 6)
    mask = torch.zeros(1, 20, 24)
    mask[:, 5:15, 6:18] = 1
    moved = torch.where(mask.bool().unsqueeze(-1), subject, other)
    plain = evaluate("x", [moved], ["a dog"], subject, clip)
    cut = evaluate("x", [moved], ["a dog"], subject, clip, masks=[mask], concept_mask=mask)
    assert cut.image_similarity == pytest.approx(1, abs=1e-5) and plain.image_similarity < 0.9999
    assert cut.text_similarity == plain.text_similarity


@pytest.mark.parametrize(
    "prompt, token, read",
    [
        ("a photo of sks dog", "sks", "a photo of dog"),
        ("sks dog, sksdog", "sks", "dog, sksdog"),
        ("a dog in usks", "sks", "a dog in usks"),
        ("a V* dog", "V*", "a dog"),
        ("a dog", "", "a dog"),
    ],
)
def test_token_is_removed_from_the_prompts_for_clip(prompt, token, read):
    assert without_token(prompt, token) == read


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompts": ["a dog", "b"]}, "2 texts"),
        ({"neutral_prompt": "a cat"}, "neutral_prompt"),
        ({"concept": torch.rand(1, 20, 24, 4)}, "concept"),
        ({"masks": [None, None]}, "mask is given for 2"),
        ({"masks": [torch.ones(1, 9, 9)]}, "mask is 1 x 9x9"),
        ({"pictures": [None]}, "images"),
    ],
)
def test_input_that_does_not_fit_together_is_named(clip, changes, words):
    given = {"pictures": [pictures(1, 0)], "prompts": ["a dog"], "concept": pictures(1, 0), **changes}
    with pytest.raises(TLoRAError, match=words):
        evaluate("x", encoder=clip, **given)


def test_mask_of_one_serves_all_pictures():
    shown = pictures(3, 0)
    assert (masked(shown, torch.zeros(1, 20, 24)) == 0.5).all()
    assert torch.equal(masked(shown, torch.full((1, 20, 24), 2.0)), shown), "more than the whole is the whole"


def test_pictures_and_masks_may_lie_on_different_devices(clip):
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Tensors without numbers, whose operations fail across devices as on a GPU. A PyTorch for the CPU knows no other.
    with FakeTensorMode(allow_non_fake_inputs=True):
        shown, mask = torch.rand(2, 20, 24, 3, device="meta"), torch.ones(1, 20, 24)
        assert masked(shown, mask).device.type == "meta" and masked(shown.cpu(), mask.to("meta")).device.type == "cpu"
        found = clip.images(masked(shown, mask))
    assert found.shape == (2, 8) and found.device.type == "cpu"


PROTOCOL = EvaluationProtocol("clip", None, frozenset({"a dog", "dog"}), frozenset({"a dog"}), False, "")


def scores_of(label, likeness, obedience, copying=None, why_no_text="", **measured_with):
    pictures = [[PictureScores(likeness, obedience, None)], [PictureScores(None, obedience, copying)]]
    steps = StepScores.of(0, pictures, PictureScores(1.0, 0.1, 1.0))
    protocol = replace(PROTOCOL, **measured_with)
    return Scores(label, likeness, obedience, copying, None, None, 2, 1, steps, why_no_text, protocol)


def test_best_is_that_of_the_rule_for_the_scores_of_a_training():
    scores = [scores_of("none", 0.7, 0.30, 0.4), scores_of("400", 0.85, 0.28, 0.45), scores_of("900", 0.86, 0.2, 0.8)]
    ruled = verdict([replace(one.steps, step=i) for i, one in enumerate(scores)])
    assert best(scores).label == "400" and ruled.best == 1
    lines = table(scores).splitlines()
    assert [line for line in lines if "best" in line][0].startswith("400   ")
    assert lines[4] == "400: " + ruled.sentence.removeprefix("step 1: ") and "copied more" in lines[4]
    assert lines[5].startswith("All is counted from none, the first,")


def test_a_difference_within_the_tolerance_is_none():
    scores = [scores_of("none", 0.7, 0.3), scores_of("400", 0.85, 0.3), scores_of("900", 0.87, 0.3)]
    assert best(scores, 0.0).label == "900" and best(scores, 0.2).label == "400"


def test_report_says_why_there_is_no_ts():
    scores = [scores_of("x", 0.7, None, why_no_text="No text encoder."), scores_of("y", 0.8, None)]
    assert table(scores).splitlines()[-1] == "No text encoder."


def test_equal_pictures_have_equal_scores_in_a_training_and_in_evaluate(clip):
    prompts, shown = ["a photo of sks dog", "a sks dog at night"], [pictures(2, 1), pictures(2, 2)]
    mask = torch.zeros(1, 20, 24)
    mask[:, 4:14, 6:18] = 1
    concept = pictures(2, 0)
    live = LiveScorer(clip, training_images(concept, mask=mask), prompts, prompts[0], "sks").measure(300, shown)
    afterwards = evaluate("x", shown, prompts, concept, clip, None, prompts[0], "sks", concept_mask=mask)
    assert afterwards.steps == replace(live, step=0)
    assert afterwards.image_similarity == live.likeness.mean and afterwards.copying == live.copying.mean
    assert afterwards.text_similarity == live.obedience.mean
    assert afterwards != evaluate("x", shown[::-1], prompts, concept, clip, None, prompts[0], "sks", concept_mask=mask)


@pytest.mark.parametrize(
    "name, other",
    [
        ("clip_model", "clip-vit-large-patch14"),
        ("dino_model", "dino-vits16"),
        ("prompts", frozenset({"a dog"})),
        ("neutral_prompt", frozenset({"dog"})),
        ("mask", True),
        ("concept", "1"),
    ],
)
@pytest.mark.parametrize("rank", [best, table])
def test_scores_measured_with_something_else_are_not_ranked(name, other, rank):
    scores = [scores_of("100", 0.8, 0.3), scores_of("400", 0.8, 0.3), scores_of("900", 0.8, 0.3, **{name: other})]
    with pytest.raises(
        TLoRAError, match=f'^{name} differs between "100" and "900", .* cannot be compared; give both the same'
    ):
        rank(scores, 0.02)


def test_two_scores_of_one_label_are_not_ranked():
    with pytest.raises(TLoRAError, match='^label "checkpoint" is given to 2 of .*; give each a label of its own'):
        best([scores_of("checkpoint", 0.8, 0.3), scores_of("400", 0.8, 0.3), scores_of("checkpoint", 0.9, 0.3)], 0.02)


def test_scores_hold_the_conditions_of_their_measurement(clip, model_folders):
    def measured(**changes):
        given = {
            "pictures": [pictures(1, 1), pictures(1, 2)],
            "prompts": ["a photo of sks dog", "a sks dog at night"],
            "concept": pictures(1, 0),
            "neutral_prompt": "a photo of sks dog",
            "token": "sks",
            **changes,
        }
        return evaluate("x", encoder=clip, **given).protocol

    usual = measured()
    assert (usual.clip_model, usual.dino_model, usual.mask) == ("clip", None, False)
    assert usual.prompts == {"a photo of dog", "a dog at night"} and usual.neutral_prompt == {"a photo of dog"}
    # The pictures themselves, their order and the word that CLIP does not read leave scores comparable.
    assert usual == measured(pictures=[pictures(2, 3), pictures(2, 4)])
    assert usual == measured(
        prompts=["a V* dog at night", "a photo of V* dog"], neutral_prompt="a photo of V* dog", token="V*"
    )
    whole = torch.ones(1, 20, 24)
    for name, changes in {
        "dino_model": {"dino": FolderEncoder(model_folders / "dino", DINO_TYPES)},
        "prompts": {"prompts": ["a photo of sks dog", "a dog"]},
        "neutral_prompt": {"neutral_prompt": ""},
        "mask": {"masks": [whole, whole]},
        "concept": {"concept_mask": whole / 2},
    }.items():
        other = measured(**changes)
        assert getattr(other, name) != getattr(usual, name), name


def test_papers_prompt_sets_have_its_numbers_and_a_place_for_the_subject():
    for name, prompts in prompt_sets.SETS.items():
        assert len(prompts) == len(set(prompts)) == 1 + 25 + 6, name
        assert prompts[0] == prompt_sets.NEUTRAL and all(prompt.count("{}") == 1 for prompt in prompts)


# --- in the host ---


@pytest.fixture(scope="module")
def served(server):
    for write in (write_clip, write_dino):
        folder = server.workspace / "models" / "clip_vision" / f"test_{write.__name__.removeprefix('write_')}"
        folder.mkdir(parents=True)
        write(folder)
    return server


def evaluation(graph, image, label, **more):
    prompts = graph.add("TLoRAPrompts", prompts="a photo of {}", subject="sks dog", prompt_set="own")
    return graph.add(
        "TLoRAEvaluate",
        **{
            "images": image,
            "prompts": prompts[0],
            "concept": graph.add("EmptyImage", width=32, height=32, batch_size=1, color=0xFF0000)[0],
            "clip_model": "test_clip",
            "dino_model": "test_dino",
            "label": label,
            "token": "sks",
            "neutral_prompt": "",
            "tolerance": 0.02,
            **more,
        },
    )


def test_node_compares_steps_and_names_the_best(served):
    graph = Graph()
    blue, red = (graph.add("EmptyImage", width=32, height=32, batch_size=2, color=c)[0] for c in (0x0000FF, 0xFF0000))
    first = evaluation(graph, red, "red")
    second = evaluation(graph, blue, "blue", before=first[4], tolerance=0.0)
    shown = [graph.add("PreviewAny", source=second[slot]) for slot in (0, 1)]
    result = served.run(graph)
    report, named = (result.outputs[node.id]["text"][0] for node in shown)
    assert named == "red" and report.splitlines()[1].startswith("red") and report.splitlines()[2].startswith("blue")


@pytest.mark.parametrize("changes, word", [({"label": "red"}, "label"), ({"dino_model": "none"}, "dino_model")])
def test_node_tells_why_scores_cannot_be_compared(served, changes, word):
    graph = Graph()
    red = graph.add("EmptyImage", width=32, height=32, batch_size=1, color=0xFF0000)[0]
    first = evaluation(graph, red, "red")
    graph.add("PreviewAny", source=evaluation(graph, red, **{"label": "blue", "before": first[4], **changes})[0])
    assert error_of(served, graph).startswith(word)


@pytest.mark.parametrize("name", ["../checkpoints", "test_dino", "/etc"])
def test_node_takes_no_folder_but_those_it_lists(served, name):
    graph = Graph()
    red = graph.add("EmptyImage", width=32, height=32, batch_size=1, color=0xFF0000)[0]
    graph.add("PreviewAny", source=evaluation(graph, red, "x", clip_model=name)[0])
    assert served.run(graph, check=False).errors


def test_folder_is_known_whatever_the_systems_own_encoding(tmp_path):
    (tmp_path / "config.json").write_bytes('{"model_type": "clip", "_name_or_path": "D:/模型"}'.encode())
    asked = (
        f"from pathlib import Path; from tlora_core.reports.folder_encoder import model_type; "
        f"print(model_type(Path({str(tmp_path)!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    told = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "clip"
