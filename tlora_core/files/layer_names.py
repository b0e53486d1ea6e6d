"""Names of layers: other programs' names, and the paths of the same layers in ComfyUI's diffusion model.

Programs differ in prefixes, in dots or underscores, and in the module tree: diffusers arranges its U-Net and its FLUX
transformer differently from the original models, which ComfyUI follows. `plain_name` removes the first two differences,
`layer_of` translates the third, and `diffusers_name` is the inverse of `layer_of`.

The translation covers U-Nets with two residual blocks a level (SD1.5, SD2, SDXL) and FLUX. Other models need the host's
table of names (see `foreign.model_description`). `part_key` is the name of a part of a fused module in programs that
load plain LoRAs.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..method.adapters import LowRank
from ..method.layer_name import LayerName

_PREFIXES = re.compile(
    r"^(unet\.base_model\.model\.|base_model\.model\.(unet\.|transformer\.)?|model\.diffusion_model\.|diffusion_model\.|unet\.|"
    r"transformer\.|lora_unet_|lora_transformer_|lycoris_)"
)
_TEXT_ENCODER = re.compile(
    r"^(lora_te\d?_|lycoris_te|text_encoder|te\d?[._]|lora_prior_te_|clip_[lgh]\.|t5xxl\.|transformer\.text_model)"
)
# A projection's name in attention processors and in the reference's trainer -> its module.
_PROCESSOR_NAMES = {
    "to_q_proj": "add_q_proj",
    "to_k_proj": "add_k_proj",
    "to_v_proj": "add_v_proj",
    "to_out": "to_out.0",
}


class Place(NamedTuple):
    """A module's path and, for one of several layers in it, the layer's number: its rows begin at `part` times the
    input width."""

    path: str
    part: int | None = None

    def layer(self, in_features: int) -> LayerName:
        """The layer's name, "path" or "path@row". In FLUX, all parts before one are as wide as the input."""
        if self.part is None:
            return LayerName(self.path)
        return LayerName.of_rows(self.path, self.part * in_features)


# The linear layers in a U-Net's transformer. All programs use the same names, with dots or underscores.
_ATTENTION = [
    f"{attention}.{projection}"
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
]
_IN_UNET_BLOCK = (*_ATTENTION, "ff.net.0.proj", "ff.net.2")
_BESIDE_UNET_BLOCKS = ("proj_in", "proj_out")
# The linear layers in a block of FLUX: diffusers' name -> their place in the block.
_IN_FLUX_BLOCK = {
    "double": {
        "attn.to_q": Place("img_attn.qkv", 0),
        "attn.to_k": Place("img_attn.qkv", 1),
        "attn.to_v": Place("img_attn.qkv", 2),
        "attn.add_q_proj": Place("txt_attn.qkv", 0),
        "attn.add_k_proj": Place("txt_attn.qkv", 1),
        "attn.add_v_proj": Place("txt_attn.qkv", 2),
        "attn.to_out.0": Place("img_attn.proj"),
        "attn.to_add_out": Place("txt_attn.proj"),
        "ff.net.0.proj": Place("img_mlp.0"),
        "ff.net.2": Place("img_mlp.2"),
        "ff_context.net.0.proj": Place("txt_mlp.0"),
        "ff_context.net.2": Place("txt_mlp.2"),
        "norm1.linear": Place("img_mod.lin"),
        "norm1_context.linear": Place("txt_mod.lin"),
    },
    "single": {
        "attn.to_q": Place("linear1", 0),
        "attn.to_k": Place("linear1", 1),
        "attn.to_v": Place("linear1", 2),
        "proj_mlp": Place("linear1", 3),
        "proj_out": Place("linear2"),
        "norm.linear": Place("modulation.lin"),
    },
}
_FLUX_BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}  # diffusers' names


# Query, key and value in one module: the start of a family's name (TLoRAFile.base_model) -> module's path, and
# ComfyUI's name for one of the three in a LoRA. By family, since models with the same paths have LoRAs with different
# names: HunyuanVideo and FLUX, Ideogram and Z-Image.
_QKV_KEYS = {
    "sd3": {
        r"joint_blocks\.(\d+)\.x_block\.(attn2?)\.qkv": r"lora_transformer_transformer_blocks_\1_\2_to_{}",
        r"joint_blocks\.(\d+)\.context_block\.attn\.qkv": r"lora_transformer_transformer_blocks_\1_attn_add_{}_proj",
    },
    **dict.fromkeys(
        ("lumina2", "zimage"),
        {r"(layers|\w+_refiner)\.(\d+)\.attention\.qkv": r"diffusion_model.\1.\2.attention.to_{}"},
    ),
}
_FLUX_FAMILIES = ("flux", "chroma", "longcatimage")


def _plain(name: str) -> str:
    return name.replace(".", "_")


_UNET_LAYERS = {_plain(name): name for name in (*_IN_UNET_BLOCK, *_BESIDE_UNET_BLOCKS)}
# Kind of block -> plain name in the block, in diffusers or ComfyUI -> place.
_FLUX_LAYERS = {
    kind: {_plain(place.path): Place(place.path) for place in table.values()}
    | {_plain(name): place for name, place in table.items()}
    for kind, table in _IN_FLUX_BLOCK.items()
}
_UNET_NAME = re.compile(
    r"(?:(down|up)_blocks_(\d+)_attentions_(\d+)|mid_block_attentions_0|(input|output)_blocks_(\d+)_1|middle_block_1)_"
    r"(?:transformer_blocks_(\d+)_)?(.+)"
)
_UNET_PATH = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.1\.(.+)")
_FLUX_NAME = re.compile(r"(double_blocks|transformer_blocks|single_blocks|single_transformer_blocks)_(\d+)_(.+)")
_FLUX_PATH = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def is_text_encoder(module: str) -> bool:
    return bool(_TEXT_ENCODER.match(module))


def plain_name(module: str) -> str:
    """A module's name without any program's prefix or attention processor, with underscores for dots."""
    if ".processor." in module:
        module, _, inner = module.rpartition(".processor.")
        module += "." + _PROCESSOR_NAMES.get(inner, inner)
    name = _plain(_PREFIXES.sub("", module))
    return name + "_0" if name.endswith("to_out") else name


def processor_name(module: str) -> str:
    """The reference's name in an attention processor for the projection `module`."""
    return next((name for name, known in _PROCESSOR_NAMES.items() if known == module), module)


def layer_of(plain: str) -> Place | None:
    """The place of a layer by its plain name, in ComfyUI or diffusers; None for a name without a rule."""
    if match := _UNET_NAME.fullmatch(plain):
        return _unet_layer(*match.groups())
    if match := _FLUX_NAME.fullmatch(plain):
        blocks, number, name = match.groups()
        kind = "single" if blocks.startswith("single") else "double"
        place = _FLUX_LAYERS[kind].get(name)
        return place and Place(f"{kind}_blocks.{number}.{place.path}", place.part)
    return None


def _unet_layer(side, block, attention, path_side, number, inner, name) -> Place | None:
    layer = _UNET_LAYERS.get(name)
    if layer is None or (inner is None) != (layer in _BESIDE_UNET_BLOCKS):
        return None
    if side:  # a level has three blocks, and one block precedes the first level
        path_side, number = ("input", 1) if side == "down" else ("output", 0)
        number += 3 * int(block) + int(attention)
    start = f"{path_side}_blocks.{number}.1" if path_side else "middle_block.1"
    return Place(f"{start}.{layer}" if inner is None else f"{start}.transformer_blocks.{inner}.{layer}")


def diffusers_name(path: str, part: int | None = None) -> str | None:
    """diffusers' name of a layer, with dots; None for a layer without a rule."""
    match = _UNET_PATH.fullmatch(path)
    if match and part is None:
        side, number, rest = match.groups()
        if side is None:
            return f"mid_block.attentions.0.{rest}"
        block, attention = divmod(int(number) - (side == "input"), 3)
        if side == "input" and attention == 2:
            # The third block is the downsampling, unless the U-Net has more than two residual blocks a level.
            return None
        return f"{'down' if side == 'input' else 'up'}_blocks.{block}.attentions.{attention}.{rest}"
    if match := _FLUX_PATH.fullmatch(path):
        kind, number, rest = match.groups()
        named = next((name for name, place in _IN_FLUX_BLOCK[kind].items() if place == (rest, part)), None)
        return named and f"{_FLUX_BLOCKS[kind]}.{number}.{named}"
    return None


def part_key(base_model: str, path: str, row: int, shape: tuple[int, int]) -> str | None:
    """The key in a plain LoRA for an update of `shape` = (out, in) on a module's rows from `row` on; None if there is
    no such key."""
    part = part_number(row, shape)
    if part is None:
        return None
    if is_flux_family(base_model):
        return onetrainer_key(base_model, path, part)
    for family, table in _QKV_KEYS.items():
        for pattern, key in table.items():
            if base_model.startswith(family) and part < 3 and (match := re.fullmatch(pattern, path)):
                return match.expand(key).format("qkv"[part])
    return None


def part_number(row: int, shape: tuple[int, int]) -> int | None:
    """Which named part of a fused module an update of `shape` = (out, in) from `row` on covers: 0, 1, 2 for query, key
    and value, 3 for FLUX's feed-forward below them; None for other rows. For modules whose query, key and value have as
    many rows as the input is wide."""
    part, beyond = divmod(row, shape[1])
    # FLUX's feed-forward has four times as many rows.
    return part if not beyond and shape[0] == (4 if part == 3 else 1) * shape[1] else None


def onetrainer_key(base_model: str, path: str, part: int | None = None) -> str | None:
    """OneTrainer's name of a layer of FLUX, which ComfyUI and diffusers also read; None for a layer without a name and
    for other models."""
    named = diffusers_name(path, part) if is_flux_family(base_model) and family_of(path) == "flux" else None
    return named and "lora_transformer_" + _plain(named)


def is_flux_family(base_model: str) -> bool:
    """Whether the LoRAs of this family (TLoRAFile.base_model) name layers as FLUX's do."""
    return base_model.startswith(_FLUX_FAMILIES)


def family_of(path: str) -> str | None:
    """ "unet" or "flux": the family whose naming a module path follows."""
    if re.match(r"(input_blocks|middle_block|output_blocks)\.", path):
        return "unet"
    return "flux" if re.match(r"(double|single)_blocks\.", path) else None


def layer_key(name: str) -> str:
    """kohya's name of the layer at a module path."""
    return "lora_unet_" + name.replace(".", "_").replace("@", "__row_")


def stored_keys(layers: Mapping[LayerName, LowRank], base_model: str) -> dict[LayerName, str]:
    """Each layer's name in the file. Whole modules have kohya's names. Kohya has no names for parts of fused modules:
    they have those of other programs. Beside parts of FLUX's modules, whole modules have OneTrainer's names, since
    diffusers cannot read a mixture."""
    if not any(name.is_part for name in layers):
        return {name: layer_key(name) for name in layers}
    return {name: _key_beside_parts(name, layer, base_model) or layer_key(name) for name, layer in layers.items()}


def named_parts(layers: Mapping[LayerName, LowRank], base_model: str) -> dict[LayerName, str]:
    """The parts of modules that ComfyUI's Load LoRA has names for, and those."""
    keys = {
        name: part_key(base_model, name.path, name.row, layer.shape) for name, layer in layers.items() if name.is_part
    }
    return {name: key for name, key in keys.items() if key}


def _key_beside_parts(name: LayerName, layer: LowRank, base_model: str) -> str | None:
    if not name.is_part:
        return onetrainer_key(base_model, name.path)
    return part_key(base_model, name.path, name.row, layer.shape)
