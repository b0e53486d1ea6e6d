"""Hashes everything that a training run depends on, so that a finished run is found again and never repeated.

Pictures and masks are hashed completely. Of a weight only name, shape, dtype and a few values are hashed, because
hashing gigabytes would take as long as some training steps. A part of the graph that cannot be identified makes the
hash unique, so the run is never found.
"""

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, is_dataclass

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....training.dataset import TrainingImage
from ..model.layers import stored
from ..sampling import SamplingPatch
from .denoiser import training_options

WHOLE = 1 << 16  # a weight of at most so many elements is hashed completely
TAKEN = 64  # about so many elements of a larger one are hashed
_PLAIN = (str, int, float, bool, type(None))


# The version since which equal requests give equal results. Finished runs of the earlier ones are found as well; an
# unfinished one is not resumed.
RESULTS_OF, RESULTS_BEFORE = "0.2.0", ("0.1.0",)


@dataclass(frozen=True)
class AsTrained:
    """A model without the patches that act only while sampling, such as guidance: training does not depend on
    them."""

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
        _add(digest, ("tlora", value.strength, value.schedule, dict(value.layers)))
    elif isinstance(value, torch.nn.Module):
        # Some constants of a noise schedule are plain attributes.
        plain = {k: v for k, v in vars(value).items() if isinstance(v, _PLAIN)}
        _add(digest, (type(value).__mro__[1].__name__, plain, value.state_dict()))
    elif isinstance(value, TrainingImage):
        _add_tensor(digest, value.pixels, whole=True)
        _add(digest, value.caption)
        _add_tensor(digest, torch.empty(0) if value.mask is None else value.mask, whole=True)
    elif is_dataclass(value):
        _add(digest, {f.name: getattr(value, f.name) for f in fields(value) if not _is_as_before(value, f)})
    elif isinstance(value, Mapping):
        digest.update(f"{len(value)} pairs;".encode())
        for key in sorted(value, key=str):
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, list | tuple | set | frozenset):
        digest.update(f"{len(value)} items;".encode())
        for item in sorted(value, key=str) if isinstance(value, set | frozenset) else value:
            _add(digest, item)
    elif hasattr(value, "weights") and hasattr(value, "loaded_keys"):  # the host's weight adapters, such as LoRA
        _add(digest, (type(value).__name__, value.weights))
    else:
        _add_opaque(digest, value)


def _is_as_before(value, field: Field) -> bool:
    """Whether a dataclass has a field's default where versions before did not have the field."""
    return "added later" in field.metadata and getattr(value, field.name) == field.default


def _add_opaque(digest, value) -> None:
    """Makes the hash unique, unless value is None."""
    if value is not None:
        digest.update(uuid.uuid4().bytes)


def _add_tensor(digest, tensor: Tensor, whole: bool = False) -> None:
    digest.update(f"{list(tensor.shape)} {tensor.dtype};".encode())
    flat = tensor.detach().reshape(-1)
    if len(flat) > WHOLE and not whole:
        flat = flat[:: len(flat) // TAKEN | 1]  # an odd stride, so that it does not stay in one column
    digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _of_module(root: torch.nn.Module, key: str) -> Tensor | None:
    path, _, name = key.rpartition(".")
    try:
        return getattr(root.get_submodule(path), name, None)
    except AttributeError:
        return None


def _as_loaded(model, key, tensor):
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    return model.backup[key].weight if key in model.backup else tensor


def _add_patches(digest, patches) -> None:
    for strength, patch, strength_model, offset, _ in patches:
        # From a merging node: another model's weight with the host's way to read it, then that weight's patches.
        if isinstance(patch, list):
            (weight, _), *others = patch
            for part in stored(weight):
                _add(digest, part)
            _add_patches(digest, others)
            patch = "weight"
        _add(digest, (strength, patch, strength_model, offset))


def _add_model(digest, model: ModelPatcher, options: Mapping | None = None, transformer: Mapping | None = None) -> None:
    """Adds the weights as loaded, even while patches are written into them, and then the patches."""
    for key, tensor in model.model_state_dict().items():
        digest.update(key.encode())
        if tensor.is_meta:  # the layers of ComfyUI-GGUF give stand-ins, some of weights that do not exist
            tensor = _of_module(model.model, key)
        for part in () if tensor is None else stored(_as_loaded(model, key, tensor)):
            _add(digest, part)
        _add_patches(digest, model.patches.get(key, ()))
    if options is None or transformer is None:
        options = {k: v for k, v in model.model_options.items() if k != "transformer_options"}
        transformer = {**model.model_options.get("transformer_options", {}), "wrappers": model.wrappers}
    _add(digest, (options, {k: v for k, v in transformer.items() if v and k != "wrappers"}, model.object_patches))
    wrappers = [keyed for keyed in transformer["wrappers"].values() if keyed]
    _add(digest, [[w for ws in keyed.values() for w in ws if getattr(w, "changes_result", True)] for keyed in wrappers])
    # Hooks of a CLIP change its weights outside its patches.
    _add_opaque(digest, getattr(model, "forced_hooks", None))
    # These are opaque: only a bypass LoRA's functions hold its strength and file.
    _add(digest, [injection for injections in model.injections.values() for injection in injections])
