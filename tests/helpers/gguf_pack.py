"""Layers that behave as those of ComfyUI-GGUF: weights of a tensor class that shows another shape than the packed bytes
have, that only the layer can unpack, and that the layer's state dict leaves out. Import inside tests that use `comfy`.
"""

import comfy.model_patcher
import comfy.ops
import comfy.utils
import gguf
import numpy
import random_models
import torch
from gguf import GGMLQuantizationType as Kind

PLAIN = (Kind.F32, Kind.F16)
# The package reads these kinds but does not write them. Any bytes are valid beside a block's scale, and the scale of
# its minimum in some. Their places, and as what multiples of the weight's size they give numbers of that size around 0.
RANDOM = {
    Kind.Q2_K: {80: 1 / 14, 82: 1.5 / 14},
    Kind.Q3_K: {108: 1 / 42},
    Kind.Q4_K: {0: 1 / 263, 2: 7.5 / 263},
    Kind.Q5_K: {0: 1 / 530, 2: 15.5 / 530},
    Kind.Q6_K: {208: 1 / 1360},
}


class Packed(torch.Tensor):
    """Bytes of a GGUF file that show the shape of the weight."""

    @classmethod
    def of(cls, data: torch.Tensor, kind: Kind, shape) -> "Packed":
        packed = data.as_subclass(cls)
        packed.kind, packed.worth_shape = kind, torch.Size(shape)
        return packed

    def to(self, *args, **kwargs):
        return Packed.of(super().to(*args, **kwargs), self.kind, self.worth_shape)

    def clone(self, *args, **kwargs):
        return self

    def detach(self):
        return self

    @property
    def shape(self):
        return self.worth_shape

    def unpacked(self, dtype) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        if self.kind in PLAIN:
            return plain.to(dtype)
        return torch.from_numpy(gguf.quants.dequantize(plain.numpy(), self.kind)).view(self.worth_shape).to(dtype)


class Ops(comfy.ops.manual_cast):
    """The host's layers, with a Linear whose weight may be packed."""

    class Linear(comfy.ops.manual_cast.Linear):
        comfy_cast_weights = True

        def _load_from_state_dict(self, state_dict, prefix, *_):
            self.weight = torch.nn.Parameter(state_dict[f"{prefix}weight"], requires_grad=False)
            if f"{prefix}bias" in state_dict:
                self.bias = torch.nn.Parameter(state_dict[f"{prefix}bias"], requires_grad=False)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[f"{prefix}weight"] = torch.zeros_like(self.weight.as_subclass(torch.Tensor), device="meta")
            destination[f"{prefix}temp.weight"] = torch.empty(self.weight.shape, device="meta")
            if self.bias is not None:
                destination[f"{prefix}bias"] = torch.zeros_like(self.bias, device="meta")

        def cast_bias_weight(self, input=None, dtype=None, device=None, bias_dtype=None):
            device, dtype = device or input.device, dtype or input.dtype
            bias = None if self.bias is None else self.bias.to(device, bias_dtype or dtype)
            return self.weight.to(device).unpacked(dtype), bias

        def forward_comfy_cast_weights(self, input):
            return torch.nn.functional.linear(input, *self.cast_bias_weight(input))


def write(path, weights, kind: Kind) -> None:
    """A GGUF file of a state dict. Matrices are stored as `kind`, if their rows divide into its blocks, else as F32."""
    writer = gguf.GGUFWriter(path, "test")
    for name, weight in weights.items():
        values = weight.float().numpy()
        if weight.ndim != 2 or weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(name, values)
        else:
            data = _random(weight.shape, kind) if kind in RANDOM else gguf.quants.quantize(values, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random(shape, kind: Kind):
    """Blocks for a weight of this shape, of random numbers whose size is that of a new layer's."""
    generator, (numbers, size) = numpy.random.default_rng(0), gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // numbers, size), numpy.uint8)
    for place, multiple in RANDOM[kind].items():
        scale = numpy.float16(multiple * shape[1] ** -0.5)
        blocks[..., place : place + 2] = numpy.frombuffer(scale.tobytes(), numpy.uint8)
    return blocks.reshape(shape[0], -1)


def read(path) -> dict[str, torch.Tensor]:
    """The state dict of a GGUF file, its matrices packed."""
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        data = torch.from_numpy(numpy.array(tensor.data))
        if tensor.tensor_type in PLAIN:
            data = data.view(shape)
        weights[tensor.name] = Packed.of(data, tensor.tensor_type, shape) if len(shape) == 2 else data
    return weights


def models(path, family: str, kind: Kind):
    """(MODEL from a GGUF file, MODEL with plain weights of the same worth)."""
    plain = random_models.small(family)
    write(path, plain.model.diffusion_model.state_dict(), kind)
    with torch.inference_mode():  # as in the host
        weights = read(path)
        packed = random_models.small(family, quantised=weights, ops=Ops)
    worth = {k: w.unpacked(torch.float32) if isinstance(w, Packed) else w for k, w in weights.items()}
    plain.model.diffusion_model.load_state_dict({k: w.clone() for k, w in worth.items()})
    return packed, plain
