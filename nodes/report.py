"""Reports the contents of a T-LoRA."""

from comfy_api.latest import io

from ..tlora_core.reports.report import blocks, report_picture, report_text
from ..tlora_core.training.images import to_tensor
from .sockets import CATEGORY, TLORA


class TLoRAInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRAInfo",
            display_name="T-LoRA Info",
            category=CATEGORY,
            search_aliases=["lora", "tlora", "effective rank"],
            description="Reports a T-LoRA's settings, how many of its ranks it really uses, and which blocks of the "
            "model it changes most.",
            inputs=[TLORA.Input("tlora", display_name="T-LoRA", tooltip="From Train or Load.")],
            outputs=[
                io.String.Output(display_name="report", tooltip="The report as text, for Preview as Text."),
                io.Image.Output(tooltip="Active rank by noise level; effective rank and norm by block."),
            ],
        )

    @classmethod
    def execute(cls, tlora):
        parts = blocks(tlora)
        return io.NodeOutput(report_text(tlora, parts), to_tensor(report_picture(tlora, parts)))
