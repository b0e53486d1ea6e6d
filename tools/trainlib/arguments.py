"""The options of `train`, and the job that they ask for."""

from __future__ import annotations

import argparse
from typing import Any

from hostlib.errors import WrongArguments

from . import reference

# Options that are inputs of the node, by their own names.
_INPUTS = ("token", "class_word")
PARTS = ("model", "unet", "clip", "vae", "clip_type", "weight_dtype", "clip_vision")
FILES = ("image", "mask", "prior_images")


def add_options(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("model", "files by their names in ComfyUI's folders, or by their paths")
    models.add_argument("--model", metavar="FILE", help='a checkpoint, or "tiny" for the small model of the pack')
    models.add_argument("--unet", metavar="FILE", help="a diffusion model alone, with --clip, --clip-type and --vae")
    models.add_argument("--clip", metavar="FILE", nargs="+", help="its text encoder, or two")
    models.add_argument("--clip-type", metavar="TYPE", help="the type in ComfyUI's CLIP loader, such as flux")
    models.add_argument("--vae", metavar="FILE", help="its VAE")
    models.add_argument("--weight-dtype", metavar="DTYPE", help="as in Load Diffusion Model, such as fp8_e4m3fn")
    models.add_argument("--clip-vision", metavar="FILE", help="scores the pictures of each validation, for keep")
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("--image", metavar="FILE", nargs="+", help="the picture of the subject, or several")
    inputs.add_argument("--mask", metavar="FILE", nargs="+", help="white where the subject is; one for all or one each")
    inputs.add_argument("--class-word", metavar="WORD", help="what the picture shows, such as dog")
    inputs.add_argument("--token", metavar="WORD", help="a rare word for the subject (default: sks)")
    inputs.add_argument(
        "--validation-prompt", metavar="TEXT", action="append", help="draw this during training; may be repeated"
    )
    inputs.add_argument("--prior-images", metavar="FILE", nargs="+", help="pictures of the class, for prior_weight")
    inputs.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="any other input of Train T-LoRA from Image or T-LoRA Training Options, such as rank=32",
    )
    inputs.add_argument(
        "--from-reference", metavar="LINE", help="take all this from a command line of the paper's authors' code"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--out", metavar="FOLDER", help="copy the T-LoRA, the pictures and the loss curve there")
    results.add_argument("--json", action="store_true", help="print the result as one JSON object")
    results.add_argument("--verbose", action="store_true", help="show ComfyUI's log, and tracebacks")


def job_of(args: argparse.Namespace) -> dict[str, Any]:
    """The job for trainlib/job.py, as JSON values. Raises WrongArguments."""
    job: dict[str, Any] = {"parts": {}, "files": {}, "inputs": {}, "notes": [], "environment": {}, "out": None}
    if args.from_reference is not None:
        job.update(reference.job_of(args.from_reference, args.model is not None or args.unet is not None))
    if args.unet is not None:
        job["parts"].pop("model", None)
    for kind, names in (("parts", PARTS), ("files", FILES), ("inputs", _INPUTS)):
        job[kind].update({name: getattr(args, name) for name in names if getattr(args, name) is not None})
    if args.validation_prompt:
        job["inputs"]["validation_prompts"] = "\n".join(args.validation_prompt)
    job["inputs"].update(map(_parted, args.set))
    if "class_word" not in job["inputs"]:
        raise WrongArguments("--class-word is missing; say what the picture shows, such as dog.")
    if not job["files"].get("image"):
        raise WrongArguments("--image is missing; give a picture of the subject.")
    if ("model" in job["parts"]) == ("unet" in job["parts"]):
        raise WrongArguments("Give either --model, or --unet with --clip, --clip-type and --vae.")
    return {**job, "out": args.out or job["out"], "json": args.json, "verbose": args.verbose}


def _parted(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise WrongArguments(f"--set needs NAME=VALUE, not '{text}'.")
    return name.strip(), value
