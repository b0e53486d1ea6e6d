"""The layers of a model to train a T-LoRA on, by the layer names of model families."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....errors import TLoRAError
from ....method.layer_name import LayerName
from .layers import fetched, linear_modules

# Parts of a model whose only input is the text or the timestep do not learn a subject. In models with a separate text
# stream, its attention's output projection is excluded too, as in the paper's settings for FLUX (to_add_out there).
_EXCLUDED = re.compile(
    r"(?<!noise_)refiner|txt_in|txtfusion|text_transformer|context_processor|pooler|embedder|"
    r"(?:llm_adapter|connector|visual)\.|audio|modulation|instruct_out$|img_instruct_attn\.to_out|"
    r"(?:txt_attn|context_block\.attn)\.proj$|double_layers\.\d+\.attn\.w1o$"
)
_IN_BLOCK = r"(?:^|\.)(?:\w*blocks?|\w*layers|noise_refiner)\.(?:block)?\d+\.(?:\S+\.)?"
_ATTENTION = re.compile(
    _IN_BLOCK + r"\w*att(?:n\d?|ention)\.(?:"
    # diffusers' names: U-Nets, Qwen-Image, OmniGen2, LTX, HiDream, Cosmos
    r"to_(?:q|k|v|out)(?:\.0)?|add_[qkv]_proj|to_[qkv]_t|"
    r"[qkvo]|[qkv]_img|[qkvo]_proj|out(?:put)?_proj|q_linear|"  # Wan, Cosmos Predict2, HunyuanDiT, PixArt
    # AuraFlow and Krea 2, Kandinsky, MM-DiT, Lumina2
    r"w[12]?[qkvo]|to_(?:query|key|value)|out_layer|proj|out|"
    r"processor\.(?:img|instruct)_(?:to_[qkv]|out)|proj_x)$"  # Boogu; Mochi and PixelDiT
)
# Query, key and value stacked in one layer: MM-DiT and FLUX, Lumina2, HunyuanDiT, PixArt. In FLUX's single blocks, the
# first layer of the feed-forward is stacked below them.
_FUSED = re.compile(
    _IN_BLOCK
    + r"\w*att(?:n\d?|ention)\.(?:W?qkv|qkv_proj|(?:img|txt)_qkv|qkv_[xy])$|(?:^|\.)single_blocks\.\d+\.linear1$"
)
_FUSED_KEY_VALUE = re.compile(_IN_BLOCK + r"\w*att(?:n\d?|ention)\.kv_(?:proj|linear)$")
_FEED_FORWARD = re.compile(
    _IN_BLOCK
    + r"(?:ff|ffn|ff_\w+|\w*mlp[CX]?|mlp_[xy]|\w*feed_forward|channelwise)\.\S+$|(?:^|\.)single_blocks\.\d+\.linear2$"
)
_FEED_FORWARD_ROWS = re.compile(r"(?:^|\.)single_blocks\.\d+\.linear1$")

ATTENTION, WITH_FEED_FORWARD = "attention", "attention+feed-forward"


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer to adapt, or `rows` rows from `row` on of a layer that holds several projections. role: what the
    layer does, one of `watched.ROLES`, or "" if nobody has looked."""

    module: torch.nn.Linear
    row: int
    rows: int
    role: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the update."""
        return self.rows, self.module.in_features

    @property
    def weight(self) -> Tensor:
        """The weight of these rows as the host computes with it, float32 [rows, in], on the device of the model."""
        device = comfy.model_management.get_torch_device()
        with fetched(self.module, torch.empty(0, device=device)) as (weight, _):
            return weight[self.row : self.row + self.rows].clone()


def target_layers(model: ModelPatcher, which: str = ATTENTION) -> dict[LayerName, TargetLayer]:
    """The layers to train a T-LoRA on by their names, which models of the known families share. A training sees for
    itself what a model's layers do; see `training.targets`.

    A key is a module path, or "path@row" for a projection in a layer that holds several. which: see `chosen`. Raises
    like that.
    """
    return layers_among(linear_modules(model), which, type(model.model).__name__)


def layers_among(linear: Mapping[str, torch.nn.Linear], which: str, kind: str) -> dict[LayerName, TargetLayer]:
    """Like target_layers, given a model's linear layers by module path; `kind` names the model in errors."""
    return chosen(which, linear, _attention(linear), _feed_forward(linear), kind)


def chosen(
    which: str,
    linear: Mapping[str, torch.nn.Linear],
    attention: Mapping[LayerName, TargetLayer],
    feed_forward: Mapping[LayerName, TargetLayer],
    kind: str,
) -> dict[LayerName, TargetLayer]:
    """The layers that the input `layers` asks for.

    which: "attention", the projections of the model's attention (the paper's choice); "attention+feed-forward", those
        and the feed-forward layers; or patterns of module paths, separated by line breaks or commas, for example
        "*.attn2.*, middle_block.*". A pattern may match a shared layer's name with or without the row.
    linear: all of the model's linear layers, by module path. attention, feed_forward: those among them. kind: names
        the model in errors.

    Raises TLoRAError for a model without attention layers and for a pattern without a match.
    """
    if which not in (ATTENTION, WITH_FEED_FORWARD):
        return _matching(which, linear, {**attention, **feed_forward})
    if not attention:
        raise TLoRAError(
            f"model is a {kind}, in which T-LoRA finds no attention layers; give patterns of layer names instead, or "
            f"use another model. {_examples(linear)}"
        )
    return {**attention} if which == ATTENTION else {**attention, **feed_forward}


def _attention(linear: Mapping[str, torch.nn.Linear]) -> dict[LayerName, TargetLayer]:
    found = {}
    for path, module in linear.items():
        if _EXCLUDED.search(path):
            continue
        width, rows = module.in_features, module.out_features
        if _FEED_FORWARD_ROWS.search(path):
            rows = 3 * width
        if _FUSED.search(path):
            # Keys and values may have fewer heads than queries; queries have as many rows as the layer is wide.
            key_value = (rows - width) // 2
            found.update(_slices(path, module, (width, key_value, key_value)))
        elif _FUSED_KEY_VALUE.search(path):
            found.update(_slices(path, module, (rows // 2, rows // 2)))
        elif _ATTENTION.search(path):
            found[LayerName(path)] = TargetLayer(module, 0, rows)
    return found


def _feed_forward(linear: Mapping[str, torch.nn.Linear]) -> dict[LayerName, TargetLayer]:
    found = {}
    for path, module in linear.items():
        if _EXCLUDED.search(path):
            continue
        if _FEED_FORWARD_ROWS.search(path):
            first = 3 * module.in_features
            found[LayerName.of_rows(path, first)] = TargetLayer(module, first, module.out_features - first)
        elif _FEED_FORWARD.search(path):
            found[LayerName(path)] = TargetLayer(module, 0, module.out_features)
    return found


def _slices(path: str, module: torch.nn.Linear, sizes: Iterable[int]) -> dict[LayerName, TargetLayer]:
    found, row = {}, 0
    for rows in sizes:
        found[LayerName.of_rows(path, row)] = TargetLayer(module, row, rows)
        row += rows
    return found


def _matching(
    which: str, linear: Mapping[str, torch.nn.Linear], known: Mapping[LayerName, TargetLayer]
) -> dict[LayerName, TargetLayer]:
    """The layers that patterns match: layers with several projections by their parts, all others as a whole."""
    shared = {name.path for name in known if name.is_part}
    layers = {name: layer for name, layer in known.items() if name.is_part}
    layers |= {
        LayerName(path): TargetLayer(module, 0, module.out_features)
        for path, module in linear.items()
        if path not in shared
    }
    found = {}
    patterns = [pattern.strip() for pattern in re.split(r"[,\n]", which) if pattern.strip()]
    if not patterns:
        raise TLoRAError(f'layers is empty; write "{ATTENTION}", "{WITH_FEED_FORWARD}" or patterns of layer names.')
    for pattern in patterns:
        matched = {
            name: layer
            for name, layer in layers.items()
            if fnmatchcase(name, pattern) or fnmatchcase(name.path, pattern)
        }
        if not matched:
            raise TLoRAError(
                f'layers has the pattern "{pattern}", which matches no linear layer of this model; use '
                f'"{ATTENTION}", "{WITH_FEED_FORWARD}" or patterns of names. {_examples(linear)}'
            )
        found |= matched
    return found


def _examples(linear: Mapping[str, torch.nn.Linear]) -> str:
    paths = list(linear)
    chosen = sorted({len(paths) // 4, len(paths) // 2, len(paths) - 1})
    return f"Its layers are named like {', '.join(paths[i] for i in chosen)}."
