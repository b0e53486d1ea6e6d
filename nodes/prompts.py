"""Outputs several prompts about the subject at once."""

from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.reports.prompt_sets import SETS
from .sockets import CATEGORY, TLORA

_OWN = "own"


class TLoRAPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRAPrompts",
            display_name="Prompts (T-LoRA)",
            category=CATEGORY,
            description="Outputs one prompt per line as a list; the nodes behind it run once for each. {} stands "
            "for the subject.",
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a photo of {} on the beach\na photo of {} at night",
                    tooltip="One prompt per line; empty lines are skipped.",
                ),
                io.String.Input(
                    "subject", default="sks dog", tooltip="Replaces {}: token and class word, or a trigger phrase."
                ),
                TLORA.Input(
                    "tlora",
                    display_name="T-LoRA",
                    optional=True,
                    tooltip="Its token and class word, or its trigger phrase, replace subject if its file holds them.",
                ),
                io.Combo.Input(
                    "prompt_set",
                    options=[_OWN, *SETS],
                    default=_OWN,
                    optional=True,
                    tooltip="own: the prompts above. live, object: the paper's 31 prompts for animals or for "
                    "things, and its neutral prompt.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompts",
                    is_output_list=True,
                    tooltip="The prompts one after the other, for CLIP Text Encode.",
                )
            ],
        )

    @classmethod
    def execute(cls, prompts, subject, tlora=None, prompt_set=_OWN):
        if tlora is not None:
            subject = tlora.phrase or subject
        texts = prompts.splitlines() if prompt_set == _OWN else SETS[prompt_set]
        lines = [line.strip() for line in texts if line.strip()]
        if not lines:
            raise TLoRAError("prompts is empty; write at least one line.")
        if not subject.strip() and any("{}" in line for line in lines):
            raise TLoRAError(
                'subject is empty, and no T-LoRA provides it; write what {} stands for, such as "sks dog".'
            )
        return io.NodeOutput([line.replace("{}", subject.strip()) for line in lines])
