"""Maps a model in diffusers' layout to ComfyUI's: several modules of diffusers may be rows of one module of ComfyUI."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ...errors import TLoRAError
from ..layer_names import layer_of, plain_name
from .model_description import ModelDescription, model_of_shapes, names_of


class Rows(NamedTuple):
    """Rows start ... stop - 1 of a module of ComfyUI, which are a whole module of diffusers."""

    start: int
    stop: int
    module: str


def rows_by_path(shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[Rows]]:
    """ComfyUI's module path -> the modules of diffusers that make it up, in the order of their rows.

    shapes: (out_features, in_features) of diffusers' linear modules by name. Modules without a rule are skipped.
    Raises TLoRAError for a U-Net whose blocks the rules would number wrongly.
    """
    residual = sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.time_emb_proj", module)) for module in shapes)
    if residual not in (0, 2):
        raise TLoRAError(
            f"the U-Net has {residual} residual blocks a level, but SD1.5, SD2 and SDXL have 2; use one of these "
            "models."
        )
    numbered: dict[str, list[tuple[int, str]]] = {}
    for module in shapes:
        if place := layer_of(plain_name(module)):
            numbered.setdefault(place.path, []).append((place.part or 0, module))
    return {path: _stacked(sorted(modules), shapes) for path, modules in numbered.items() if _is_complete(modules)}


def overlap(rows: list[Rows], start: int, stop: int) -> list[tuple[Rows, slice, int]]:
    """The modules that hold rows start ... stop - 1 of a path: (module, slice of these rows, the module's first such
    row)."""
    return [
        (part, slice(max(part.start, start) - start, min(part.stop, stop) - start), max(start - part.start, 0))
        for part in rows
        if part.start < stop and start < part.stop
    ]


def describe_layout(
    rows: Mapping[str, list[Rows]], shapes: Mapping[str, tuple[int, int]], weight, device="cpu"
) -> ModelDescription:
    """The model whose modules have these shapes. rows: rows_by_path(shapes); weight, device: as in
    ModelDescription."""
    whole = {path: (parts[-1].stop, shapes[parts[0].module][1]) for path, parts in rows.items()}
    return ModelDescription(names_of(whole), whole, weight, *model_of_shapes(whole), device)


def _is_complete(modules: list[tuple[int, str]]) -> bool:
    return sorted(part for part, _ in modules) == list(range(len(modules)))


def _stacked(modules: list[tuple[int, str]], shapes: Mapping[str, tuple[int, int]]) -> list[Rows]:
    rows, start = [], 0
    for _, module in modules:
        stop = start + shapes[module][0]
        rows.append(Rows(start, stop, module))
        start = stop
    return rows
