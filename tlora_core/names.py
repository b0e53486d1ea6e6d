"""Names of layers: what other programs call them, and the paths of the same layers in ComfyUI's diffusion model.

Programs differ in prefixes, in dots or underscores, and in the module tree itself: diffusers' U-Net and its FLUX
transformer are arranged otherwise than the original ones, which ComfyUI follows. `plain_name` takes the first two
differences away, `layer_of` translates the third, and `diffusers_name` goes back.

The translation covers U-Nets with two residual blocks a level (SD1.5, SD2, SDXL) and FLUX. For other models, the host's
own table of names is needed (see `foreign.target`).
"""

import re
from typing import NamedTuple

_PREFIXES = re.compile(
    r"^(unet\.base_model\.model\.|base_model\.model\.(unet\.|transformer\.)?|model\.diffusion_model\.|diffusion_model\.|unet\.|"
    r"transformer\.|lora_unet_|lora_transformer_|lycoris_)"
)
_TEXT_ENCODER = re.compile(
    r"^(lora_te\d?_|lycoris_te|text_encoder|te\d?[._]|lora_prior_te_|clip_[lgh]\.|t5xxl\.|transformer\.text_model)"
)
# The reference's FLUX attention processor names the text stream's projections otherwise than the module does.
_PROCESSOR_NAMES = {"to_q_proj": "add_q_proj", "to_k_proj": "add_k_proj", "to_v_proj": "add_v_proj", "to_out": "to_out.0"}

_UNET_DIFFUSERS = re.compile(r"(?:(down|up)_blocks_(\d+)|(mid)_block)_attentions_(\d+)_(.+)")
_UNET_PATH = re.compile(r"(?:(input|output)_blocks_(\d+)_1|(middle)_block_1)_(.+)")
_IN_TRANSFORMER = re.compile(
    r"(?:(transformer_blocks)_(\d+)_(?:(attn[12])_(?:(to_[qkv])|(to_out)_0)|(ff)_net_(?:0_(proj)|2)))|(proj_in|proj_out)"
)
_FLUX_PATH = re.compile(
    r"(double_blocks)_(\d+)_(img|txt)_(?:(attn)_(qkv|proj)|(mlp)_([02])|(mod)_(lin))|"
    r"(single_blocks)_(\d+)_(?:(linear[12])|(modulation)_(lin))"
)
_FLUX_DIFFUSERS = re.compile(r"(single_)?transformer_blocks_(\d+)_(.+)")
_FLUX_DOUBLE = {
    "attn_to_q": ("img_attn.qkv", 0),
    "attn_to_k": ("img_attn.qkv", 1),
    "attn_to_v": ("img_attn.qkv", 2),
    "attn_add_q_proj": ("txt_attn.qkv", 0),
    "attn_add_k_proj": ("txt_attn.qkv", 1),
    "attn_add_v_proj": ("txt_attn.qkv", 2),
    "attn_to_out_0": ("img_attn.proj", None),
    "attn_to_add_out": ("txt_attn.proj", None),
    "ff_net_0_proj": ("img_mlp.0", None),
    "ff_net_2": ("img_mlp.2", None),
    "ff_context_net_0_proj": ("txt_mlp.0", None),
    "ff_context_net_2": ("txt_mlp.2", None),
    "norm1_linear": ("img_mod.lin", None),
    "norm1_context_linear": ("txt_mod.lin", None),
}
_FLUX_SINGLE = {
    "attn_to_q": ("linear1", 0),
    "attn_to_k": ("linear1", 1),
    "attn_to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", None),
    "norm_linear": ("modulation.lin", None),
}
# diffusers' own spelling of the names above, which have lost their dots.
_FLUX_DOTS = {
    name: name.replace("attn_", "attn.")
    .replace("to_out_0", "to_out.0")
    .replace("_net_0_proj", ".net.0.proj")
    .replace("_net_2", ".net.2")
    .replace("_linear", ".linear")
    for name in (*_FLUX_DOUBLE, *_FLUX_SINGLE)
}


class Place(NamedTuple):
    """A module's path and, where the layer is one of several in it, its number: its rows begin at `part` times the width."""

    path: str
    part: int | None = None

    def layer(self, in_features: int) -> str:
        """The layer's name, "path" or "path@row". In FLUX, all parts before one are as wide as the input."""
        return self.path if self.part is None else f"{self.path}@{self.part * in_features}"


def is_text_encoder(module: str) -> bool:
    return bool(_TEXT_ENCODER.match(module))


def plain_name(module: str) -> str:
    """A module's name without what programs put around it: no prefix, underscores for dots, no attention processor."""
    if ".processor." in module:
        module, _, inner = module.rpartition(".processor.")
        module += "." + _PROCESSOR_NAMES.get(inner, inner)
    name = _PREFIXES.sub("", module).replace(".", "_")
    return name + "_0" if name.endswith("to_out") else name


def layer_of(plain: str) -> Place | None:
    """The place of a layer with this plain name, in ComfyUI's spelling or diffusers'; None for a name without a rule."""
    for pattern, place in (
        (_UNET_DIFFUSERS, _unet_diffusers),
        (_UNET_PATH, _unet_path),
        (_FLUX_PATH, _flux_path),
        (_FLUX_DIFFUSERS, _flux_diffusers),
    ):
        if match := pattern.fullmatch(plain):
            return place(match)
    return None


def diffusers_name(path: str, part: int | None = None) -> str | None:
    """diffusers' name of a layer, with dots; None for a layer without a rule."""
    match = re.fullmatch(r"(?:(input|output)_blocks\.(\d+)|(middle)_block)\.1\.(.+)", path)
    if match and part is None:
        side, number, middle, rest = match.groups()
        if middle:
            return f"mid_block.attentions.0.{rest}"
        block, attention = divmod(int(number) - (side == "input"), 3)
        return f"{'down' if side == 'input' else 'up'}_blocks.{block}.attentions.{attention}.{rest}"
    match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", path)
    if match:
        kind, number, rest = match.groups()
        table, block = (_FLUX_DOUBLE, "") if kind == "double" else (_FLUX_SINGLE, "single_")
        for name, place in table.items():
            if place == (rest, part):
                return f"{block}transformer_blocks.{number}.{_FLUX_DOTS[name]}"
    return None


def family_of(path: str) -> str | None:
    """ "unet" or "flux": the family whose naming a module path follows."""
    if re.match(r"(input_blocks|middle_block|output_blocks)\.", path):
        return "unet"
    return "flux" if re.match(r"(double|single)_blocks\.", path) else None


def _unet_diffusers(match: re.Match) -> Place | None:
    side, block, mid, attention, rest = match.groups()
    inner = _in_transformer(rest)
    if inner is None:
        return None
    if mid:
        return Place(f"middle_block.1.{inner}")
    number = int(block) * 3 + int(attention)
    return Place(f"input_blocks.{number + 1}.1.{inner}" if side == "down" else f"output_blocks.{number}.1.{inner}")


def _unet_path(match: re.Match) -> Place | None:
    side, number, _, rest = match.groups()
    inner = _in_transformer(rest)
    return inner and Place(f"{side}_blocks.{number}.1.{inner}" if side else f"middle_block.1.{inner}")


def _in_transformer(rest: str) -> str | None:
    match = _IN_TRANSFORMER.fullmatch(rest)
    if match is None:
        return None
    blocks, number, attention, projection, to_out, ff, ff_proj, proj = match.groups()
    if proj:
        return proj
    if ff:
        return f"{blocks}.{number}.ff.net." + ("0.proj" if ff_proj else "2")
    return f"{blocks}.{number}.{attention}." + (projection or f"{to_out}.0")


def _flux_path(match: re.Match) -> Place:
    double, number, stream, attn, attn_part, mlp, mlp_part, mod, lin, *single = match.groups()
    if double:
        inner = f"{attn or mlp or mod}.{attn_part or mlp_part or lin}"
        return Place(f"{double}.{number}.{stream}_{inner}")
    blocks, number, linear, modulation, lin = single
    return Place(f"{blocks}.{number}.{linear or f'{modulation}.{lin}'}")


def _flux_diffusers(match: re.Match) -> Place | None:
    single, number, rest = match.groups()
    found = (_FLUX_SINGLE if single else _FLUX_DOUBLE).get(rest)
    return found and Place(f"{'single' if single else 'double'}_blocks.{number}.{found[0]}", found[1])
