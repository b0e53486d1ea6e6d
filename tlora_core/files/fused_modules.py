"""Modules that hold several layers of a T-LoRA: how many rows they have, and the layers joined to one of the whole
module."""

from collections.abc import Mapping

import torch

from ..errors import TLoRAError
from ..method.adapters import LowRank
from ..method.layer_name import LayerName

Layers = Mapping[LayerName, LowRank]

# The rows of the first module in FLUX's single blocks, in widths of its input: query, key, value and the feed-forward,
# which is twice as wide in FLUX.2.
_LINEAR1, _LINEAR1_OF_FLUX2 = 3 + 4, 3 + 6


def joined(layers: Layers, base_model: str, heights: Mapping[str, int]) -> dict[str, LowRank]:
    """Layers by module path; the parts of a module are joined into one update of the whole module.

    heights: rows of modules, where known; see `height`. Raises TLoRAError for a module whose rows are not known.
    """
    return {
        path: parts[LayerName(path)] if list(parts) == [path] else _joined(path, parts, base_model, heights)
        for path, parts in _by_module(layers).items()
    }


def can_join(layers: Layers, base_model: str, heights: Mapping[str, int]) -> bool:
    """Whether `joined` knows the rows of all modules."""
    return all(
        list(parts) == [path] or height(path, parts, base_model, heights) is not None
        for path, parts in _by_module(layers).items()
    )


def height(path: str, parts: Layers, base_model: str, heights: Mapping[str, int]) -> int | None:
    """Rows of the module at `path`, of which `parts` has some; None if they are not known. Files say it in their
    `heights`; where an earlier version wrote them, the module's name may tell what it holds."""
    found = heights.get(path) or _of_name(path, parts, base_model)
    return found if found and all(name.row + layer.up.shape[0] <= found for name, layer in parts.items()) else None


def _by_module(layers: Layers) -> dict[str, dict[LayerName, LowRank]]:
    modules: dict[str, dict[LayerName, LowRank]] = {}
    for name, layer in layers.items():
        modules.setdefault(name.path, {})[name] = layer
    return modules


def _of_name(path: str, parts: Layers, base_model: str) -> int | None:
    kind, width = path.rpartition(".")[2].lower(), next(iter(parts.values())).down.shape[1]
    if kind == "linear1":
        return (_LINEAR1_OF_FLUX2 if base_model.startswith("flux2") else _LINEAR1) * width
    count = 3 if "qkv" in kind else 2 if "kv" in kind else 0
    if count and len(parts) == count:
        # They may differ in height: keys and values may have fewer heads than queries.
        return max(name.row + layer.up.shape[0] for name, layer in parts.items())
    if count == 3 and all(layer.up.shape[0] == width for layer in parts.values()):
        return 3 * width
    return None


def _joined(path: str, parts: Layers, base_model: str, heights: Mapping[str, int]) -> LowRank:
    rows = height(path, parts, base_model, heights)
    if rows is None:
        raise TLoRAError(
            f'The size of the module "{path}" is not in the file, and its parts cannot be exported without it; use the '
            "T-LoRA with Apply T-LoRA, or train it again with this version."
        )
    up, column = torch.zeros(rows, sum(layer.up.shape[1] for layer in parts.values())), 0
    for name, layer in parts.items():
        count, columns = layer.up.shape
        up[name.row : name.row + count, column : column + columns] = layer.up
        column += columns
    return LowRank(up, torch.cat([layer.down.float() for layer in parts.values()]))
