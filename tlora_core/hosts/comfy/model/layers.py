"""The linear layers of a model that the host has loaded, by module path."""

import re
from collections.abc import Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.ops
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ....files.layer_fit import check_fit
from ....files.tlora_file import TLoRAFile
from .internals import has_compile_wrapper, is_resident

# Model -> its modules, by weak references, as the model is one of them.
_modules: WeakKeyDictionary = WeakKeyDictionary()
# Cross-attention's keys and values in U-Nets: their input is the text, the same at every step.
TEXT_LAYER = re.compile(r"attn2\.to_[kv]$")
_COMPILED = "_orig_mod"  # attribute of torch.compile's wrapper for the wrapped module


def modules_by_path(diffusion_model: nn.Module) -> dict[str, nn.Module]:
    """The model's current modules by path, without torch.compile's wrappers of the whole model or its blocks."""
    model = getattr(diffusion_model, _COMPILED, diffusion_model)
    return {path.replace(f"{_COMPILED}.", ""): module for path, module in model.named_modules()}


def diffusion_modules(diffusion_model: nn.Module) -> Mapping[str, nn.Module]:
    """`modules_by_path`, cached for a sampling or training instead of searched at every evaluation."""
    model = getattr(diffusion_model, _COMPILED, diffusion_model)
    if model not in _modules:
        _modules[model] = WeakValueDictionary(modules_by_path(model))
    return _modules[model]


def forget_modules(patcher: ModelPatcher) -> None:
    """Clears the cache. Call it before and after each sampling and training, as nodes may replace modules in
    between."""
    model = patcher.model.diffusion_model
    _modules.pop(getattr(model, _COMPILED, model), None)


def is_compiled(base, patcher: ModelPatcher) -> bool:
    """Whether torch.compile wraps the model or one of its blocks, outside or inside the T-LoRA's wrapper."""
    modules = diffusion_modules(base.diffusion_model).values()
    return (
        has_compile_wrapper(patcher)
        or hasattr(base.diffusion_model, _COMPILED)
        or any(hasattr(m, _COMPILED) or m._compiled_call_impl is not None for m in modules)
    )


def is_linear(module: nn.Module | None) -> bool:
    """Whether it is a linear layer; the host's quantised layers are not torch.nn.Linear but count too."""
    return isinstance(module, nn.Linear) or all(
        hasattr(module, name) for name in ("in_features", "out_features", "weight")
    )


def is_cast(module: nn.Module) -> bool:
    """Whether the host computes or moves the layer's weight anew for each use."""
    weight = module.weight
    return bool(
        getattr(module, "comfy_cast_weights", False)
        or getattr(module, "weight_function", ())
        or getattr(module, "bias_function", ())
        or is_resident(module)
        or (type(weight) is not nn.Parameter and isinstance(weight.data, QuantizedTensor))
    )


def is_quantized(tensor: Tensor) -> bool:
    """Whether it is of the host's class for quantised weights."""
    return isinstance(tensor.data, QuantizedTensor)


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that store a weight: the weight itself, the parts of a quantised weight, or the packed bytes of
    a weight whose class another node pack defines."""
    data = tensor.data  # kept in a variable, as a quantised tensor creates it and its parts anew at each access
    if isinstance(data, QuantizedTensor):
        return [getattr(data, name) for name in data.__tensor_flatten__()[0]]
    return [tensor if type(data) is Tensor else data.as_subclass(Tensor)]


@contextmanager
def fetched(layer: nn.Module, like: Tensor):
    """The layer's weight and bias in the host's current form, in the dtype and on the device of `like`. The host may
    overwrite them after the block.

    A layer with a `cast_bias_weight` of its own is asked instead of the host: only its pack can unpack the weight. The
    layers of ComfyUI-GGUF have one.
    """
    of_layer = getattr(layer, "cast_bias_weight", None)
    if of_layer is not None:
        yield of_layer(like)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(
        layer, dtype=like.dtype, device=like.device, bias_dtype=like.dtype, offloadable=True
    )
    try:
        yield weight.dequantize() if isinstance(weight, QuantizedTensor) else weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Whether the host decides at each use of a weight where it is: its dynamic VRAM, the default on most cards."""
    return getattr(patcher, "is_dynamic", bool)()


def bytes_to_come(patcher: ModelPatcher) -> int:
    """Bytes of the model's weights that are not on its device yet; the host may move them there only when used."""
    return max(0, patcher.model_size() - patcher.loaded_size())


def linear_modules(model: ModelPatcher) -> dict[str, nn.Module]:
    """The linear modules of the diffusion model by path, the host's quantised ones among them."""
    return {path: module for path, module in modules_by_path(model.model.diffusion_model).items() if is_linear(module)}


def check_layers(model: ModelPatcher, tlora: TLoRAFile) -> None:
    """Raises TLoRAError when one of the T-LoRA's layers is missing in the model or has another shape there."""
    check_fit(tlora, {path: (m.out_features, m.in_features) for path, m in linear_modules(model).items()})
