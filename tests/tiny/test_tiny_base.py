"""The embedded tiny base model: its world, its tokenizer, its files, and that it draws what its prompts say."""

import json
import re

import numpy as np
import pytest
import tiny_gate
import torch
from places import REPO
from safetensors import safe_open

from tlora_core.tiny import tokenizer, world

WEIGHTS = tiny_gate.WEIGHTS


def scenes(count=64, seed=0):
    return world.sample_scenes(count, np.random.default_rng(seed))


def test_pictures_are_the_same_for_the_same_seed_and_in_range():
    one, two, other = (world.render(scenes(seed=s)) for s in (1, 1, 2))
    assert one.dtype == np.float32 and one.shape == (64, 64, 64, 3)
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert one.min() >= 0 and one.max() <= 1


def test_caption_names_what_the_picture_shows():
    batch = scenes(200)
    texts = [world.caption(batch, i, tiny_gate.FullCaption(), drop=0) for i in range(200)]
    for i, text in enumerate(texts):
        assert (
            world.SHAPES[batch.shape[i]] in text.split() and list(world.COLOURS)[batch.colour_index[i]] in text.split()
        )
        assert text.endswith(list(world.BACKGROUNDS.values())[batch.background[i]])
    assert any(w in " ".join(texts) for w in ("striped", "dotted"))


def test_training_world_has_no_rim_no_core_and_no_colour_of_a_concept():
    batch = scenes(5000)
    assert np.isnan(batch.rim).all() and np.isnan(batch.core).all()
    for concept in world.CONCEPTS:
        distance = np.abs(batch.colour - np.array(concept.body) / 255).max(1).min()
        assert distance > 0.06, concept.name


def test_every_training_word_is_known_and_a_strange_word_has_always_the_same_slot():
    batch, rng = scenes(300), np.random.default_rng(0)
    known = 3 + len(tokenizer.WORDS)
    for i in range(300):
        text = world.caption(batch, i, rng)
        strange = [w for w, t in zip(text.split(), tokenizer.token_ids(text)) if t >= known]
        assert set(strange) <= set(world.RARE_WORDS)
    assert tokenizer.token_ids("sks") == tokenizer.token_ids("SKS,") != tokenizer.token_ids("zwx")
    assert len(tokenizer.padded_ids("a " * 100)) == tokenizer.MAX_TOKENS


def test_weights_are_small_and_carry_sdxls_names():
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) <= 20e6
    with safe_open(WEIGHTS / "tiny_base.safetensors", "pt") as opened:
        names = set(opened.keys())
    attention = [n for n in names if re.search(r"transformer_blocks\.\d\.attn[12]\.to_(q|k|v|out\.0)\.weight$", n)]
    assert len(attention) == 88 and all(n.startswith("model.diffusion_model.") for n in attention)
    assert "model.diffusion_model.label_emb.0.0.weight" in names


def test_scorer_is_right_on_rendered_pictures():
    accuracy = tiny_gate.scorer_accuracy(tiny_gate.load_scorer(), 600)
    assert min(accuracy.values()) >= tiny_gate.SCORER_GATE, accuracy


def test_concept_matcher_distinguishes_the_concepts():
    flower = world.CONCEPTS[0]
    matcher = tiny_gate.ConceptMatcher(flower)
    own = world.render(world.concept_scenes(flower, 4, np.random.default_rng(3)))
    others = np.concatenate(
        [world.render(world.concept_scenes(c, 1, np.random.default_rng(4))) for c in world.CONCEPTS[1:6]]
    )
    assert matcher.distance(torch.from_numpy(own)).max() < 0.1 < 0.15 < matcher.distance(torch.from_numpy(others)).min()


@pytest.fixture(scope="module")
def report(comfy):
    """The gate in miniature; `tools/tiny_gate.py` measures it in full."""
    return tiny_gate.measure(pictures=40, concepts=0)[0]


def test_base_draws_what_its_prompts_say_as_often_as_its_report_claims(report):
    claimed = json.loads((WEIGHTS / "gate.json").read_text())["base"]
    for name in tiny_gate.GATE:
        # Two and a half standard errors of 40 pictures, so that only a worse model fails.
        margin = 2.5 * (claimed[name] * (1 - claimed[name]) / 40) ** 0.5 + 0.01
        assert report["base"][name] >= claimed[name] - margin, (name, report["base"], claimed)


def test_the_gate_asks_for_all_it_says():
    report = json.loads((WEIGHTS / "gate.json").read_text())
    assert report["passed"] and tiny_gate.passed(report) and len(report["concepts"]) == len(world.CONCEPTS)
    assert not tiny_gate.passed({**report, "scorer": {**report["scorer"], "place": 0.94}})
    for name, least in tiny_gate.GATE.items():
        assert not tiny_gate.passed({**report, "base": {**report["base"], name: least - 0.005}})
    name = next(name for name, distances in report["concepts"].items() if tiny_gate.reproduces(distances))
    worse = {**report["concepts"], name: {**report["concepts"][name], "lora": report["concepts"][name]["base"]}}
    assert not tiny_gate.passed({**report, "concepts": worse})


def test_repository_holds_the_sheet_of_pictures_and_the_model_card():
    root = REPO
    assert (root / "docs" / "tiny_base.png").stat().st_size > 10_000
    assert "gate" in (root / "tlora_core" / "tiny" / "MODEL_CARD.md").read_text().lower()


def test_a_plain_lora_on_one_picture_of_a_concept_reproduces_it(comfy):
    from tlora_core.tiny import comfy as tiny_base

    heart = next(c for c in world.CONCEPTS if c.name == "olive heart")
    with torch.inference_mode():
        host = tiny_gate.HostSampler(*tiny_base.load(str(WEIGHTS / "tiny_base.safetensors")))
        distances = tiny_gate.lora_likeness(host, heart)
    assert tiny_gate.reproduces(distances), distances
