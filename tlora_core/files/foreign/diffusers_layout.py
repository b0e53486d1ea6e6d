"""A model in diffusers' layout, seen in ComfyUI's: what are modules of their own there may be rows of one module
here."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ...errors import TLoRAError
from ..layer_names import layer_of, plain_name
from .target import Target, model_of_shapes, names_of


class Rows(NamedTuple):
    """Rows start ... stop - 1 of a module of ComfyUI, which are the whole of one of diffusers'."""

    start: int
    stop: int
    module: str


def rows_by_path(shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[Rows]]:
    """ComfyUI's module path -> diffusers' modules that make it up, from its first row on.

    shapes: (out_features, in_features) of diffusers' linear modules by their name. Modules without a rule are left out.
    Raises TLoRAError for a U-Net whose blocks the rules would count wrongly.
    """
    residual = sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.time_emb_proj", module)) for module in shapes)
    if residual not in (0, 2):
        raise TLoRAError(
            f"the U-Net has {residual} residual blocks a level where SD1.5, SD2 and SDXL have 2; use a model of one "
            f"of these."
        )
    numbered: dict[str, list[tuple[int, str]]] = {}
    for module in shapes:
        if place := layer_of(plain_name(module)):
            numbered.setdefault(place.path, []).append((place.part or 0, module))
    return {path: _stacked(sorted(modules), shapes) for path, modules in numbered.items() if _is_complete(modules)}


def overlap(rows: list[Rows], start: int, stop: int) -> list[tuple[Rows, slice, int]]:
    """The modules that hold rows start ... stop - 1 of a path: (module, which of these rows, its own first row of
    them)."""
    return [
        (part, slice(max(part.start, start) - start, min(part.stop, stop) - start), max(start - part.start, 0))
        for part in rows
        if part.start < stop and start < part.stop
    ]


def target_of_layout(
    rows: Mapping[str, list[Rows]], shapes: Mapping[str, tuple[int, int]], weight, device="cpu"
) -> Target:
    """A Target. rows: of rows_by_path for shapes; weight, device: Target's."""
    whole = {path: (parts[-1].stop, shapes[parts[0].module][1]) for path, parts in rows.items()}
    return Target(names_of(whole), whole, weight, *model_of_shapes(whole), device)


def _is_complete(modules: list[tuple[int, str]]) -> bool:
    return sorted(part for part, _ in modules) == list(range(len(modules)))


def _stacked(modules: list[tuple[int, str]], shapes: Mapping[str, tuple[int, int]]) -> list[Rows]:
    rows, start = [], 0
    for _, module in modules:
        stop = start + shapes[module][0]
        rows.append(Rows(start, stop, module))
        start = stop
    return rows
