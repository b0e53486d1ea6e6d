"""What the nodes share: the TLORA socket, the category, and inputs that stand on more than one node."""

from collections.abc import Mapping, Sequence

from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.files.dtypes import DTYPES

CATEGORY = "T-LoRA"
# What people type who look for Train, Load or Apply; web/search.js has these ranked.
SEARCH = ("lora", "t-lora", "tlora", "subject", "single image", "character", "concept")
TLORA = io.Custom("TLORA")
IMAGES = io.Custom("TLORA_IMAGES")
OPTIONS = io.Custom("TLORA_OPTIONS")
AXES = io.Custom("TLORA_AXES")


def unlisted(inputs: Mapping[str, Sequence]) -> dict:
    """The inputs of a node that takes lists, where each has a single value. Raises TLoRAError, naming the input, for a
    list."""
    for name, values in inputs.items():
        if len(values) != 1:
            raise TLoRAError(
                f"{name} is a list of {len(values)}; connect a single value, since one training is made of all "
                f"pictures."
            )
    return {name: values[0] for name, values in inputs.items()}


def strength_input(more: str = ""):
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.05,
        tooltip=f"How strongly the T-LoRA acts: 1 as trained, 0 not at all, below 0 away from the subject. "
        f"{more}".strip(),
    )


def rank_inputs(rank: int = 64, min_rank: int = 32):
    return [
        io.Int.Input(
            "rank",
            default=rank,
            min=1,
            max=4096,
            tooltip="Components of each adapter. More can hold more detail of the subject and make a larger file; "
            "fewer take less memory.",
        ),
        io.Int.Input(
            "min_rank",
            default=min_rank,
            min=0,
            max=4096,
            tooltip="Components that stay on at pure noise, where pose and layout are decided. Half of rank is the "
            "paper's choice. Fewer: "
            "freer scenes, but the subject may be lost. More: closer to the picture. As many as rank: the mask is off.",
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
        tooltip="Exponent of the rank schedule. 1 is linear (the paper); above 1 fewer components are on at middle "
        "noise, below 1 more.",
    )


def curve_input():
    return io.String.Input(
        "curve",
        default="",
        optional=True,
        advanced=True,
        tooltip="A free curve in place of min_rank and alpha: noise level:rank at some points, 0 clean and 1 pure "
        "noise, such as "
        '"0:64, 0.5:48, 1:32"; straight lines between. Higher: more components are on there. Empty: the formula.',
    )


def file_name_input():
    return io.String.Input(
        "file_name",
        default="tlora/my_subject",
        tooltip="Name of the file in the loras folder, with a sub-folder if you like; a number is added, nothing is "
        "overwritten.",
    )


def dtype_input():
    return io.Combo.Input(
        "dtype",
        options=list(DTYPES),
        default="float16",
        tooltip="Precision of the numbers: float16 and bfloat16 halve the file; float16 is the more exact.",
    )


def mask_input():
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where the subject is: the loss counts inside it only, so that nothing of the background is learnt. "
        "One for all "
        "pictures or one for each.",
    )


def captions_input(advanced: bool = False):
    return io.String.Input(
        "captions",
        default="",
        multiline=True,
        optional=True,
        advanced=advanced or None,
        tooltip="What the pictures show: one line for all, or a line for each. {token} and {class_word} stand for "
        "these inputs, {} for both. "
        'Empty: "a photo of {token} {class_word}".',
    )
