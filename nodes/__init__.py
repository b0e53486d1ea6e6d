"""The pack's nodes."""

from comfy_api.latest import ComfyExtension
from server import PromptServer

from ..tlora_core.hosts.comfy.routes import files as file_routes
from ..tlora_core.hosts.comfy.routes import templates as template_routes
from ..tlora_core.hosts.comfy.routes import training as live_routes
from .apply import ApplyTLoRA, LoadTLoRA, SaveTLoRA
from .bake import BakeTLoRA
from .compare import CompareTLoRA
from .evaluate import TLoRAEvaluate
from .export import ExportTLoRA
from .prompts import TLoRAPrompts
from .report import TLoRAInfo
from .schedule import TLoRASchedulePreview
from .sweep import SweepTLoRA
from .tiny import TinyBaseModel, TinySampleConcept
from .train import TrainTLoRAFromImage
from .training import TLoRAImages, TLoRATrainingOptions


class TLoRAExtension(ComfyExtension):
    async def get_node_list(self):
        return [
            TrainTLoRAFromImage,
            TLoRAImages,
            TLoRATrainingOptions,
            LoadTLoRA,
            ApplyTLoRA,
            SaveTLoRA,
            ExportTLoRA,
            BakeTLoRA,
            TLoRAInfo,
            TLoRASchedulePreview,
            TLoRAPrompts,
            SweepTLoRA,
            CompareTLoRA,
            TLoRAEvaluate,
            TinyBaseModel,
            TinySampleConcept,
        ]


async def comfy_entrypoint() -> TLoRAExtension:
    for module in (live_routes, file_routes, template_routes):
        module.add_routes(PromptServer.instance.routes)
    return TLoRAExtension()
