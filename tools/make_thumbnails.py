"""Writes the templates' thumbnails, workflows/*.jpg: squares of pictures that each template has made on the tiny base.

    python3 tools/host.py python tools/make_thumbnails.py [NUMBER ...]

Templates for SDXL and FLUX run with the tiny base in place of their model file, and with its objects in place of the
user's pictures. All templates take half an hour on two CPU cores. NUMBER: the numbers at the start of the names of the
wanted templates.
"""

import sys
from pathlib import Path

from hostlib.server import own_server
from PIL import Image
from templates import TEMPLATES
from templates.parts import SCENES, TINY

from tlora_core.tiny import world

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
SIDE, GAP = 480, 6
# By the number of a template: its object, and the number of pictures in a row.
SHOWN = {
    "01": ("lime circle", 2),
    "02": ("peach circle", 2),
    "03": ("tan cross", 2),
    "04": ("maroon star", 2),
    "05": ("peach circle", 1),
    "06": ("tan cross", 1),
    "07": ("lime circle", 3),
    "08": ("lime circle", 3),
    "09": ("lime circle", 4),
    "10": ("peach circle", 3),
    "11": ("lime circle", 2),
    "12": ("lime circle", 2),
    "13": ("maroon star", 2),
    "14": ("cyan star", 2),
    "15": ("cyan star", 1),
    "16": ("cyan star", 2),
    "17": ("cyan star", 2),
    "18": ("cyan star", 2),
    "19": ("cyan star", 2),
    "20": ("navy moon", 2),
    "21": ("mint square", 2),
}
# Their training pictures come before the generated ones.
WITH_ITS_PICTURES = ("01", "02", "03", "04", "11", "12", "13", "14", "16", "17", "18", "19", "20", "21")
# One training serves the templates with one object; their scenes differ.
OTHER_SCENES = {
    "05": "a photo of {} in the snow",
    "15": "a photo of {} on the beach",
    "16": "a photo of {} on the beach\na photo of {} by a brick wall\na photo of {} on a plain blue background",
    "17": "a photo of {} in the snow\na photo of {} on a plain grey background\na photo of {} on the beach",
    "18": "a photo of {} on a plain yellow background\na photo of {} in a meadow\na photo of {} on the beach",
    "19": "a photo of {} in the snow\na photo of {} on a plain blue background\na photo of {} on the beach",
}
NOT_NEEDED = (
    "TLoRAEvaluate",
    "PreviewAny",
    "PreviewImage",
    "SaveImage",
    "TLoRASave",
    "TLoRAExport",
    "TLoRABake",
    "TLoRAInfo",
)
# Nodes with models of their own: what comes from them is left out.
OF_OTHER_MODELS = (
    "LoadBackgroundRemovalModel",
    "RemoveBackground",
    "TextGenerate",
    "RegexExtract",
    "StringConcatenate",
)


def on_tiny_base(prompt: dict, concept, files: list[str], scenes: str = SCENES) -> dict:
    """The prompt with the tiny base, `concept`, trained `files` and `scenes` in place of the user's choices. All
    pictures are saved."""
    _take_pictures_for_edits(prompt)
    prompt = {
        number: node for number, node in prompt.items() if node["class_type"] not in (*NOT_NEEDED, *OF_OTHER_MODELS)
    }
    for node in prompt.values():
        node["inputs"] = {n: value for n, value in node["inputs"].items() if _is_there(value, prompt)}
    backgrounds = iter(("beach", "brick", "meadow"))
    files = iter(files)
    for number, node in list(prompt.items()):
        kind, given = node["class_type"], node["inputs"]
        if kind in ("CheckpointLoaderSimple", "UNETLoader"):
            node.update(class_type="TLoRATinyBaseModel", inputs={})
        elif kind == "LoadImage":
            node.update(
                class_type="TLoRATinySampleConcept",
                inputs={
                    "concept": concept.name,
                    "background": next(backgrounds),
                    "place": "centre",
                    "count": 1,
                    "seed": int(number),
                },
            )
        elif kind == "TLoRATinySampleConcept":
            given["concept"] = concept.name
        elif kind == "TLoRATrainFromImage":
            kept = {
                name: given[name]
                for name in ("method", "min_rank", "rank")
                if given["resolution"] == TINY["resolution"]
            }
            given.update(
                {
                    **TINY,
                    **kept,
                    "class_word": concept.shape,
                    "validate_every": 0,
                    "checkpoint_every": 100,
                    "checkpoint_files": True,
                }
            )
        elif kind == "TLoRAPrompts":
            given.update(prompts=scenes, subject=f"sks {concept.shape}", prompt_set="own")
        elif kind in ("EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage"):
            node.update(class_type="EmptyLatentImage", inputs={"width": 64, "height": 64, "batch_size": 1})
        elif kind == "KSampler":
            given.update(steps=20, cfg=4.0)
        elif kind == "TLoRALoad":
            given["file"] = next(files)
        elif kind == "VAEDecode":
            prompt[f"saved{number}"] = {
                "class_type": "SaveImage",
                "inputs": {"images": [number, 0], "filename_prefix": f"new/{int(number):03}"},
            }
    _take_parts_of_the_base(prompt)
    drawn = [number for number, node in prompt.items() if node["class_type"] == "TLoRATinySampleConcept"]
    for node in prompt.values():
        if node["inputs"].get("mask", [None])[0] in drawn:
            del node["inputs"]["mask"]  # Load Image gives one too
    for number in drawn:
        prompt[f"seen{number}"] = {
            "class_type": "SaveImage",
            "inputs": {"images": [number, 0], "filename_prefix": f"seen/{int(number):03}"},
        }
    return prompt


def _take_pictures_for_edits(prompt: dict) -> None:
    """Replaces the pictures that an edit model makes for T-LoRA Images by others of the concept."""
    for node in [node for node in prompt.values() if node["class_type"] == "TLoRAImages"]:
        number = node["inputs"]["image"][0]
        if prompt[number]["class_type"] == "VAEDecode":
            prompt[number] = {"class_type": "LoadImage", "inputs": {}}
            node["inputs"]["captions"] = ""


def _is_there(value, prompt: dict) -> bool:
    """Whether an input is a plain value, or of a node that the prompt has."""
    return not isinstance(value, list) or value[0] in prompt


def _take_parts_of_the_base(prompt: dict) -> None:
    """Replaces a text encoder and a VAE of files of their own by the tiny base's."""
    base = next((number for number, node in prompt.items() if node["class_type"] == "TLoRATinyBaseModel"), None)
    parts = {"CLIPLoader": 1, "VAELoader": 2}
    loaders = {number: parts[node["class_type"]] for number, node in prompt.items() if node["class_type"] in parts}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][name] = [base, loaders[value[0]]]
    for number in loaders:
        del prompt[number]


def mosaic(pictures: list[Image.Image], across: int) -> Image.Image:
    """A square of `across` times `across` of the pictures, row after row."""
    whole = Image.new("RGB", (SIDE, SIDE), "white")
    side = (SIDE - GAP * (across - 1)) // across
    for i, picture in enumerate(pictures[: across * across]):
        place = (i % across * (side + GAP), i // across * (side + GAP))
        whole.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), place)
    return whole


def pictures(result, kind: str) -> list[Image.Image]:
    return [
        Image.open(image.path)
        for image in sorted(result.images, key=lambda image: image.path)
        if image.subfolder == kind
    ]


def main(numbers: list[str]) -> None:
    with own_server() as server:
        files = {}  # of the first training of each object: its files of several steps, and its result
        for title in TEMPLATES:
            number = title[:2]
            name, across = SHOWN[number]
            if numbers and number not in numbers:
                continue
            concept = next(one for one in world.CONCEPTS if one.name == name)
            result = server.run(
                on_tiny_base(
                    server.to_prompt(WORKFLOWS / f"{title}.json"),
                    concept,
                    files.get(name, []),
                    OTHER_SCENES.get(number, SCENES),
                )
            )
            loras = server.workspace / "models" / "loras"
            made = sorted(loras.glob("**/*.safetensors"), key=lambda path: path.stat().st_mtime)
            files.setdefault(name, [path.relative_to(loras).as_posix() for path in made[-3:]][::-1])
            seen = pictures(result, "seen") if number in WITH_ITS_PICTURES else []
            seen = seen[::2] if len(seen) > 3 else seen
            whole = mosaic(seen + pictures(result, "new"), across)
            whole.save(WORKFLOWS / f"{title}.jpg", quality=90)
            print(f"workflows/{title}.jpg of {len(seen)} and {len(pictures(result, 'new'))} pictures", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
