"""Models with random weights in each of the formats that checkpoints have, and what they are worth."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import random_models
import torch
from torch import Tensor

from .running import Run
from .sizes import Shape

# The host's names of formats with a scale for each layer or block of numbers.
QUANTISED = {"scaled_fp8": "float8_e4m3fn", "nvfp4": "nvfp4", "mxfp8": "mxfp8", "int8": "int8_tensorwise"}
_PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
CPU = torch.device("cpu")


class Built(NamedTuple):
    """A MODEL, and the values of its weights by name, on the CPU; what it stores stands for exactly these."""

    model: Any
    worth: dict[str, Tensor]


def build(run: Run, shape: Shape, weights: str, in_ram: bool = False):
    """A MODEL with random weights stored as `weights` says, computed in half precision. in_ram: they lie there, as
    after the host's loader, and not on the card; always so under dynamic VRAM.

    Skips the check if host or card have no such format.
    """
    if weights in QUANTISED:
        return _quantised(run, QUANTISED[weights], shape).model
    options: dict[str, Any] = {"dtype": _PLAIN.get(weights, torch.bfloat16), "drawn_on": run.device}
    if weights in ("fp8", "fp8_fast"):
        options["storage"] = torch.float8_e4m3fn
    if weights == "fp8_fast":
        options["ops"] = _fp8_matmul(run)
    if in_ram or is_dynamic():
        options["device"] = CPU
    return _make(shape, **options)


def build_small(run: Run, kind: str, weights: str) -> Built:
    """A small one, and what its weights are worth."""
    shape = run.size.small[kind]
    if weights in QUANTISED:
        return _quantised(run, QUANTISED[weights], shape)
    model = build(run, shape, weights)
    return Built(model, {name: p.detach().to(CPU, torch.float32) for name, p in _parameters(model).items()})


def reference(run: Run, kind: str, worth: dict[str, Tensor], dtype: torch.dtype):
    """A small MODEL that stores and computes these weights in float32 or float64, always loaded as a whole."""
    with _always_loaded():
        model = _make(run.size.small[kind], dtype=dtype, device=run.device)
    for name, parameter in _parameters(model).items():
        parameter.data.copy_(worth[name])
    return model


def _make(shape: Shape, **options: Any):
    return getattr(random_models, shape.function)(**shape.make, **options)


@contextmanager
def _always_loaded():
    """Within the block, models are made as without dynamic VRAM."""
    before = comfy.model_patcher.CoreModelPatcher
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcher
    try:
        yield
    finally:
        comfy.model_patcher.CoreModelPatcher = before


def is_dynamic() -> bool:
    return bool(getattr(comfy.memory_management, "aimdo_enabled", False))


def stored_bytes(model) -> dict[str, Tensor]:
    """Copies of all that the model stores, byte for byte, by name."""
    from tlora_core.hosts.comfy.model.layers import stored

    network = model.model.diffusion_model
    tensors = {**_parameters(model), **dict(network.named_buffers())}
    parts = {f"{name}/{i}": part for name, t in tensors.items() for i, part in enumerate(stored(t))}
    return {name: _bytes(part) for name, part in parts.items()}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().to(CPU).contiguous().reshape(-1).view(torch.uint8).clone()


def same_bytes(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _parameters(model) -> dict[str, Tensor]:
    return dict(model.model.diffusion_model.named_parameters())


def _fp8_matmul(run: Run):
    """The host's layers that multiply in fp8. A CPU can be told to use them."""
    if run.on_gpu and not comfy.model_management.supports_fp8_compute(run.device):
        run.skip("this card has no matrix product of fp8 numbers")
    return comfy.ops.fp8_ops


def _quantised(run: Run, algorithm: str, shape: Shape) -> Built:
    """As the host's loader makes it from a file whose blocks' linear layers are all quantised."""
    known = comfy.quant_ops.QUANT_ALGOS
    if algorithm not in known:
        run.skip(f"this ComfyUI does not know the format {algorithm}")
    layout = known[algorithm]["comfy_tensor_layout"]
    with _always_loaded():
        full = _make(shape, dtype=torch.float32, device=run.device)
    state, worth = full.model.diffusion_model.state_dict(), {}
    for path in _quantisable(full):
        weight = state.pop(f"{path}.weight")
        quantised = comfy.quant_ops.QuantizedTensor.from_float(weight, layout)
        state |= quantised.state_dict(f"{path}.weight")
        state[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps({"format": algorithm}).encode()), dtype=torch.uint8)
        worth[f"{path}.weight"] = quantised.dequantize()
    for name, tensor in state.items():
        if tensor.dtype == torch.float32 and not name.endswith(("weight_scale", "weight_scale_2", "input_scale")):
            state[name] = tensor.to(torch.bfloat16)
    names = _parameters(full).keys()
    worth = {name: worth.get(name, state.get(name)).to(CPU, torch.float32) for name in names}
    state = {name: tensor.to(CPU) for name, tensor in state.items()}
    with torch.inference_mode():
        state = {name: tensor.clone() for name, tensor in state.items()}
        model = _make(shape, dtype=torch.bfloat16, quantised=state, device=CPU)
    return Built(model, worth)


def _quantisable(model) -> list[str]:
    """The linear layers of the blocks, with sides that every format can divide."""
    return [
        path
        for path, module in model.model.diffusion_model.named_modules()
        if "blocks." in path
        and hasattr(module, "in_features")
        and not (module.in_features % 32 or module.out_features % 32)
    ]
