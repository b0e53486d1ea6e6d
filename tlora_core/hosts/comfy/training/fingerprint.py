"""What a training run depends on, as one hash, so that a finished run is found again and never made twice.

Pictures and their masks are hashed whole. Weights are told apart by their names, shapes, dtypes and a few values of
each, which takes a moment where hashing gigabytes would take as long as training some steps. Something in a graph that
cannot be told apart makes the hash one of a kind.
"""

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....training.dataset import TrainingImage
from ..model.layers import stored
from ..sampling import SamplingPatch
from .denoiser import training_options

# The pack's version since which equal requests give equal results. Raise it when they no longer do: no run and no class
# picture of an earlier version is found after that.
RESULTS_OF = "0.1.0"
WHOLE = 1 << 16  # elements up to which a weight is hashed whole
TAKEN = 64  # elements taken of a larger one
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class AsTrained:
    """Stands for a model without what acts only while sampling, such as a node's guidance: no training depends on
    it."""

    model: ModelPatcher


def fingerprint(*parts) -> str:
    """A hex hash of plain values, tensors, dataclasses, containers, ModelPatchers and modules, in any nesting."""
    digest = hashlib.sha256()
    for part in parts:
        _add(digest, part)
    return digest.hexdigest()


def _add(digest, value) -> None:
    if isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, _PLAIN):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, torch.dtype | torch.device | type):
        digest.update(f"{value};".encode())
    elif isinstance(value, ModelPatcher):
        _add_model(digest, value)
    elif isinstance(value, AsTrained):
        _add_model(digest, value.model, {}, training_options(value.model))
    elif isinstance(value, SamplingPatch):
        _add(digest, ("tlora", value.adapters.strength, value.schedule, dict(value.adapters.layers)))
    elif isinstance(value, torch.nn.Module):
        # The constants of a noise schedule are partly plain attributes.
        plain = {k: v for k, v in vars(value).items() if isinstance(v, _PLAIN)}
        _add(digest, (type(value).__mro__[1].__name__, plain, value.state_dict()))
    elif isinstance(value, TrainingImage):
        _add_tensor(digest, value.pixels, whole=True)
        _add(digest, value.caption)
        _add_tensor(digest, torch.empty(0) if value.mask is None else value.mask, whole=True)
    elif is_dataclass(value):
        _add(digest, {field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, Mapping):
        digest.update(f"{len(value)} pairs;".encode())
        for key in sorted(value, key=str):
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, list | tuple | set | frozenset):
        digest.update(f"{len(value)} items;".encode())
        for item in sorted(value, key=str) if isinstance(value, set | frozenset) else value:
            _add(digest, item)
    elif hasattr(value, "weights") and hasattr(value, "loaded_keys"):  # the host's weight adapters: LoRA and its like
        _add(digest, (type(value).__name__, value.weights))
    else:
        digest.update(uuid.uuid4().bytes)


def _add_tensor(digest, tensor: Tensor, whole: bool = False) -> None:
    digest.update(f"{list(tensor.shape)} {tensor.dtype};".encode())
    flat = tensor.detach().reshape(-1)
    if len(flat) > WHOLE and not whole:
        flat = flat[:: len(flat) // TAKEN | 1]  # odd, not to go down a single column
    digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _as_loaded(model, key, tensor):
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    return model.backup[key].weight if key in model.backup else tensor


def _add_patches(digest, patches) -> None:
    for strength, patch, strength_model, offset, _ in patches:
        if isinstance(
            patch, list
        ):  # another model's weight, as merging nodes give it, with how the host reads it; and that one's patches
            (weight, _), *others = patch
            for part in stored(weight):
                _add(digest, part)
            _add_patches(digest, others)
            patch = "weight"
        _add(digest, (strength, patch, strength_model, offset))


def _add_model(digest, model: ModelPatcher, options: Mapping | None = None, transformer: Mapping | None = None) -> None:
    """Weights as they were loaded, even where patches are written into them just now, and what is patched."""
    for key, tensor in model.model_state_dict().items():
        digest.update(key.encode())
        for part in stored(_as_loaded(model, key, tensor)):
            _add(digest, part)
        _add_patches(digest, model.patches.get(key, ()))
    if options is None or transformer is None:
        options = {k: v for k, v in model.model_options.items() if k != "transformer_options"}
        transformer = {**model.model_options.get("transformer_options", {}), "wrappers": model.wrappers}
    _add(digest, (options, {k: v for k, v in transformer.items() if v and k != "wrappers"}, model.object_patches))
    wrappers = [keyed for keyed in transformer["wrappers"].values() if keyed]
    _add(digest, [[w for ws in keyed.values() for w in ws if getattr(w, "changes_result", True)] for keyed in wrappers])
    # Which nobody can look into: a bypass LoRA's strength and file are in no place but its functions.
    _add(digest, [injection for injections in model.injections.values() for injection in injections])
