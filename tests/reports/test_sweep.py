"""Sweeps: the models of an XY sheet are what Load and Apply make with the same values, in the sheet's order."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from graphs import TinyGraph, error_of, pixels
from PIL import Image
from safetensors.torch import load_file, save_file

from tlora_core import LowRank, RankSchedule, TLoRAError, TLoRAFile
from tlora_core.reports.sheet import comparison_sheet
from tlora_core.reports.sweep import Axis, Sweep

RANK, MIN_RANK = 8, 4


@pytest.fixture(scope="module")
def file():
    """A T-LoRA with a layer of the full rank and one of less."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LowRank(torch.randn(12, 2 * rank, generator=generator), torch.randn(2 * rank, 10, generator=generator), 2)
        for name, rank in (("wide", RANK), ("narrow", 3))
    }
    return TLoRAFile(layers, "tlora", RankSchedule(RANK, MIN_RANK), 1000, "discrete", "sdxl")


# --- values ---


def test_cells_go_row_after_row_and_labels_name_the_settings():
    sweep = Sweep.from_text("strength", "0.5, 1,", "min_rank", "2\n4\n\n8")
    assert [(cell["strength"], cell["min_rank"]) for cell in sweep.cells()] == [
        (0.5, 2),
        (1, 2),
        (0.5, 4),
        (1, 4),
        (0.5, 8),
        (1, 8),
    ]
    assert sweep.labels.columns == ("strength 0.5", "strength 1")
    assert sweep.labels.rows == ("min_rank 2", "min_rank 4", "min_rank 8")
    row = Sweep.from_text("alpha", "1, 2.5", "none", "not read")
    assert row.cells() == [{"alpha": 1}, {"alpha": 2.5}] and row.labels.rows == () and row.labels.cells == 2


@pytest.mark.parametrize(
    "text, found, labels",
    [
        (
            "run/heart_step*.safetensors",
            ["run\\heart_step20.safetensors", "run\\heart_step100.safetensors"],
            ["heart_step20", "heart_step100"],
        ),
        ("b.safetensors, a.safetensors", ["b.safetensors", "a.safetensors"], ["b", "a"]),
        ("a, b and c.safetensors\na.*", ["a, b and c.safetensors", "a.safetensors"], ["a, b and c", "a"]),
        ("x²*", ["x²2.safetensors", "x²10.safetensors"], ["x²2", "x²10"]),
        ("1²*", ["1²2.safetensors"], ["1²2"]),
        (
            "b.safetensors\n*b.safetensors",
            ["b.safetensors", "other/b.safetensors"],
            ["b.safetensors", "other/b.safetensors"],
        ),
    ],
    ids=[
        "by the step",
        "as given",
        "comma in a name",
        "raised digits",
        "raised digits alone",
        "same name in two folders",
    ],
)
def test_files_are_found_by_name_and_by_pattern(text, found, labels):
    files = [
        "a, b and c.safetensors",
        "a.safetensors",
        "b.safetensors",
        "other/b.safetensors",
        "run\\heart_step100.safetensors",
        "run\\heart_step20.safetensors",
        "run\\else.safetensors",
        "x²10.safetensors",
        "x²2.safetensors",
        "1²2.safetensors",
    ]
    axis = Axis.from_text("x_values", "file", text, files)
    assert list(axis.values) == found and list(axis.labels) == labels


@pytest.mark.parametrize(
    "given, message",
    [
        (("strength", " ,\n", "none", ""), "x_values is empty"),
        (("strength", "1", "file", "\n"), "y_values is empty"),
        (("strength", "1", "rank", "4, four"), 'y_values has "four", which is not a whole number'),
        (("min_rank", "4.5", "none", ""), 'x_values has "4.5", which is not a whole number'),
        (("alpha", "one", "none", ""), 'x_values has "one", which is not a number'),
        (("strength", "1, 11", "none", ""), "x_values has the strength 11"),
        (("strength", "nan", "none", ""), "x_values has the strength nan"),
        (("file", "*.pt", "none", ""), r'x_values: no file in the loras folders is called "\*.pt"'),
        (("rank", "1", "rank", "2"), "x and y are both rank"),
        (("rank", "1," * 13, "strength", "1," * 5), "x_values and y_values make 13 x 5 models; 64"),
        (("rank", "1," * 65, "none", ""), "x_values makes 65 models"),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_sentence(given, message):
    with pytest.raises(TLoRAError, match=message) as error:
        Sweep.from_text(*given, files=["a.safetensors"])
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, changes, message",
    [
        (("rank", "9", "none", ""), {}, "x_values: rank is 9; .* from 1 to the T-LoRA's, which is 8"),
        (("rank", "0", "none", ""), {}, "x_values: rank is 0"),
        (("strength", "1", "min_rank", "9"), {}, "y_values: min_rank is 9; .* the rank, which is 8"),
        (("min_rank", "5", "rank", "4"), {}, "x_values: min_rank is 5; .* the rank, which is 4"),
        (("alpha", "0", "none", ""), {}, "x_values: alpha is 0"),
        (("alpha", "inf", "none", ""), {}, "x_values: alpha is inf"),
        (
            ("min_rank", "1", "none", ""),
            {"schedule": RankSchedule(RANK, 2, 1.0, ((0.0, RANK), (1.0, 2)))},
            "free curve, which has no min_rank;",
        ),
        (
            ("alpha", "2", "none", ""),
            {"schedule": RankSchedule(RANK, 2, 1.0, ((0.0, RANK), (1.0, 2)))},
            "free curve, which has no alpha;",
        ),
    ],
)
def test_values_that_the_tlora_cannot_have_are_refused_in_one_sentence(file, given, changes, message):
    sweep = Sweep.from_text(*given)
    with pytest.raises(TLoRAError, match=message) as error:
        sweep.variant(replace(file, **changes), sweep.cells()[0])
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_methods_without_components_have_no_rank_to_sweep(file):
    layers = {"layer": LowRank(torch.ones(4, 8), torch.ones(8, 4))}
    turned = replace(file, layers=layers, method="oft", schedule=RankSchedule(8, 8))
    sweep = Sweep.from_text("rank", "4", "none", "")
    with pytest.raises(TLoRAError, match='x_values: the method "oft" has no components'):
        sweep.variant(turned, sweep.cells()[0])


# --- variants ---


@pytest.mark.parametrize("rank", [2, 6])
def test_a_lower_rank_is_the_first_components_under_a_schedule_that_ends_at_them(file, rank):
    sweep = Sweep.from_text("rank", str(rank), "none", "")
    [cell] = sweep.cells()
    less = sweep.variant(file, cell)
    for name, layer in file.layers.items():
        own = min(rank, layer.rank)
        for t in (0, 300, 700, 1000):
            least = min(MIN_RANK, rank)
            whole = math.floor((rank - least) * (1000 - t) / 1000) + least
            # A layer of less than the file's rank has its share of it.
            active = (
                whole
                if own == rank
                else math.floor((own - -(-least * own // rank)) * (1000 - t) / 1000) - (-least * own // rank)
            )
            expected = sum(layer.up[:, [c]] @ layer.down[[c]] for c in range(2 * active))
            columns = 2 * less.schedule_of(name).active_rank(t)
            got = less.layers[name].up[:, :columns] @ less.layers[name].down[:columns]
            torch.testing.assert_close(got, expected)
        assert less.layers[name].up.data_ptr() == layer.up.data_ptr(), "a variant is no copy"


def test_a_free_curve_keeps_its_shape_below_a_lower_rank(file):
    curved = replace(file, schedule=RankSchedule(RANK, 2, 1.0, ((0.0, RANK), (0.5, 5), (1.0, 2))))
    sweep = Sweep.from_text("rank", "4", "strength", "1")
    assert sweep.variant(curved, sweep.cells()[0]).schedule == RankSchedule(4, 2, 1.0, ((0.0, 4), (0.5, 4), (1.0, 2)))


# --- on the server ---


def swept(graph, **inputs):
    return graph.add(
        "TLoRASweep",
        **{
            "model": graph.model,
            "strength": 1.0,
            "x": "strength",
            "x_values": "1",
            "y": "none",
            "y_values": "",
            **inputs,
        },
    )


def loaded_pictures(graph, *settings):
    return [
        graph.picture(graph.add("TLoRALoad", model=graph.model, **{"strength": 1.0, **setting})[0])
        for setting in settings
    ]


def assert_cells(server, graph, cells, expected):
    """The pictures of node `cells`, one after the other, are those of the nodes `expected`."""
    result = server.run(graph)
    shown = pixels(result, cells)
    references = [pixels(result, node)[0] for node in expected]
    assert len(shown) == len(references) == len({picture.tobytes() for picture in references})
    for i, (picture, reference) in enumerate(zip(shown, references)):
        assert np.array_equal(picture, reference), i
    return shown


def test_each_cell_is_what_load_gives_and_the_sheet_shows_them_in_their_places(server, trained):
    graph = TinyGraph()
    tlora = graph.add("TLoRALoad", file=trained[0], strength=1.0)[1]
    sweep = swept(graph, tlora=tlora, x_values="0.5, 1", y="min_rank", y_values="1, 4")
    cells = graph.picture(sweep[0])
    images = graph[cells.id]["inputs"]["images"]
    labels = "not\nused\nat all"
    compared = graph.add("TLoRACompare", images_1=images, axes=sweep[1], labels=labels, cell=128, title="Sweep")
    sheet = graph.save(compared[0])
    expected = loaded_pictures(
        graph,
        *({"file": trained[0], "strength": strength, "min_rank": least} for least in (1, 4) for strength in (0.5, 1.0)),
    )
    shown = assert_cells(server, graph, cells, expected)
    again = server.run(graph)
    columns = [torch.from_numpy(shown[x::2]).float() / 255 for x in range(2)]
    drawn = comparison_sheet(columns, ["strength 0.5", "strength 1"], ["min_rank 1", "min_rank 4"], 128, "Sweep")
    [picture] = [image.path for image in again.images if image.node == sheet.id]
    with Image.open(picture) as saved:
        whole = np.asarray(saved.convert("RGB"), dtype=int)
    assert np.abs(whole - np.asarray(drawn, dtype=int)).max() <= 1
    for i, cell in enumerate(shown):
        x, y = (side - 16 - 128 - 134 * (1 - at) for side, at in zip((whole.shape[1], whole.shape[0]), (i % 2, i // 2)))
        assert np.abs(whole[y : y + 128, x : x + 128] - cell).max() <= 1, i


def test_a_lower_rank_is_the_picture_of_a_file_with_the_other_components_cut_off(server, loras, trained):
    whole = TLoRAFile.load(loras / trained[0])
    layers = {name: LowRank(layer.up[:, :4].clone(), layer.down[:4].clone(), 2) for name, layer in whole.layers.items()}
    replace(whole, layers=layers, schedule=RankSchedule(2, 2)).save(loras / "tests" / "cut.safetensors")
    graph = TinyGraph()
    tlora = graph.add("TLoRALoad", file=trained[0], strength=1.0)[1]
    cells = graph.picture(swept(graph, tlora=tlora, x="rank", x_values="2, 4")[0])
    assert_cells(server, graph, cells, loaded_pictures(graph, {"file": "tests/cut.safetensors"}, {"file": trained[0]}))


@pytest.mark.parametrize("connected", [False, True], ids=["typed", "connected"])
def test_files_of_a_pattern_come_in_the_order_of_their_steps_and_are_read_again_when_replaced(
    server, loras, trained, connected
):
    for step, name in ((20, trained[0]), (100, trained[1])):
        (loras / f"swept_step{step}.safetensors").write_bytes((loras / name).read_bytes())
    names = [f"swept_step{step}.safetensors" for step in (20, 100)]
    graph = TinyGraph()
    pattern = "swept_step*.safetensors"
    text = graph.add("StringReplace", string=pattern, find="~", replace="")[0] if connected else pattern
    sweep = swept(graph, x="file", x_values=text, strength=0.75)
    assert_cells(
        server,
        graph,
        graph.picture(sweep[0]),
        loaded_pictures(graph, *({"file": name, "strength": 0.75} for name in names)),
    )
    (loras / names[0]).write_bytes((loras / trained[1]).read_bytes())
    (loras / names[1]).write_bytes((loras / trained[0]).read_bytes())
    assert_cells(
        server,
        graph,
        graph.picture(sweep[0]),
        loaded_pictures(graph, *({"file": name, "strength": 0.75} for name in names)),
    )


def test_min_rank_on_a_plain_lora_acts_as_in_load(server, loras, trained):
    save_file(load_file(loras / trained[0]), loras / "plain.safetensors")
    graph = TinyGraph()
    cells = graph.picture(swept(graph, x="min_rank", x_values="2, 8", y="file", y_values="plain.safetensors")[0])
    assert_cells(
        server,
        graph,
        cells,
        loaded_pictures(graph, *({"file": "plain.safetensors", "min_rank": least} for least in (2, 8))),
    )


def test_missing_or_unfit_inputs_are_reported_in_one_sentence(server, trained):
    graph = TinyGraph()
    graph.picture(swept(graph)[0])
    assert "T-LoRA is not connected" in error_of(server, graph)
    for inputs, message in (
        ({}, "images_2 is not connected"),
        ({"axes": True}, "images_1 has 3 pictures, but the sweep has 2 cells"),
        ({"axes": True, "images_3": True}, "images_3 cannot be shown together with axes"),
    ):
        graph = TinyGraph()
        batch = graph.add("EmptyImage", width=64, height=64, batch_size=3, color=0)[0]
        tlora = graph.add("TLoRALoad", file=trained[0], strength=1.0)[1]
        linked = {"axes": swept(graph, tlora=tlora, x_values="0, 1")[1], "images_3": batch}
        graph.save(
            graph.add("TLoRACompare", images_1=batch, labels="one", **{name: linked[name] for name in inputs})[0]
        )
        assert message in error_of(server, graph)
