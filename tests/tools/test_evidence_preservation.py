"""The evidence on what keeps the class as it was: its prompts, its measures and its section."""

import json
import sys

import pytest
from places import REPO

sys.path.append(str(REPO / "benchmarks"))
from evidence import analysis, preservation, prompts, run, study  # noqa: E402
from evidence_records import base, record

CONCEPTS = study.SCALES["full"].concepts[:7]


def of_class(drawn, distance, right):
    """The record with pictures of the class: two of the class word alone, ten with a colour."""
    rows = [{"asked": {}, "seen": {"colour": "red"}, "distance": distance}] * 2
    rows += [{"asked": {"colour": "red"}, "seen": {"colour": "red" if i < right else "blue"}} for i in range(10)]
    return {**drawn, "of_class": rows}


def trained(concept, distance, right, **way):
    return [of_class(record(concept, 0, "tlora", at, 0.2 - at / 2000, **way), distance, right) for at in (100, 200)]


def test_prompts_of_the_class_have_its_word_and_no_token():
    concept = run.concept_named("olive heart")
    made = prompts.class_prompts(concept, 0, 8)
    assert len(made) == 8 and not any(prompts.TOKEN in prompt.text.split() for prompt in made)
    plain, full = made[::2], made[1::2]
    assert {prompt.text for prompt in plain} == {"a photo of a heart"}
    assert [prompt.seed for prompt in plain] == [0, 1, 2, 3]
    assert all(prompt.asked["shape"] == "heart" and len(prompt.asked) == 4 for prompt in full)


def test_a_point_says_how_far_the_class_has_become_the_concept():
    [_, point, _] = analysis.points([of_class(base(), 0.3, 10), *trained("olive heart", 0.25, 7)])
    assert (point.leak, point.of_class) == pytest.approx((0.25, 0.7))
    assert all(p.leak is None and p.of_class is None for p in analysis.points([base(), record()]))


def test_the_section_judges_each_way_against_neither_and_the_other(tmp_path):
    (tmp_path / "scorers.json").write_text(json.dumps({"attributes": {}}))
    assert preservation.section(tmp_path) == ""
    records = []
    for i, concept in enumerate(CONCEPTS):
        records.append(of_class(base(concept), 0.3, 10))
        records += trained(concept, 0.2 + i / 1000, 5)
        records += trained(concept, 0.25 + i / 1000, 5, **study.WAYS[preservation.PRIOR])
        records += trained(concept, 0.28 + i / 1000, 9, **study.WAYS[preservation.OUTPUT])
    (tmp_path / "preservation.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    lines = preservation.section(tmp_path).splitlines()
    rows = {line.split(" | ")[0].lstrip("| "): line for line in lines if line.startswith("| ")}
    leak = rows["output preservation, less than neither: class becomes the concept"]
    # At equal IS: on the line from the bare base to the first measured step, IS 0.75, at 0.2.
    assert "confirmed" in leak and "0.107 [0.107" in leak and "0.400 [0.400" in leak
    assert "0.400" in rows["output preservation, less than prior preservation: class prompts lost"]
    assert "not separable" in rows["prior preservation, less than neither: class prompts lost"]
    assert rows["neither"].split(" | ")[1].startswith("1.000"), "the last table: after the last step"
    assert "7 concepts, 7 units" in "\n".join(lines)
