"""What is expected of each of the host's families: the layers that a T-LoRA is trained on, and what a training refuses.

A layer is a target if its output becomes query, key or value of an attention over image tokens, or if it takes back
what that attention gives to the image. What it gives back to the text is left out, as in the paper; so are layers that
see the text alone, and those that run only with inputs that a training has not: a face, sound.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One family.

    layers: pattern of module paths -> how many targets it stands for. A pattern stands for all linear layers that it
    matches. "@0-256-768" behind it says that rows 0 to 255, and 256 to 767, are a target each.
    idle: targets that do not learn, since what they give to the last block's text goes nowhere.
    refused: what a training says of such a model before it starts; "" if it can be trained.
    step: of finite differences; smaller where the loss is curved more.
    double: whether the host can compute the model in float64.
    """

    layers: Mapping[str, int]
    idle: tuple[str, ...] = ()
    refused: str = ""
    step: float = 1e-2
    double: bool = True

    @property
    def patterns(self) -> str:
        """The layers as patterns for the Train node, without rows."""
        return ", ".join(dict.fromkeys(pattern.partition("@")[0] for pattern in self.layers))


_FROM_A_PICTURE = "makes one picture from another"


def _unet(inputs: int, outputs: int, **more) -> Row:
    return Row({"*.attn[12].to_[qkv]": inputs, "*.attn[12].to_out.0": outputs}, **more)


def _flux(width: int = 256, **more) -> Row:
    thirds = f"@0-{width}-{2 * width}-{3 * width}"
    return Row(
        {
            f"double_blocks.*.???_attn.qkv{thirds}": 6,
            "double_blocks.*.img_attn.proj": 1,
            f"single_blocks.*.linear1{thirds}": 3,
        },
        **more,
    )


def _wan(blocks: int = 2, also: Mapping[str, int] | None = None, **more) -> Row:
    layers = {"blocks.*.self_attn.[qkvo]": 4 * blocks, "blocks.*.cross_attn.[qkvo]": 4 * blocks}
    return Row({**layers, **(also or {})}, **more)


def _of_picture(blocks: int = 2) -> Mapping[str, int]:
    """Keys and values of another picture's tokens. Without one the model gives them the text."""
    return {"blocks.*.cross_attn.[kv]_img": 2 * blocks}


def _next(width: int, keys: int, **more) -> Row:
    rows = f"@0-{width}-{width + keys}-{width + 2 * keys}"
    return Row(
        {
            f"noise_refiner.*.attention.qkv{rows}": 3,
            "noise_refiner.*.attention.out": 1,
            f"layers.*.attention.qkv{rows}": 3,
            "layers.*.attention.out": 1,
        },
        **more,
    )


def _pixart() -> Row:
    return Row(
        {
            "blocks.*.attn.qkv@0-96-192-288": 6,
            "blocks.*.attn.proj": 2,
            "blocks.*.cross_attn.q_linear": 2,
            "blocks.*.cross_attn.kv_linear@0-96-192": 4,
            "blocks.*.cross_attn.proj": 2,
        },
    )


def _hunyuan_dit() -> Row:
    return Row(
        {
            "blocks.*.attn1.Wqkv@0-128-256-384": 12,
            "blocks.*.attn2.q_proj": 4,
            "blocks.*.attn2.kv_proj@0-128-256": 8,
            "blocks.*.attn[12].out_proj": 8,
        }
    )


def _qwen_image() -> Row:
    return Row(
        {
            "transformer_blocks.*.attn.to_[qkv]": 6,
            "transformer_blocks.*.attn.add_[qkv]_proj": 6,
            "transformer_blocks.*.attn.to_out.0": 2,
        },
        idle=("transformer_blocks.1.attn.add_q_proj",),
    )


def _pixel_dit() -> Row:
    return Row(
        {
            "patch_blocks.*.attn.qkv_[xy]@0-128-256-384": 12,
            "patch_blocks.*.attn.proj_x": 2,
            "pixel_blocks.*.attn.qkv@0-64-128-192": 3,
            "pixel_blocks.*.attn.proj": 1,
        },
        idle=("patch_blocks.1.attn.qkv_y@0",),
    )


def _cosmos() -> Row:
    return Row(
        {
            "blocks.*.blocks.?.block.attn.to_[qkv].0": 12,
            "blocks.*.blocks.?.block.attn.to_out.0": 4,
        },
        double=False,
    )


def _predict2() -> Row:
    return Row(
        {
            "blocks.*.self_attn.[qkv]_proj": 6,
            "blocks.*.self_attn.output_proj": 2,
            "blocks.*.cross_attn.[qkv]_proj": 6,
            "blocks.*.cross_attn.output_proj": 2,
        },
        double=False,
    )


def _kandinsky() -> Row:
    return Row(
        {
            "visual_transformer_blocks.*_attention.to_query": 4,
            "visual_transformer_blocks.*_attention.to_key": 4,
            "visual_transformer_blocks.*_attention.to_value": 4,
            "visual_transformer_blocks.*_attention.out_layer": 4,
        }
    )


def _cogvideox() -> Row:
    return Row(
        {"blocks.*.[qkv]": 6, "blocks.*.attn_out": 2},
    )


TABLE: dict[str, Row] = {
    # U-Nets
    "sd15": _unet(42, 14),
    "sd15-inpaint": _unet(42, 14),
    "sd15-ip2p": _unet(42, 14),
    "sd2": _unet(42, 14),
    "sd-x4-upscaler": _unet(42, 14),
    "sdxl": _unet(48, 16),
    "sdxl-inpaint": _unet(48, 16),
    "sdxl-ip2p": _unet(48, 16),
    "sdxl-refiner": _unet(24, 8),
    "ssd-1b": _unet(30, 10),
    "vega": _unet(18, 6),
    "koala-700m": _unet(36, 12),
    "koala-1b": _unet(72, 24),
    "lotus-d": _unet(42, 14, refused=_FROM_A_PICTURE),
    "svd": _unet(84, 28),
    "cascade-c": Row({"*.attention.attn.to_[qkv]": 12, "*.attention.attn.out_proj": 4}),
    "cascade-b": Row({"*.attention.attn.to_[qkv]": 12, "*.attention.attn.out_proj": 4}, step=3e-2),
    # Transformers that make pictures
    "sd3": Row(
        {"joint_blocks.*_block.attn.qkv@0-128-256-384": 12, "joint_blocks.*.x_block.attn.proj": 2},
        idle=("joint_blocks.1.context_block.attn.qkv@0",),
    ),
    "sd35m": Row(
        {"joint_blocks.*_block.attn*.qkv@0-128-256-384": 15, "joint_blocks.*.x_block.attn*.proj": 3},
        idle=("joint_blocks.1.context_block.attn.qkv@0",),
    ),
    "auraflow": Row(
        {
            "double_layers.*.attn.w[12][qkv]": 6,
            "double_layers.*.attn.w2o": 1,
            "single_layers.*.attn.w1[qkvo]": 8,
        }
    ),
    "pixart-alpha": _pixart(),
    "pixart-sigma": _pixart(),
    "hydit": _hunyuan_dit(),
    "hydit1": _hunyuan_dit(),
    "flux": _flux(),
    "flux-inpaint": _flux(),
    "flux-canny": _flux(),
    "flux-schnell": _flux(),
    "flux2-dev": _flux(128),
    "flux2-klein": _flux(128),
    "ovis": _flux(),
    "longcat": _flux(),
    "lens": Row(
        {
            "transformer_blocks.*.attn.???_qkv@0-128-256-384": 12,
            "transformer_blocks.*.attn.to_out.0": 2,
        },
        idle=("transformer_blocks.1.attn.txt_qkv@0",),
    ),
    "chroma": _flux(),
    "chroma-radiance": _flux(),
    "lumina2": _next(192, 96),
    "newbie": _next(192, 96),
    "z-image": _next(288, 288, step=2e-3),
    "z-image-omni": _next(288, 288),
    "z-image-pixel": _next(288, 288),
    "pixeldit": _pixel_dit(),
    "pid": _pixel_dit(),
    "hidream": Row(
        {
            "*_stream_blocks.*.block.attn1.to_[qkv]": 6,
            "*_stream_blocks.*.block.attn1.to_out": 2,
            "double_stream_blocks.*.block.attn1.to_[qkv]_t": 3,
        }
    ),
    "hidream-o1": Row(
        {"language_model.layers.*.self_attn.[qkvo]_proj": 8},
    ),
    "omnigen2": Row(
        {
            "noise_refiner.*.attn.to_[qkv]": 3,
            "noise_refiner.*.attn.to_out.0": 1,
            "layers.*.attn.to_[qkv]": 6,
            "layers.*.attn.to_out.0": 2,
        },
    ),
    "boogu": Row(
        {
            "noise_refiner.*.attn.to_[qkv]": 3,
            "noise_refiner.*.attn.to_out.0": 1,
            "double_stream_layers.*.img_instruct_attn.processor.img_to_[qkv]": 3,
            "double_stream_layers.*.img_instruct_attn.processor.instruct_to_[qkv]": 3,
            "double_stream_layers.*.img_instruct_attn.processor.img_out": 1,
            "double_stream_layers.*.img_self_attn.to_[qkv]": 3,
            "double_stream_layers.*.img_self_attn.to_out.0": 1,
            "single_stream_layers.*.attn.to_[qkv]": 3,
            "single_stream_layers.*.attn.to_out.0": 1,
        },
    ),
    "ideogram4": Row({"layers.*.attention.qkv@0-256-512-768": 6, "layers.*.attention.o": 2}),
    "krea2": Row({"blocks.*.attn.w[qkvo]": 8}, step=2e-3),
    "mage-flow": _qwen_image(),
    "qwen-image": _qwen_image(),
    "qwen-edit": _qwen_image(),
    "qwen-layered": _qwen_image(),
    "joyimage": Row(
        {
            "double_blocks.*.attn.???_attn_qkv@0-256-512-768": 12,
            "double_blocks.*.attn.img_attn_proj": 2,
        },
        idle=("double_blocks.1.attn.txt_attn_qkv@0",),
        double=False,
    ),
    "hunyuan-image21": _flux(),
    "hunyuan-image21-distilled": _flux(),
    "kandinsky5-image": _kandinsky(),
    "ernie": Row(
        {"layers.*.self_attention.to_[qkv]": 6, "layers.*.self_attention.to_out.0": 2},
        double=False,
    ),
    # Transformers that make videos
    "mochi": Row(
        {"blocks.*.attn.qkv_[xy]@0-256-512-768": 12, "blocks.*.attn.proj_x": 2},
        idle=("blocks.1.attn.qkv_y@0",),
    ),
    "ltxv": Row(
        {"transformer_blocks.*.attn[12].to_[qkv]": 12, "transformer_blocks.*.attn[12].to_out.0": 4},
    ),
    "ltxav": Row(
        {
            "transformer_blocks.*.attn[12].to_[qkv]": 6,
            "transformer_blocks.*.attn[12].to_out.0": 2,
        },
    ),
    "minimax-h3": Row(
        {"blocks.?.attn.qkv_proj@0-128-256-384": 6, "blocks.?.attn.out_proj": 2},
        refused="draws a video together with its sound",
    ),
    "hunyuan-video": _flux(),
    "hunyuan-video-i2v": _flux(),
    "skyreels-i2v": _flux(),
    "hunyuan-video15": _flux(),
    "hunyuan-video15-sr": _flux(),
    "hunyuan-image21-refiner": _flux(),
    "cosmos-t2v": _cosmos(),
    "cosmos-i2v": _cosmos(),
    "cosmos-predict2": _predict2(),
    "cosmos-predict2-i2v": _predict2(),
    "anima": _predict2(),
    "wan": _wan(),
    "wan21-i2v": _wan(also=_of_picture()),
    "wan21-fun": _wan(also=_of_picture()),
    "wan21-vace": _wan(also={"vace_blocks.*.self_attn.[qkvo]": 4, "vace_blocks.*.cross_attn.[qkvo]": 4}),
    "wan21-camera": _wan(also=_of_picture()),
    "wan21-humo": _wan(),
    "wan21-scail": _wan(also=_of_picture()),
    "wan21-scail2": _wan(also=_of_picture()),
    "wan21-causal": _wan(),
    "wan21-flowrvs": _wan(refused=_FROM_A_PICTURE),
    "wan22-5b": _wan(),
    "wan22-14b-i2v": _wan(),
    "wan22-camera": _wan(),
    "wan22-s2v": _wan(),
    "wan22-animate": _wan(5, also=_of_picture(5)),
    "wandancer": _wan(),
    "kandinsky5": _kandinsky(),
    "cogvideox-2b": _cogvideox(),
    "cogvideox-i2v": _cogvideox(),
    "cogvideox-inpaint": _cogvideox(),
    "seedvr2": Row(
        {
            "blocks.*.attn.proj_qkv.*@0-256-512-768": 9,
            "blocks.*.attn.proj_out.vid": 1,
            "blocks.*.attn.proj_out.all": 1,
        },
    ),
}
