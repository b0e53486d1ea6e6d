"""Lists of pictures, as the host's folder loaders output them, make one training, on the real server."""

import json

import numpy as np
import pytest
from graphs import TinyGraph, cached_nodes, error_of, files_below
from PIL import Image
from safetensors import safe_open

SIZES = ((64, 64), (96, 64), (64, 128))


@pytest.fixture(scope="module")
def folder(server) -> str:
    """The name of an input folder of three pictures of three sizes, one of them without a caption."""
    path = server.workspace / "input" / "tests_subject"
    path.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(SIZES):
        colours = np.random.default_rng(number).integers(1, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(colours).save(path / f"{number}.png")
    for number in (0, 1):
        (path / f"{number}.txt").write_text(f"a photo of sks flower,\nnumber {number}")
    return path.name


def recorded(loras, name: str) -> dict:
    with safe_open(loras / name, framework="pt") as file:
        return json.loads(file.metadata()["tlora"])["training"]


@pytest.mark.parametrize("through", ["Train", "T-LoRA Images"])
def test_a_folder_of_pictures_with_texts_and_masks_is_one_training(server, loras, folder, through):
    graph, before = TinyGraph(), files_below(loras)
    loaded = graph.add("LoadImageTextDataSetFromFolder", folder=folder)
    masks = graph.add("ImageToMask", image=loaded[0], channel="red")
    inputs = {"image": loaded[0], "captions": loaded[1], "mask": masks[0]}
    if through == "T-LoRA Images":
        inputs = {"more_images": graph.add("TLoRAImages", **inputs)[0]}
    training = graph.train(**inputs, file_name=f"tests/folder_{len(through)}")
    result = server.run(graph)
    names = result.outputs[training.id]["text"]
    assert len(names) == 1 and files_below(loras) - before == set(names)
    assert recorded(loras, names[0])["images"] == 3 + (through != "Train")
    assert training.id in cached_nodes(server, server.run(graph))


def test_lists_that_do_not_fit_are_reported_in_one_sentence(server, loras, folder):
    cases = {
        "captions": "captions has 3 texts for 1 picture; give one for all or one for each.",
        "class_word": "class_word is a list of 3; connect a single value, because all pictures go into one training.",
    }
    for name, words in cases.items():
        graph, before = TinyGraph(), files_below(loras)
        graph.train(**{name: graph.add("LoadImageTextDataSetFromFolder", folder=folder)[1]})
        assert error_of(server, graph) == words and files_below(loras) == before
