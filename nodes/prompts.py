"""Several prompts about the subject at once."""
from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.prompt_sets import SETS
from .sockets import CATEGORY, TLORA

_OWN = "own"


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
                io.Combo.Input("prompt_set", options=[_OWN, *SETS], default=_OWN, optional=True,
                               tooltip="own: the text above. live, object: the paper's 31 prompts for animals or for things, and "
                                       "its neutral one."),
            ],
            outputs=[io.String.Output(display_name="prompts", is_output_list=True, tooltip="One after the other, for CLIP Text Encode.")])

    @classmethod
    def execute(cls, prompts, subject, tlora=None, prompt_set=_OWN):
        if tlora is not None:
            subject = f"{tlora.token} {tlora.class_word}".strip()
        texts = prompts.splitlines() if prompt_set == _OWN else SETS[prompt_set]
        lines = [line.strip().replace("{}", subject) for line in texts if line.strip()]
        if not lines:
            raise TLoRAError("prompts is empty; write at least one line.")
        return io.NodeOutput(lines)
