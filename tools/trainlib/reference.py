"""Reads a training command line of the paper's authors' code, ControlGenAI/T-LoRA: its train.py (SDXL) or flux/run.py.

docs/REFERENCE_COMMANDS.md explains the table to users. Every option of a line is taken over, or named in a note where
it has no counterpart and does not change what is learnt, or refused.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hostlib.errors import WrongArguments

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# A backslash at the end of a line, before which the README of that code has comments that no shell would accept.
_CONTINUED = re.compile(r"\\[ \t]*(?:#[^\n]*)?(?:\n|$)")
_EXPORTED = re.compile(r"""^[ \t]*export[ \t]+(\w+)=(["']?)(.*?)\2[ \t]*$""", re.MULTILINE)
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_METHODS = {
    ("lora", "sdxl_lora"): "lora",
    ("lora", "sdxl_tlora"): "vanilla_tlora",
    ("ortho_lora", "sdxl_lora"): "ortho_lora",
    ("ortho_lora", "sdxl_tlora"): "tlora",
    ("lortho_lora", "sdxl_lora"): "ortho_lora",
    ("lortho_lora", "sdxl_tlora"): "tlora",
}
_STARTS = {  # of trainer_type and sig_type
    ("ortho_lora", "last"): "last_random_published",
    ("ortho_lora", "middle"): "middle_random",
    ("ortho_lora", "principal"): "principal_random",
    ("lortho_lora", "last"): "last_weight",
    ("lortho_lora", "middle"): "middle_weight",
    ("lortho_lora", "principal"): "principal_weight",
}
_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
_ADAMW_RATE = 1e-3  # flux/run.py gives its AdamW no rate, so that it has PyTorch's default
_DENSITIES = {"none": "uniform", "logit_normal": "logit_normal", "mode": "mode"}


class Option(NamedTuple):
    """default: of that code; its type is the option's. required: that code demands it. only: a value other than the
    default is refused. unused: why it has no counterpart; given, it is noted. choices: that it accepts."""

    default: Any
    required: bool = False
    only: bool = False
    unused: str = ""
    choices: tuple[str, ...] | None = None


_PRECISION = Option("no", unused="ComfyUI chooses the precision for the model and the card")
_REVISION = Option("", unused="the model file has one")
_WORKERS = Option(0, unused="pictures are encoded once, before the first step")
_ALWAYS = Option("", required=True)
SDXL = {
    "trainer_type": Option("", required=True, choices=("lora", "ortho_lora", "lortho_lora")),
    "trainer_class": Option("", required=True, choices=("sdxl_lora", "sdxl_tlora")),
    "project_name": Option("tlora", unused="the project is t-lora"),
    "wandb_api_key": Option(""),
    "seed": Option(0),
    "pretrained_model_name_or_path": Option("stabilityai/stable-diffusion-xl-base-1.0"),
    "mixed_precision": _PRECISION,
    "revision": _REVISION,
    "num_train_epochs": Option(1000),
    "checkpointing_steps": Option(200),
    "train_data_dir": _ALWAYS,
    "train_batch_size": Option(1),
    "dataloader_num_workers": _WORKERS,
    "resolution": Option(1024),
    "output_dir": _ALWAYS,
    "class_data_dir": Option(""),
    "prior_loss_weight": Option(1.0),
    "with_prior_preservation": Option(False),
    "class_name": _ALWAYS,
    "placeholder_token": _ALWAYS,
    "validation_prompts": Option(""),
    "num_val_imgs_per_prompt": Option(5, unused="one picture of each prompt is drawn"),
    "lora_rank": Option(4),
    "min_rank": Option(1),
    "sig_type": Option("last", choices=("principal", "last", "middle")),
    "alpha_rank_scale": Option(1.0),
    "learning_rate": Option(1e-4),
    "adam_beta1": Option(0.9),
    "adam_beta2": Option(0.999),
    "adam_weight_decay": Option(1e-4),
    "adam_epsilon": Option(1e-8, only=True),
    "one_image": Option(""),
}
_TEXT_ENCODERS = "text encoders are not trained, there neither"
FLUX = {
    "pretrained_model_name_or_path": _ALWAYS,
    "instance_data_dir": _ALWAYS,
    "mask_dir": Option(""),
    "output_dir": _ALWAYS,
    "placeholder_token": Option("sks"),
    "tlora": Option(False),
    "rank": Option(16),
    "min_rank": Option(16),
    "revision": _REVISION,
    "variant": _REVISION,
    "repeats": Option(1, unused="each step draws a picture anyway"),
    "max_sequence_length": Option(512, unused="ComfyUI's text encoder decides the length"),
    "seed": Option(0),
    "resolution": Option(1024),
    "one_image": Option(""),
    "train_batch_size": Option(1),
    "num_train_epochs": Option(1, unused="max_train_steps decides, there too"),
    "max_train_steps": Option(1000),
    "checkpointing_steps": Option(100),
    "gradient_accumulation_steps": Option(1),
    "gradient_checkpointing": Option(False),
    "learning_rate": Option(1.0),
    "guidance_scale": Option(1.0, only=True),
    "text_encoder_lr": Option(5e-6, unused=_TEXT_ENCODERS),
    "scale_lr": Option(False, only=True),
    "lr_scheduler": Option("constant", choices=_SCHEDULES),
    "lr_warmup_steps": Option(0),
    "lr_num_cycles": Option(1, only=True),
    "lr_power": Option(1.0, only=True),
    "dataloader_num_workers": _WORKERS,
    "weighting_scheme": Option("none", choices=tuple(_DENSITIES)),
    "logit_mean": Option(0.0, only=True),
    "logit_std": Option(1.0, only=True),
    "mode_scale": Option(1.29, only=True),
    "optimizer": Option("prodigy"),
    "use_8bit_adam": Option(False),
    "adam_beta1": Option(0.9),
    "adam_beta2": Option(0.999),
    "prodigy_beta3": Option("None", only=True),
    "prodigy_decouple": Option("True", only=True),
    "adam_weight_decay": Option(1e-4),
    "adam_weight_decay_text_encoder": Option(1e-3, unused=_TEXT_ENCODERS),
    "adam_epsilon": Option(1e-8, only=True),
    "prodigy_use_bias_correction": Option("True", only=True),
    "prodigy_safeguard_warmup": Option("True", only=True),
    "max_grad_norm": Option(1.0),
    "logging_dir": Option("logs", unused="the record is in the run's folder"),
    "allow_tf32": Option(False, unused="PyTorch and ComfyUI decide"),
    "cache_latents": Option(False, unused="latents are always cached, and drawn anew at each step, there too"),
    "report_to": Option("tensorboard", choices=("tensorboard", "wandb", "all")),
    "mixed_precision": _PRECISION._replace(default="bf16"),
    "upcast_before_saving": Option(False, unused="files are saved in float16"),
    "prior_generation_precision": Option("", unused="it draws no class pictures, there neither"),
    "validation_prompt": Option(
        "a {0} in the jungle in a outfit made of green leaves#a {0} riding a bike in a white t-shirt#a {0} in a purple "
        "wizzard outfit and a hat in a magic forest"
    ),
    "class_name": Option("", required=True),
    "local_rank": Option(-1, unused="one process trains"),
    "num_validation_images": Option(3, unused="one picture of each prompt is drawn"),
}
# Where the README of that code and its parser differ.
_ALIASES = {"instance_data_dir": ["--train_data_dir"]}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise WrongArguments(f"--from-reference: {message}.")


def job_of(line: str, has_model: bool) -> dict[str, Any]:
    """The job that a line asks for, as trainlib.arguments.job_of makes it. has_model: the model is given beside the
    line, and not taken from it. Raises WrongArguments, naming the option."""
    tokens = _tokens(line)
    if any(token.split("=")[0] in ("--prompts", "--config_path", "--exp") for token in tokens):
        raise WrongArguments(
            "--from-reference takes a line that trains, and this one draws; see docs/REFERENCE_COMMANDS.md."
        )
    is_sdxl = any(token.split("=")[0] in ("--trainer_type", "--trainer_class") for token in tokens)
    table = SDXL if is_sdxl else FLUX
    values, given = _parsed(tokens, table)
    for name, option in table.items():
        if option.only and values[name] != option.default:
            raise WrongArguments(
                f"--from-reference: {name} is {values[name]}, and only {option.default} is supported; leave it out."
            )
    job = _common(values, has_model)
    job["inputs"].update(_sdxl(values) if is_sdxl else _flux(values))
    if is_sdxl and values["with_prior_preservation"]:
        job["files"]["prior_images"] = _pictures("class_data_dir", values["class_data_dir"])
    if not is_sdxl and values["mask_dir"] not in ("", "None"):
        job["files"]["mask"] = _masks(values["mask_dir"], job["files"]["image"])
    # Where the service's package looks for it.
    environment = {"WANDB_API_KEY": values["wandb_api_key"]} if values.get("wandb_api_key") else {}
    return {**job, "notes": _notes(values, given, table), "environment": environment}


def _tokens(line: str) -> list[str]:
    """The options of a line, without what starts the program."""
    variables = {**os.environ, **{name: value for name, _, value in _EXPORTED.findall(line)}}
    whole = _VARIABLE.sub(lambda found: variables.get(found[1], found[0]), _CONTINUED.sub(" ", _EXPORTED.sub("", line)))
    try:
        tokens = [token for each in whole.splitlines() for token in _without_comment(shlex.split(each), each)]
    except ValueError as error:
        raise WrongArguments(f"--from-reference cannot be read: {error}.") from error
    scripts = [index for index, token in enumerate(tokens) if token.endswith(".py")]
    return tokens[scripts[0] + 1 :] if scripts else tokens


def _without_comment(tokens: list[str], line: str) -> list[str]:
    """The tokens before a comment; within a word and in quotes, # is a letter like others."""
    for index, token in enumerate(tokens):
        if token.startswith("#") and not any(quote + token in line for quote in "\"'"):
            return tokens[:index]
    return tokens


def _parsed(tokens: list[str], table: Mapping[str, Option]) -> tuple[dict[str, Any], set[str]]:
    """The value of each option, and the names of those that were given."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, option in table.items():
        flags = [f"--{name}", *_ALIASES.get(name, [])]
        if option.default is False:
            parser.add_argument(*flags, dest=name, action="store_true")
        else:
            kind = type(option.default)
            parser.add_argument(*flags, dest=name, type=kind, required=option.required, choices=option.choices)
    found, unknown = parser.parse_known_args(tokens)
    if unknown:
        raise WrongArguments(f"--from-reference: unknown option {unknown[0]}.")
    given = vars(found)
    for name, value in given.items():
        if isinstance(value, str) and value.startswith("$"):
            raise WrongArguments(f"--from-reference: {name} is {value}, a variable that is not set.")
    return {name: given.get(name, option.default) for name, option in table.items()}, set(given)


def _common(values: Mapping[str, Any], has_model: bool) -> dict[str, Any]:
    model = values["pretrained_model_name_or_path"]
    if not has_model and not Path(model).expanduser().is_file():
        raise WrongArguments(
            f"--from-reference: pretrained_model_name_or_path is {model}; name the file of that model for ComfyUI with "
            "--model, or --unet, --clip, --clip-type and --vae."
        )
    prompts = values.get("validation_prompts", values.get("validation_prompt", ""))
    every = values["checkpointing_steps"]
    folder = "train_data_dir" if "train_data_dir" in values else "instance_data_dir"
    return {
        "parts": {} if has_model else {"model": model},
        "files": {"image": _pictures(folder, values[folder], values["one_image"])},
        "out": values["output_dir"],
        "inputs": {
            "token": values["placeholder_token"],
            "class_word": values["class_name"],
            "min_rank": values["min_rank"],
            "resolution": values["resolution"],
            "seed": values["seed"],
            "batch_size": values["train_batch_size"],
            "learning_rate": values["learning_rate"],
            "beta1": values["adam_beta1"],
            "beta2": values["adam_beta2"],
            "weight_decay": values["adam_weight_decay"],
            "checkpoint_every": every,
            "checkpoint_files": True,
            **_validation(prompts, every),
        },
    }


def _validation(prompts: str, every: int) -> dict[str, Any]:
    lines = [line.strip().replace("{0}", "{}") for line in prompts.split("#") if line.strip()]
    return {"validation_prompts": "\n".join(lines), "validate_every": every} if lines else {}


def _sdxl(values: Mapping[str, Any]) -> dict[str, Any]:
    kind = values["trainer_type"]
    inputs = {
        "method": _METHODS[kind, values["trainer_class"]],
        "rank": values["lora_rank"],
        "alpha": values["alpha_rank_scale"],
        "steps": values["num_train_epochs"],  # an epoch is one batch there
        "optimizer": "adamw",
        "wandb": bool(values["wandb_api_key"]),
    }
    if kind != "lora":
        inputs["start"] = _STARTS[kind, values["sig_type"]]
    if values["with_prior_preservation"]:
        inputs["prior_weight"] = values["prior_loss_weight"]
    return inputs


def _flux(values: Mapping[str, Any]) -> dict[str, Any]:
    schedule = values["lr_scheduler"]
    # constant ignores the warm-up there.
    warm = 0 if schedule == "constant" else values["lr_warmup_steps"]
    optimizer = _flux_optimizer(values)
    return {
        "learning_rate": values["learning_rate"] if optimizer == "prodigy" else _ADAMW_RATE,
        "method": "vanilla_tlora" if values["tlora"] else "lora",
        "rank": values["rank"],
        "steps": values["max_train_steps"],
        "gradient_accumulation": values["gradient_accumulation_steps"],
        "memory": "low" if values["gradient_checkpointing"] else "auto",
        "optimizer": optimizer,
        "lr_schedule": schedule.removesuffix("_with_warmup"),
        "warmup_steps": warm,
        "timestep_density": _DENSITIES[values["weighting_scheme"]],
        "max_grad_norm": values["max_grad_norm"],
        "wandb": values["report_to"] in ("wandb", "all"),
    }


def _flux_optimizer(values: Mapping[str, Any]) -> str:
    name = values["optimizer"].lower()
    if name not in ("prodigy", "adamw"):
        raise WrongArguments(f"--from-reference: optimizer is {values['optimizer']}; it is prodigy or AdamW there.")
    return "adamw8bit" if name == "adamw" and values["use_8bit_adam"] else name


def _pictures(option: str, folder: str, one: str = "") -> list[str]:
    """The pictures in a folder in the order of their names; only those whose name ends in `one`, if given."""
    path = Path(folder).expanduser()
    if not folder or not path.is_dir():
        raise WrongArguments(f"--from-reference: {option} is {folder or 'missing'}; give a folder of pictures.")
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in PICTURES and each.name.endswith(one))
    if not files:
        raise WrongArguments(f"--from-reference: {option} is {folder}, which holds no picture {one}".rstrip() + ".")
    return [str(each) for each in files]


def _masks(folder: str, images: list[str]) -> list[str]:
    """The mask of each picture: the file of the same name, whatever its ending."""
    by_stem = {Path(mask).stem: mask for mask in _pictures("mask_dir", folder)}
    missing = [image for image in images if Path(image).stem not in by_stem]
    if missing:
        raise WrongArguments(f"--from-reference: mask_dir is {folder}, which holds no mask for {missing[0]}.")
    return [by_stem[Path(image).stem] for image in images]


def _notes(values: Mapping[str, Any], given: set[str], table: Mapping[str, Option]) -> list[str]:
    """A sentence for each given option that has no counterpart."""
    unused = {name: option.unused for name, option in table.items() if option.unused and name in given}
    if not values.get("with_prior_preservation", True):
        for name in {"class_data_dir", "prior_loss_weight"} & given:
            unused[name] = "it needs with_prior_preservation, there too"
    if values.get("lr_scheduler") == "constant" and values["lr_warmup_steps"]:
        unused["lr_warmup_steps"] = "lr_scheduler constant has no warm-up, there neither"
    if values.get("optimizer", "").lower() == "prodigy" and values["use_8bit_adam"]:
        unused["use_8bit_adam"] = "optimizer is prodigy"
    if values.get("optimizer", "").lower() == "adamw" and "learning_rate" in given:
        unused["learning_rate"] = f"AdamW's is {_ADAMW_RATE:g} there, whatever is given"
    if values.get("trainer_type") == "lora" and "sig_type" in given:
        unused["sig_type"] = "trainer_type lora has a plain start, there too"
    return [f"Not used: {name} ({reason})." for name, reason in unused.items()]
