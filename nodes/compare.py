"""Puts the pictures of several settings into one sheet."""

import torch
from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.reports.sheet import comparison_sheet
from ..tlora_core.training.images import to_tensor
from .sockets import AXES, CATEGORY

INPUTS = [f"images_{number}" for number in range(1, 7)]


class CompareTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRACompare",
            display_name="Compare (T-LoRA)",
            category=CATEGORY,
            is_input_list=True,
            search_aliases=["xy plot", "grid", "contact sheet"],
            description="Puts the pictures of two to six settings into one labelled grid, with a column for each "
            "setting and a row for each prompt. Use it for LoRA against T-LoRA or, with axes, for the "
            "pictures of Sweep (T-LoRA).",
            inputs=[
                *_pictures(),
                *_texts_and_size(),
                AXES.Input(
                    "axes",
                    optional=True,
                    tooltip="From Sweep (T-LoRA): arranges the pictures of images_1 as its grid, with its labels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The grid as one picture, for Save Image.")],
        )

    @classmethod
    def execute(cls, images_1, labels, prompts=("",), title=("",), cell=(256,), axes=None, **images):
        first = _joined(INPUTS[0], images_1)
        more = {name: _joined(name, images[name]) for name in INPUTS if images.get(name)}
        if axes:
            columns, heads, sides = _swept(first, axes[0], more), axes[0].columns, axes[0].rows
        elif more:
            columns, heads, sides = [first, *more.values()], _lines(labels), _lines(prompts)
        else:
            raise TLoRAError(
                "images_2 is not connected; connect the pictures of two settings or more, or axes from Sweep (T-LoRA)."
            )
        return io.NodeOutput(to_tensor(comparison_sheet(columns, heads, sides, cell[0], title[0])))


def _pictures():
    return [
        io.Image.Input(
            "images_1",
            tooltip="The pictures of column 1, one for each row. With axes: all pictures of the sweep.",
        ),
        *[
            io.Image.Input(name, optional=True, tooltip=f"The pictures of column {number}, one for each row.")
            for number, name in enumerate(INPUTS[1:], 2)
        ],
    ]


def _texts_and_size():
    return [
        io.String.Input(
            "labels",
            multiline=True,
            default="T-LoRA\nwithout",
            tooltip="Headings of the columns, one per line. Not used with axes.",
        ),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            optional=True,
            tooltip="Labels of the rows, one per line or from a connected list. Empty: none. Not used with axes.",
        ),
        io.String.Input("title", default="", optional=True, tooltip="A title above the grid. Empty: none."),
        io.Int.Input(
            "cell",
            default=256,
            min=32,
            max=2048,
            step=8,
            optional=True,
            advanced=True,
            tooltip="Side of each picture in the sheet, in pixels. Pictures are scaled to fit.",
        ),
    ]


def _swept(pictures, axes, more):
    """The sweep's pictures, which come row by row, as columns."""
    if more:
        raise TLoRAError(
            f"{', '.join(more)} cannot be shown together with axes; connect the sweep's pictures to images_1 alone."
        )
    if len(pictures) != axes.cells:
        raise TLoRAError(
            f"images_1 has {len(pictures)} pictures, but the sweep has {axes.cells} cells; sample each of its models "
            "once, with one prompt and batch_size 1."
        )
    return [pictures[column :: len(axes.columns)] for column in range(len(axes.columns))]


def _joined(name, batches):
    """Concatenates the list of batches of one input into one batch [n, h, w, c]."""
    if len({batch.shape[1:] for batch in batches}) > 1:
        raise TLoRAError(f"{name} has pictures of several sizes; give it pictures of one size.")
    return torch.cat(list(batches))


def _lines(texts):
    """The non-empty lines of a text widget or of a connected list of texts."""
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]
