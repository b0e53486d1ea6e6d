"""Random T-LoRAs for the random models."""

import re

import torch

from tlora_core import LowRank, RankSchedule, TLoRAFile
from tlora_core.hosts.comfy.model.noise import domain, num_timesteps

LAYERS = re.compile(
    r"^(?!txtfusion).*(attn|attention)\d?\S*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|qkv|proj|out|w?[qkvo])$|"
    r"single_blocks\.\d+\.linear1$"
)


def attention_layers(model) -> dict[str, torch.nn.Linear]:
    """The attention projections, by module path."""
    return {
        path: m
        for path, m in model.model.diffusion_model.named_modules()
        if hasattr(m, "in_features") and LAYERS.search(path)
    }


def random_tlora(
    model, rank: int = 64, min_rank: int | None = None, size: float = 0.05, seed: int = 0, split=(), shapes=None
) -> TLoRAFile:
    """A T-LoRA, each update about `size` times its weight.

    shapes: (out, in) of each layer by its name; None for all of `attention_layers`. Of those, layers whose path ends
    in one of `split` get two updates, on the second and the last third of their rows, as a T-LoRA on k and v of a fused
    layer has.
    """
    generator = torch.Generator().manual_seed(seed)

    def update(rows, columns):
        up, down = torch.randn(rows, 2 * rank, generator=generator), torch.randn(2 * rank, columns, generator=generator)
        return LowRank(up * size * (2 * rank) ** -0.5, down * columns**-0.5, 2)

    shapes = shapes or _shapes(model, tuple(split))
    layers = {name: update(*shape) for name, shape in shapes.items()}
    schedule = RankSchedule(rank, rank // 2 if min_rank is None else min_rank)
    sampling = model.model.model_sampling
    T = num_timesteps(sampling)
    kind = type(model.model.model_config).__name__.lower()
    return TLoRAFile(layers, "tlora", schedule, T, domain(sampling), kind, heights=_heights(model, layers))


def _shapes(model, split: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    shapes = {}
    for path, layer in attention_layers(model).items():
        rows, columns = layer.out_features, layer.in_features
        if split and path.endswith(split):
            shapes.update({f"{path}@{start}": (rows // 3, columns) for start in (rows // 3, 2 * (rows // 3))})
        else:
            shapes[path] = (rows, columns)
    return shapes


def _heights(model, names) -> dict[str, int]:
    """Rows of each module of which `names` has a part."""
    parts = {name.partition("@")[0] for name in names if "@" in name}
    return {path: model.model.diffusion_model.get_submodule(path).out_features for path in parts}
