"""The MODEL that the host has loaded, made fit for training without a second copy of its weights."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeGuard

import comfy.model_management
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ....layers.checkpointing import Checkpointed
from ....layers.overlay import is_replaced, replaced_forward
from ....layers.protected import Protected
from ....layers.trained import Frozen
from ..model.attention import pytorch_attention
from ..model.bypasses import without_compiler
from ..model.internals import RESIDENT
from ..model.layers import fetched, forget_modules, is_cast, is_quantized
from .kernels import make_kernels_differentiable


@contextmanager
def training_session(model: ModelPatcher, checkpointing: bool = False, room: int | None = None, protected: bool = True):
    """The model loaded and fit for autograd; leaves its weights bit-identical, whatever happens inside.

    Nodes run in inference mode, whose tensors autograd refuses. The weights are wrapped anew around the same
    storage: no copy, and they stay valid for later sampling. A compiled model runs uncompiled, because each step has
    forwards and ranks of its own, and would be compiled anew. The host's own compiler is off for the same reason.

    checkpointing: see `checkpointed`. room: bytes on the device to leave for everything but the weights. The weights
        that do not fit beside it stay in RAM, and the host streams them to the device at each use, in the forward and
        again in the backward pass. None loads the model in full.
    protected: whether blocks that overwrite what autograd has saved are found and protected; see `layers.protected`.
    """
    was_training = getattr(comfy.model_management, "in_training", False)
    make_kernels_differentiable()
    with torch.inference_mode(False), torch.enable_grad(), _uncompiled(), without_compiler(), pytorch_attention():
        comfy.model_management.load_models_gpu(
            [model], memory_required=1e20 if room is None else room, force_full_load=room is None
        )
        network = model.model.diffusion_model
        forget_modules(model)
        for module in network.modules():
            _leave_inference_mode(module)
        try:
            comfy.model_management.in_training = (
                True  # lets the host take differentiable paths where it has faster ones
            )
            with replaced_forward() as replace:
                _freeze(network, replace)
                if protected:
                    _protect(network, replace)
                if checkpointing:
                    _checkpoint(network, replace)
                yield
        finally:
            comfy.model_management.in_training = was_training
            _move_off(model)
            forget_modules(model)
            comfy.model_management.soft_empty_cache()


def _uncompiled() -> AbstractContextManager:
    """Within the block no torch.compile takes effect, whichever node has applied it."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _move_off(model: ModelPatcher) -> None:
    """What wrappers on the model, such as a T-LoRA that was trained on top of, have put on the device; the host does it
    after a sampling."""
    for wrapper in (w for keyed in model.wrappers.values() for each in keyed.values() for w in each):
        if hasattr(wrapper, "to"):
            wrapper.to(torch.device("cpu"))


@contextmanager
def checkpointed(model: ModelPatcher):
    """Within a training session: each block is computed again in the backward pass instead of being kept, for a third
    more time and a fraction of the memory."""
    with replaced_forward() as replace:
        _checkpoint(model.model.diffusion_model, replace)
        yield


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusion model runs one after the other."""
    network = getattr(network, "_orig_mod", network)
    if isinstance(network, UNetModel):  # which does not call the elements of its lists
        return [m for m in network.modules() if isinstance(m, ResBlock | BasicTransformerBlock)]
    return list(_elements_of_lists(network))


def _elements_of_lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _elements_of_lists(child)


Replace = Callable[[nn.Module, Callable], None]


def _freeze(network: nn.Module, replace: Replace) -> None:
    for module in network.modules():
        if is_replaced(module) or getattr(module, "weight", None) is None or not hasattr(module, "comfy_cast_weights"):
            continue
        if isinstance(module, nn.Linear) or is_cast(module):
            replace(module, Frozen(module, fetched if is_cast(module) else None).forward)


def _protect(network: nn.Module, replace: Replace) -> None:
    for block in blocks(network):
        replace(block, Protected(block).forward)


def _checkpoint(network: nn.Module, replace: Replace) -> None:
    for block in blocks(network):
        replace(block, Checkpointed(block).forward)


def _leave_inference_mode(module: nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if _is_of_inference(parameter):
            fresh = module._parameters[name] = nn.Parameter(_same_storage(parameter), requires_grad=False)
            # The host's notes on it, for example the dtype that it moves the weight in.
            vars(fresh).update(vars(parameter))
    for name, buffer in module._buffers.items():
        if _is_of_inference(buffer):
            module._buffers[name] = _same_storage(buffer)
    for name in RESIDENT:
        if _is_of_inference(vars(module).get(name)):
            setattr(module, name, _same_storage(vars(module)[name]))
    # Of a LoRA that the host adds beside the layer (its bypass LoRA).
    lora = getattr(getattr(vars(module).get("forward"), "__self__", None), "adapter", None)
    if lora is not None and isinstance(weights := getattr(lora, "weights", None), tuple | list):
        lora.weights = type(weights)(
            _same_storage(w) if isinstance(w, Tensor) and w.is_inference() else w for w in weights
        )


def _is_of_inference(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether it must be wrapped anew. Classes of tensors that other node packs define, for example for GGUF files, are
    left alone: only their pack knows what belongs to them. Their layers fetch a plain weight; see `fetched`."""
    if tensor is None or not tensor.is_inference():
        return False
    return type(tensor) in (Tensor, nn.Parameter) or is_quantized(tensor)


def _same_storage(tensor: Tensor) -> Tensor:
    if is_quantized(tensor):
        data = tensor.data  # held: it is made anew at each call, and the marks of its parts with it
        names, rest = data.__tensor_flatten__()
        inner = {name: _same_storage(getattr(data, name)) for name in names}
        return QuantizedTensor.__tensor_unflatten__(inner, rest, tensor.size(), tensor.stride())
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
