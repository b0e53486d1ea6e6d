"""The MODEL that the host has loaded, made fit for training without a second copy of its weights."""
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor


@contextmanager
def training_session(model: ModelPatcher):
    """The model loaded in full and fit for autograd; leaves its weights bit-identical, whatever happens inside.

    Nodes run in inference mode, whose tensors autograd refuses. The weights are wrapped anew around the same
    storage: no copy, and they stay valid for later sampling.
    """
    was_training = comfy.model_management.in_training
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.load_models_gpu([model], memory_required=1e20, force_full_load=True)
        for module in model.model.diffusion_model.modules():
            _leave_inference_mode(module)
        try:
            comfy.model_management.in_training = True  # lets the host take differentiable paths where it has faster ones
            yield
        finally:
            comfy.model_management.in_training = was_training
            comfy.model_management.soft_empty_cache()


def _leave_inference_mode(module: torch.nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_inference():
            module._parameters[name] = torch.nn.Parameter(_same_storage(parameter), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_inference():
            module._buffers[name] = _same_storage(buffer)


def _same_storage(tensor: Tensor) -> Tensor:
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
