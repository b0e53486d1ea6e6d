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

_modules: WeakKeyDictionary = WeakKeyDictionary()  # model -> its modules, weakly too, as the model is one of them
TEXT_LAYER = re.compile(
    r"attn2\.to_[kv]$"
)  # cross-attention's keys and values in U-Nets: their input is the text, the same at every step
_COMPILED = "_orig_mod"  # where torch.compile's wrapper keeps the module that it wraps


def modules_by_path(diffusion_model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules as they are now. Sees through torch.compile's wrappers, of the whole model or of its
    blocks."""
    model = getattr(diffusion_model, _COMPILED, diffusion_model)
    return {path.replace(f"{_COMPILED}.", ""): module for path, module in model.named_modules()}


def diffusion_modules(diffusion_model: nn.Module) -> Mapping[str, nn.Module]:
    """`modules_by_path`, looked up once a sampling or training: not at every evaluation."""
    model = getattr(diffusion_model, _COMPILED, diffusion_model)
    if model not in _modules:
        _modules[model] = WeakValueDictionary(modules_by_path(model))
    return _modules[model]


def forget_modules(patcher: ModelPatcher) -> None:
    """To be called before and after each sampling and training, as nodes may put other modules into the model in
    between."""
    model = patcher.model.diffusion_model
    _modules.pop(getattr(model, _COMPILED, model), None)


def is_compiled(base, patcher: ModelPatcher) -> bool:
    """Whether torch.compile has a hand in the model or one of its blocks, be it outside or inside the T-LoRA's
    wrapper."""
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

    modules = diffusion_modules(base.diffusion_model).values()
    return (
        bool(patcher.get_wrappers("apply_model", COMPILE_KEY))
        or hasattr(base.diffusion_model, _COMPILED)
        or any(hasattr(m, _COMPILED) or m._compiled_call_impl is not None for m in modules)
    )


def is_linear(module: nn.Module | None) -> bool:
    """Also of the host's quantised layers, which are no torch.nn.Linear."""
    return isinstance(module, nn.Linear) or all(
        hasattr(module, name) for name in ("in_features", "out_features", "weight")
    )


def is_cast(module: nn.Module) -> bool:
    """Whether the host makes the weight that is used from another each time, or moves it in just for that."""
    marks = ("comfy_cast_weights", "weight_function", "bias_function")
    return (
        any(getattr(module, mark, False) for mark in marks)
        or hasattr(module, "_v")
        or isinstance(module.weight.data, QuantizedTensor)
    )


def stored(tensor: Tensor) -> list[Tensor]:
    """The tensors with storages of their own that a weight is made of: itself, or the parts of a quantised one."""
    data = tensor.data  # held, as a quantised tensor makes it anew each time, and its parts with it
    return (
        [getattr(data, name) for name in data.__tensor_flatten__()[0]]
        if isinstance(data, QuantizedTensor)
        else [tensor]
    )


@contextmanager
def fetched(layer: nn.Module, like: Tensor):
    """The layer's weight and bias as the host uses them, in the dtype and on the device of `like`. They may be
    overwritten after the block."""
    weight, bias, stream = comfy.ops.cast_bias_weight(
        layer, dtype=like.dtype, device=like.device, bias_dtype=like.dtype, offloadable=True
    )
    try:
        yield weight.dequantize() if isinstance(weight, QuantizedTensor) else weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


def bytes_to_come(patcher: ModelPatcher) -> int:
    """Of the model's weights that are not on its device yet: the host may move them in only as they are used."""
    return max(0, patcher.model_size() - patcher.loaded_size())


def linear_modules(model: ModelPatcher) -> dict[str, nn.Module]:
    """The linear modules of the diffusion model by path, the host's quantised ones among them."""
    return {path: module for path, module in modules_by_path(model.model.diffusion_model).items() if is_linear(module)}


def check_layers(model: ModelPatcher, tlora: TLoRAFile) -> None:
    """Raises TLoRAError when one of the T-LoRA's layers is missing in the model or has another shape there."""
    check_fit(tlora, {path: (m.out_features, m.in_features) for path, m in linear_modules(model).items()})
