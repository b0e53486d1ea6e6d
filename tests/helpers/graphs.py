"""Prompts in the API format for the tests on the real server, and what comes back: pictures, files, errors."""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

_never_repeated = itertools.count()


class Node:
    """A node of a prompt; `node[0]` is a link to its first output."""

    def __init__(self, node_id: str):
        self.id = node_id

    def __getitem__(self, slot: int) -> list:
        return [self.id, slot]


class Graph(dict):
    """A prompt that grows node by node."""

    def add(self, class_type: str, **inputs) -> Node:
        node_id = str(len(self) + 1)
        self[node_id] = {"class_type": class_type, "inputs": inputs}
        return Node(node_id)


class TinyGraph(Graph):
    """A prompt on the pack's tiny base model."""

    def __init__(self):
        super().__init__()
        self.base = self.add("TLoRATinyBaseModel")
        self.model, self.clip, self.vae = (self.base[slot] for slot in range(3))

    def concept(self, name: str = "teal flower") -> list:
        return self.add("TLoRATinySampleConcept", concept=name, background="beach", place="centre", count=1, seed=0)[0]

    def train(self, **changes) -> Node:
        """A training of a second or so that moves the model far; outputs T-LoRA, MODEL, file, loss."""
        inputs = {
            "model": self.model,
            "clip": self.clip,
            "vae": self.vae,
            "token": "sks",
            "class_word": "flower",
            "method": "tlora",
            "rank": 4,
            "min_rank": 2,
            "steps": 3,
            "learning_rate": 0.1,
            "resolution": 64,
            "seed": 0,
            "file_name": "tests/trained",
            "alpha": 1.0,
            "start": "last_random",
            "batch_size": 1,
            **changes,
        }
        if "image" not in inputs:
            inputs["image"] = self.concept()
        return self.add("TLoRATrainFromImage", **inputs)

    def picture(self, model: list) -> Node:
        """A picture sampled anew with `model`: always the same prompt and seed."""
        # Words that are not there to be replaced: with an input of its own, the server cannot answer from its cache.
        text = self.add(
            "StringReplace", string="a photo of sks flower", find=f"word {next(_never_repeated)}", replace=""
        )
        positive = self.add("CLIPTextEncode", clip=self.clip, text=text[0])
        negative = self.add("CLIPTextEncode", clip=self.clip, text="")
        latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        sampled = self.add(
            "KSampler",
            model=model,
            positive=positive[0],
            negative=negative[0],
            latent_image=latent[0],
            seed=3,
            steps=4,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        return self.save(self.add("VAEDecode", samples=sampled[0], vae=self.vae)[0])

    def save(self, images: list) -> Node:
        return self.add("SaveImage", images=images, filename_prefix="tests/picture")


def pixels(result, node: Node) -> np.ndarray:
    """The pictures that `node` saved or previewed, int16 [N, H, W, 3]."""
    files = [image.path for image in result.images if image.node == node.id]
    assert files, f"node {node.id} showed no picture"
    return np.stack([np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in files])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in levels of 0..255."""
    return float(np.abs(a - b).mean())


def cached_nodes(server, result) -> set[str]:
    """The ids of the nodes that the server did not run, because it still had their outputs."""
    messages = server.client.get_json(f"/history/{result.prompt_id}")[result.prompt_id]["status"]["messages"]
    return {node for kind, data in messages if kind == "execution_cached" for node in data["nodes"]}


def bare_and_adapted(server, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of the tiny base without and with a T-LoRA file, from one prompt."""
    graph = TinyGraph()
    bare = graph.picture(graph.model)
    adapted = graph.picture(graph.add("TLoRALoad", file=name, strength=1.0, model=graph.model)[0])
    result = server.run(graph)
    return pixels(result, bare), pixels(result, adapted)


def bake(graph, name, mode, **changes):
    """Bake T-LoRA on a file, in float32 so that nothing is rounded."""
    inputs = {
        "mode": mode,
        "interval_start": 1.0,
        "interval_end": 0.0,
        "noise_level": 1.0,
        "parts": 3,
        "file_name": f"tests/baked_{mode}",
        "dtype": "float32",
        **changes,
    }
    return graph.add("TLoRABake", tlora=graph.add("TLoRALoad", file=name, strength=1.0)[1], **inputs)


def files_below(folder: Path) -> set[str]:
    """Every file, hidden and temporary ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def same_tensors(path: Path, other: Path) -> bool:
    ours, theirs = load_file(path), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def error_of(server, graph) -> str:
    """The one error of a prompt that fails, without the node's name."""
    result = server.run(graph, check=False)
    assert len(result.errors) == 1, result.errors
    return result.errors[0].partition(": ")[2]
