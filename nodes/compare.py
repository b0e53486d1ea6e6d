"""Pictures of several settings in one."""
import torch
from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.images import to_tensor
from ..tlora_core.sheet import comparison_sheet
from .sockets import CATEGORY

INPUTS = [f"images_{number}" for number in range(1, 7)]


class CompareTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRACompare", display_name="Compare (T-LoRA)", category=CATEGORY, is_input_list=True,
            search_aliases=["xy plot", "grid", "contact sheet"],
            description="Puts the pictures of two to six settings into one labelled grid: a column for each setting, a row "
                        "for each prompt. For LoRA against T-LoRA, or for sweeps of min_rank, rank, strength or checkpoint.",
            inputs=[
                *[io.Image.Input(name, optional=number > 2, tooltip=f"The pictures of column {number}, one for each row.")
                  for number, name in enumerate(INPUTS, 1)],
                io.String.Input("labels", multiline=True, default="T-LoRA\nwithout",
                                tooltip="What stands above the columns, one line each."),
                io.String.Input("prompts", multiline=True, default="", optional=True,
                                tooltip="What stands beside the rows, one line each, or connected; empty for nothing."),
                io.String.Input("title", default="", optional=True, tooltip="A line above it all; empty for none."),
                io.Int.Input("cell", default=256, min=32, max=2048, step=8, optional=True, advanced=True,
                             tooltip="Side of a picture in the sheet, in pixels; each is scaled to fit."),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The grid as one picture, for Save Image.")])

    @classmethod
    def execute(cls, labels, prompts=("",), title=("",), cell=(256,), **images):
        given = [images.get(name) for name in INPUTS]
        columns = [_joined(name, batches) for name, batches in zip(INPUTS, given) if batches]
        return io.NodeOutput(to_tensor(comparison_sheet(columns, _lines(labels), _lines(prompts), cell[0], title[0])))


def _joined(name, batches):
    """All pictures of one input, which come as a list of batches."""
    if len({batch.shape[1:] for batch in batches}) > 1:
        raise TLoRAError(f"{name} has pictures of several sizes; give it pictures of one size.")
    return torch.cat(list(batches))


def _lines(texts):
    """Lines of a widget, or the texts of a connected list."""
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]
