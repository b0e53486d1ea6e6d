"""Comparison sheets: every picture in its cell, labels and prompts beside them, and bad numbers refused."""

import numpy as np
import pytest
import torch
from graphs import TinyGraph, pixels

from tlora_core import TLoRAError
from tlora_core.reports.sheet import comparison_sheet

COLOURS = [[(1, 0, 0), (0, 1, 0)], [(0, 0, 1), (1, 1, 0)], [(1, 0, 1), (0, 1, 1)]]


def column(colours, size=(40, 40)):
    return torch.stack([torch.tensor(colour, dtype=torch.float32).expand(*size, 3) for colour in colours])


def boxes(sheet):
    """Where each colour's pixels are: left, top, right, bottom."""
    array = np.asarray(sheet)
    found = {}
    for colour in (colour for colours in COLOURS for colour in colours):
        y, x = np.nonzero((array == np.array(colour) * 255).all(-1))
        found[colour] = (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None
    return found


def ink(sheet, left, top, right, bottom) -> int:
    """Pixels of text in a part of the sheet."""
    return int((np.asarray(sheet)[top:bottom, left:right].min(-1) > 100).sum())


def test_pictures_stand_in_columns_of_settings_and_rows_of_prompts():
    sheet = comparison_sheet(
        [column(c) for c in COLOURS], ["LoRA", "T-LoRA", "base"], ["on the beach", "at night"], cell=100
    )
    found = boxes(sheet)
    assert all(box[2] - box[0] == box[3] - box[1] == 100 for box in found.values())
    for upper, lower in COLOURS:
        assert found[upper][0] == found[lower][0] and found[upper][3] < found[lower][1]
    lefts = [found[colours[0]][0] for colours in COLOURS]
    assert lefts == sorted(lefts) and len(set(lefts)) == 3
    # Labels above each column, prompts left of each row.
    for colours in COLOURS:
        left, top, right, _ = found[colours[0]]
        assert ink(sheet, left, 0, right, top) > 30
    for colour in COLOURS[0]:
        left, top, _, bottom = found[colour]
        assert ink(sheet, 0, top, left, bottom) > 30
    assert sheet.size == (found[(1, 0, 1)][2] + 16, found[(0, 1, 0)][3] + 16)


def test_without_prompts_nothing_is_left_free_for_them_and_the_title_stands_on_top():
    plain = comparison_sheet([column(c) for c in COLOURS[:2]], ["a", "b"], cell=100)
    assert boxes(plain)[(1, 0, 0)][0] == 16
    titled = comparison_sheet([column(c) for c in COLOURS[:2]], ["a", "b"], cell=100, title="Which is which")
    assert titled.height > plain.height and ink(titled, 0, 0, 150, 30) > 30


def test_pictures_keep_their_shape_and_long_texts_their_place():
    word = "w" * 300
    sheet = comparison_sheet(
        [column(COLOURS[0], (20, 80)), column(COLOURS[1], (80, 20))],
        [word, "b " * 60],
        [word, "many words " * 40],
        cell=120,
    )
    found = boxes(sheet)
    assert np.array_equal([found[(1, 0, 0)][i + 2] - found[(1, 0, 0)][i] for i in (0, 1)], (120, 30))
    assert np.array_equal([found[(0, 0, 1)][i + 2] - found[(0, 0, 1)][i] for i in (0, 1)], (30, 120))
    left = found[(1, 0, 0)][0]
    assert ink(sheet, left - 4, 200, left, sheet.height) == 0  # no prompt reaches the pictures


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=["one"]), "labels"),
        (dict(prompts=["one"]), "prompts"),
        (dict(cell=50_000), "cell"),
        (dict(columns=[column(COLOURS[0]), column(COLOURS[0][:1])]), "2, 1 pictures"),
        (dict(columns=[column(COLOURS[0]), column(COLOURS[0])[..., :1]]), "images_2 has 1 channels"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(change, message):
    with pytest.raises(TLoRAError, match=message):
        comparison_sheet(
            **{
                "columns": [column(c) for c in COLOURS[:2]],
                "labels": ["a", "b"],
                "prompts": ["x", "y"],
                "cell": 64,
                **change,
            }
        )


def test_node_takes_lists_and_batches_and_prompts_as_a_list(server):
    graph = TinyGraph()
    prompts = graph.add("TLoRAPrompts", prompts="one {}\ntwo {}", subject="thing")
    batch = graph.add(
        "TLoRATinySampleConcept", concept="teal flower", background="beach", place="centre", count=2, seed=0
    )
    # A list: one picture for each prompt.
    text = graph.add("StringReplace", string=prompts[0], find="x", replace="")
    sizes = graph.add("StringLength", string=text[0])
    listed = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=sizes[0])
    sheet = graph.add(
        "TLoRACompare", images_1=batch[0], images_2=listed[0], labels="batch\nlist", prompts=prompts[0], cell=64
    )
    saved = graph.save(sheet[0])
    [picture] = pixels(server.run(graph), saved)
    assert picture.shape[0] > 2 * 64 and picture.shape[1] > 64 * 2.9
    refused = TinyGraph()
    batch = refused.add(
        "TLoRATinySampleConcept", concept="teal flower", background="beach", place="centre", count=2, seed=0
    )
    refused.save(refused.add("TLoRACompare", images_1=batch[0], images_2=batch[0], labels="one")[0])
    result = server.run(refused, check=False)
    assert "labels" in result.errors[0]
