"""T-LoRA Images on the real server: what it shows when it has run, and pictures with alpha."""

import json

import numpy as np
from graphs import TinyGraph
from input_pictures import HIDDEN, IS_SUBJECT, SUBJECT, write_picture
from PIL import Image


def shown(server, result, node) -> list[dict]:
    """What the node tells the page of its pictures, each with its pixels."""
    told = result.outputs[node.id]
    assert told["tlora_pictures_count"] == [len(told["tlora_pictures"])]
    folder = server.workspace / "temp"
    return [
        {**one, "pixels": np.asarray(Image.open(folder / one["file"]["subfolder"] / one["file"]["filename"]), float)}
        for one in told["tlora_pictures"]
    ]


def is_near(colour, other) -> bool:
    return bool(np.abs(colour - np.array(other)).max() < 40)


def test_it_shows_its_own_pictures_with_their_masks(server):
    write_picture(server.workspace / "input" / "cut.png", IS_SUBJECT)
    graph = TinyGraph()
    loaded = graph.add("LoadImage", image="cut.png")
    inverted = graph.add("InvertMask", mask=loaded[1])
    background = graph.add("TLoRAImages", image=loaded[0], mask=loaded[1])
    subject = graph.add("TLoRAImages", image=loaded[0], mask=inverted[0], before=background[0])
    graph.train(more_images=subject[0], steps=1, file_name="tests/shown")
    result = server.run(graph)
    [first], [second] = (shown(server, result, node) for node in (background, subject))
    assert (first["warning"], second["warning"]) == ("border", "") and first["is_masked"] and second["is_masked"]
    assert is_near(first["pixels"][4, 4], HIDDEN) and not is_near(first["pixels"][40, 60], SUBJECT)
    assert is_near(second["pixels"][40, 60], SUBJECT) and not is_near(second["pixels"][4, 4], HIDDEN)


def test_the_alpha_of_a_picture_is_its_mask(server, loras):
    """The file is that of the same training with the subject as its mask: hidden colours teach nothing."""
    write_picture(server.workspace / "input" / "cut.png", IS_SUBJECT)
    graph = TinyGraph()
    loaded = graph.add("LoadImage", image="cut.png")
    joined = graph.add("JoinImageWithAlpha", image=loaded[0], alpha=loaded[1])
    images = graph.add("TLoRAImages", image=joined[0])
    by_alpha = graph.train(image=joined[0], more_images=images[0], steps=1, file_name="tests/by_alpha")
    mask = graph.add("InvertMask", mask=loaded[1])
    masked = graph.add("TLoRAImages", image=loaded[0], mask=mask[0])
    by_mask = graph.train(image=loaded[0], mask=mask[0], more_images=masked[0], steps=1, file_name="tests/by_mask")
    result = server.run(graph)
    [picture] = shown(server, result, images)
    assert picture["is_masked"] and is_near(picture["pixels"][40, 60], SUBJECT)
    one, other = (loras / result.outputs[node.id]["text"][0] for node in (by_alpha, by_mask))
    assert one.read_bytes() == other.read_bytes(), json.dumps([one.name, other.name])
