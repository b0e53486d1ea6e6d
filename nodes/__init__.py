"""The pack's nodes."""
from comfy_api.latest import ComfyExtension
from typing_extensions import override

from .apply import ApplyTLoRA, LoadTLoRA, SaveTLoRA
from .prompts import TLoRAPrompts
from .schedule import TLoRASchedulePreview
from .tiny import TinyBaseModel, TinySampleConcept
from .train import TrainTLoRAFromImage


class TLoRAExtension(ComfyExtension):
    @override
    async def get_node_list(self):
        return [TrainTLoRAFromImage, LoadTLoRA, ApplyTLoRA, SaveTLoRA, TLoRASchedulePreview, TLoRAPrompts, TinyBaseModel,
                TinySampleConcept]


async def comfy_entrypoint() -> TLoRAExtension:
    return TLoRAExtension()
