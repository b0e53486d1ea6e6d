"""Saves a T-LoRA in the layout of another program."""

from comfy_api.latest import io

from ..tlora_core.files.bake import bake_interval
from ..tlora_core.files.dtypes import DTYPES
from ..tlora_core.files.export import LAYOUTS, export
from ..tlora_core.hosts.comfy.files import name_of, new_lora_path, told_of
from ..tlora_core.hosts.comfy.training.before_run import wrong_file_name
from .sockets import CATEGORY, TLORA, dtype_input, file_name_input

FULL, MEAN = "full", "mean"


class ExportTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRAExport",
            display_name="Export T-LoRA",
            category=CATEGORY,
            is_output_node=True,
            search_aliases=["lora", "tlora", "convert", "diffusers", "kohya"],
            description="Saves a T-LoRA in another program's layout. All layouts except reference are plain LoRAs, "
            "which use the same ranks at every noise level. A T-LoRA is not trained for that.",
            inputs=[
                TLORA.Input("tlora", display_name="T-LoRA", tooltip="From Train or Load."),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="diffusers",
                    tooltip="kohya, diffusers (also PEFT) and comfyui: a plain LoRA with that program's layer "
                    "names. reference: a folder that the T-LoRA authors' code loads, with the schedule; "
                    "SDXL and FLUX.1 only.",
                ),
                io.Combo.Input(
                    "ranks",
                    options=[FULL, MEAN],
                    default=FULL,
                    tooltip="full: all ranks at full strength. mean: each rank weighted by the share of noise "
                    "levels at which it is on.",
                ),
                file_name_input(),
                dtype_input(),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name in the loras folder.")],
        )

    @classmethod
    def validate_inputs(cls, file_name=None):
        return wrong_file_name(file_name) or True

    @classmethod
    def execute(cls, tlora, layout, ranks, file_name, dtype):
        if ranks == MEAN:
            tlora = bake_interval(tlora, 0, tlora.num_timesteps)
        path = export(tlora, new_lora_path(file_name), layout, DTYPES[dtype])
        name = name_of(path)
        return io.NodeOutput(name, ui=told_of([name], name))
