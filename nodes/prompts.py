"""Several prompts about the subject at once."""
from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from .sockets import CATEGORY, TLORA


class TLoRAPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRAPrompts", display_name="Prompts (T-LoRA)", category=CATEGORY,
            description="One prompt a line, as a list: the nodes behind it run once for each. {} stands for the subject.",
            inputs=[
                io.String.Input("prompts", multiline=True, default="a photo of {} on the beach\na photo of {} at night",
                                tooltip="One prompt a line; empty lines are left out."),
                io.String.Input("subject", default="sks dog", tooltip="What {} becomes: token and class word."),
                TLORA.Input("tlora", display_name="T-LoRA", optional=True, tooltip="Takes the subject from it instead."),
            ],
            outputs=[io.String.Output(display_name="prompts", is_output_list=True)])

    @classmethod
    def execute(cls, prompts, subject, tlora=None):
        if tlora is not None:
            subject = f"{tlora.token} {tlora.class_word}".strip()
        lines = [line.strip().replace("{}", subject) for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise TLoRAError("prompts is empty; write at least one line.")
        return io.NodeOutput(lines)
