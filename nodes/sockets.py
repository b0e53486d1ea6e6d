"""Shared by the nodes: the socket types, the category, and the inputs that several nodes have."""

from collections.abc import Mapping, Sequence

from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.files.dtypes import DTYPES

CATEGORY = "T-LoRA"
# Search words that find Train, Load and Apply; web/search.js ranks the results.
SEARCH = ("lora", "t-lora", "tlora", "subject", "single image", "character", "concept")
TLORA = io.Custom("TLORA")
IMAGES = io.Custom("TLORA_IMAGES")
OPTIONS = io.Custom("TLORA_OPTIONS")
AXES = io.Custom("TLORA_AXES")


def unlisted(inputs: Mapping[str, Sequence]) -> dict:
    """Takes the single value out of each input of a node that receives lists. Raises TLoRAError, naming the input, if a
    list has more or fewer values."""
    for name, values in inputs.items():
        if len(values) != 1:
            raise TLoRAError(
                f"{name} is a list of {len(values)}; connect a single value, because all pictures go into one training."
            )
    return {name: values[0] for name, values in inputs.items()}


def strength_input(more: str = ""):
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.05,
        tooltip="How strongly the T-LoRA acts: 1 as trained, 0 not at all. Above 1 exaggerates the subject; below 0 "
        f"leads away from it. {more}".strip(),
    )


def rank_inputs(rank: int = 64, min_rank: int = 32):
    return [
        io.Int.Input(
            "rank",
            default=rank,
            min=1,
            max=4096,
            tooltip="Components of each adapter. More can hold more detail of the subject and make a larger file; "
            "fewer need less memory.",
        ),
        io.Int.Input(
            "min_rank",
            default=min_rank,
            min=0,
            max=4096,
            tooltip="Components that stay on at pure noise, where pose and layout are decided. The paper uses half "
            "the rank. Fewer: freer scenes, but the subject may be lost. More: closer to the training "
            "picture. Equal to rank: no mask.",
        ),
    ]


def alpha_input():
    return io.Float.Input(
        "alpha",
        default=1.0,
        min=0.05,
        max=10.0,
        step=0.05,
        advanced=True,
        tooltip="Exponent of the rank schedule. 1 is linear, as in the paper. Above 1, fewer components are on at "
        "medium noise; below 1, more.",
    )


def curve_input():
    return io.String.Input(
        "curve",
        default="",
        optional=True,
        advanced=True,
        tooltip='A free curve instead of min_rank and alpha: points as noise level:rank, such as "0:64, 0.5:48, '
        '1:32", joined by straight lines. 0 is clean, 1 is pure noise. Higher: more components are on. '
        "Empty: the formula.",
    )


def file_name_input():
    return io.String.Input(
        "file_name",
        default="tlora/my_subject",
        tooltip="Name of the file in the loras folder, optionally with a subfolder. A number is added, so nothing "
        "is overwritten.",
    )


def dtype_input():
    return io.Combo.Input(
        "dtype",
        options=list(DTYPES),
        default="float16",
        tooltip="Precision of the stored numbers. float16 and bfloat16 halve the file; float16 is the more exact of "
        "the two.",
    )


def mask_input():
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where the subject is, in white. Only the loss inside the mask counts, so the background is not "
        "learnt. One mask for all pictures or one for each.",
    )


def captions_input(advanced: bool = False):
    return io.String.Input(
        "captions",
        default="",
        multiline=True,
        optional=True,
        advanced=advanced or None,
        tooltip="What the pictures show: one line for all, or one line for each. {token} and {class_word} stand for "
        'these inputs, {} for both. Empty: "a photo of {token} {class_word}".',
    )
