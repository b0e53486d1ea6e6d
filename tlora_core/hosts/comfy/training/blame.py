"""Says where a step failed: in which layer of the model, or in which function that a node has put on it."""

import sysconfig
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ....errors import TLoRAError
from ....layers.saving import saving
from ..model.layers import modules_by_path
from .denoiser import HostDenoiser
from .failure import failure_words, ran_out_of_memory

# Code in these folders is no patch: the host's models, torch and other packages, Python, this pack.
_OURS, _HOSTS = Path(__file__).parents[3], Path(comfy.model_management.__file__).parent
_NO_PATCHES = (str(_OURS), str(_HOSTS), sysconfig.get_path("stdlib"), str(Path(torch.__path__[0]).parent))
_PACKAGES = {"site-packages", "dist-packages"}
# By which our stand-ins, and the contexts of our backward passes, hold the layer or block that they stand for.
_HOLDING = ("layer", "frozen", "call", "block", "run", "__self__")
# torch's words
_OVERWRITTEN, _OF_INFERENCE = "modified by an inplace operation", "nference tensors cannot"
_OF_SHAPES = "shapes cannot be multiplied"


class Place(NamedTuple):
    """layer: the path of the innermost module that was running; "" for none. patch: the function of a node that the
    module, or the model, had called; "" for none."""

    layer: str
    patch: str


@contextmanager
def saying_what_failed(denoiser: HostDenoiser, step: Callable[[], int], checkpointing: bool = False):
    """Within the block, errors of the model name the layer or the patch that they come from. step: gives the number of
    the step that has failed."""
    try:
        yield
    except Exception as error:
        sentence = sentence_for(error, denoiser, step(), checkpointing)
        if sentence is None:
            raise
        raise sentence from error


def sentence_for(error: Exception, denoiser: HostDenoiser, step: int, checkpointing: bool) -> TLoRAError | None:
    """The error to raise instead of one that a step has raised: a sentence that names the layer or the patch. None if
    `error` says enough by itself, or does not come from the model. Call it before the step is forgotten."""
    if isinstance(error, TLoRAError | InterruptProcessingException) or ran_out_of_memory(error):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    if not any(frame.f_locals.get("self") is denoiser or frame.f_code is Tensor.backward.__code__ for frame in frames):
        return None
    words = failure_words(error)
    paths = {module: path for path, module in modules_by_path(denoiser.base.diffusion_model).items()}
    place = _place(frames, paths)
    if _OVERWRITTEN in words and not checkpointing:
        place = _overwriting(denoiser, paths) or place
    layer = f'"{place.layer}"' if place.layer else f"{type(denoiser.base.diffusion_model).__name__}"
    if place.patch or _OF_INFERENCE in words:
        patch = place.patch and f": {place.patch}, at the layer {layer}"
        return TLoRAError(
            f"model has a patch that cannot be trained through{patch} ({words}); connect the model from before the "
            "node that adds the patch, and put that node after Train."
        )
    check = "check that clip and vae belong to this model; " if _OF_SHAPES in words else ""
    if isinstance(error, ZeroDivisionError):  # PixArt divides by its size in steps of 64 cells
        check = "raise resolution; "
    return TLoRAError(
        f"model failed at the layer {layer} in step {step} ({words}); {check}if a node patches the model, connect the "
        "model from before it, otherwise report this with the log."
    )


def _place(frames: Iterable[FrameType], paths: dict[nn.Module, str]) -> Place:
    """The place of the innermost of `frames`, which begin with it, that belongs to a module or to a patch."""
    patch = ""
    for frame in frames:
        module = _module(frame.f_locals.get("self")) or _module(frame.f_locals.get("ctx"))
        if module in paths:
            return Place(paths[module], patch)
        if not patch and _is_patch(frame):
            patch = _named(frame)
    return Place("", patch)


def _module(holder: Any) -> nn.Module | None:
    """The module that an object is; or stands for, if it is one of ours or the context of a backward pass."""
    is_ours = type(holder).__module__.startswith(__name__.split(".hosts.")[0])
    if not (is_ours or isinstance(holder, nn.Module | FunctionCtx)):
        return None
    for _ in range(6):
        if holder is None or isinstance(holder, nn.Module):
            return holder
        holder = next((held for name in _HOLDING if (held := getattr(holder, name, None)) is not None), None)
    return None


def _is_patch(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith(("<", *_NO_PATCHES)) and not _PACKAGES & set(Path(file).parts)


def _named(frame: FrameType) -> str:
    """The function of a frame and its pack, or its module if it is in no pack."""
    parts, owner = Path(frame.f_code.co_filename).parts, frame.f_locals.get("self")
    function = frame.f_code.co_name if owner is None else f"{type(owner).__name__}.{frame.f_code.co_name}"
    pack = parts[parts.index("custom_nodes") + 1 :] if "custom_nodes" in parts else ()
    return f'"{function}" of {pack[0].removesuffix(".py") if pack else frame.f_globals.get("__name__", parts[-1])}'


class _Writes(TorchDispatchMode):
    """Notes where memory was last written to in place."""

    def __init__(self, paths: dict[nn.Module, str]):
        super().__init__()
        self.paths = paths
        self.places: dict[int, Place] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            place = _place((frame for frame, _ in traceback.walk_stack(None)), self.paths)
            written = [a for a, given in zip(args, func._schema.arguments) if given.alias_info]
            for tensor in (t for t in tree_leaves(written) if isinstance(t, Tensor)):
                self.places[tensor.untyped_storage()._cdata] = place
        return func(*args, **(kwargs or {}))


def _overwriting(denoiser: HostDenoiser, paths: dict[nn.Module, str]) -> Place | None:
    """Where an evaluation of the model overwrites something that its backward pass needs, found by making one. None if
    it does not, or the evaluation fails."""
    kept: list[tuple[Tensor, int]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor._version))
        return tensor

    writes = _Writes(paths)
    try:
        with saving(keep), writes:
            outputs = list(denoiser.losses([0], torch.Generator().manual_seed(0)))
        del outputs
    except Exception:
        return None
    changed = (tensor.untyped_storage()._cdata for tensor, version in kept if tensor._version != version)
    return next((writes.places[storage] for storage in changed if storage in writes.places), None)
