"""Checks a node's inputs before the graph runs. If one is wrong, the page marks it and nothing runs."""

import os
from collections.abc import Mapping
from typing import Any

from ....errors import TLoRAError
from ..files import new_lora_path
from .personalize import TrainRequest
from .run import Keeping

AUTO = "auto"


def given(value: Any) -> Any:
    """The value of an input as the host passes it to validate_inputs, alone or in a list of one. None if it comes from
    another node."""
    return (value[0] if value else None) if isinstance(value, list | tuple) else value


def wrong_file_name(file_name: Any) -> str | None:
    """The error sentence about an unusable file_name, or None."""
    name = given(file_name)
    if name is None:
        return None
    try:
        folder = new_lora_path(name).parent
    except TLoRAError as error:
        return str(error)
    if not os.access(folder, os.W_OK):
        return f'file_name is "{name}", but "{folder.name}" in the loras folder is not writable; choose another folder.'
    return None


def wrong_training(inputs: Mapping[str, Any], has_clip_vision: bool = False) -> str | None:
    """The error sentence about the first wrong input of the Train node, or None.

    inputs: token, class_word, method, rank, min_rank, curve, file_name, validation_prompts, validate_every, scorer,
    keep, patience, score_seeds; an input that is None is not known yet and is checked by the run. has_clip_vision:
    whether clip_vision is connected.
    """
    known = {name: given(value) for name, value in inputs.items()}
    try:
        _check_request(known)
        keeping = {name: known[name] for name in ("validate_every", "scorer", "keep", "patience", "score_seeds")}
        if known["validation_prompts"] is not None and None not in keeping.values():
            prompts = tuple(line for line in known["validation_prompts"].splitlines() if line.strip())
            Keeping(validation_prompts=prompts, clip_vision=has_clip_vision or None, **keeping)
    except TLoRAError as error:
        return str(error)
    return wrong_file_name(known["file_name"])


def _check_request(known: Mapping[str, Any]) -> None:
    """Raises TLoRAError as a TrainRequest of these values would."""
    fields = {name: "known later" if known[name] is None else known[name] for name in ("token", "class_word")}
    deciding = {name: known[name] for name in ("method", "rank", "min_rank", "curve")}
    if None in deciding.values():
        deciding = {"method": AUTO, "rank": 1, "min_rank": 1}
    if deciding["method"] == AUTO:
        deciding["method"] = "tlora"  # a method with a mask, as the models' defaults are
    TrainRequest(**fields, **deciding)
