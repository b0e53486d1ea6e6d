"""Saves a T-LoRA as plain LoRA files."""

from comfy_api.latest import io

from ..tlora_core.files.bake import bake, save_all
from ..tlora_core.files.dtypes import DTYPES
from ..tlora_core.hosts.comfy.files import name_of, new_lora_path, told_of
from ..tlora_core.hosts.comfy.training.before_run import wrong_file_name
from .sockets import CATEGORY, TLORA, dtype_input, file_name_input


class BakeTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRABake",
            display_name="Bake T-LoRA",
            category=CATEGORY,
            is_output_node=True,
            search_aliases=["lora", "tlora", "export", "convert"],
            description="Saves a T-LoRA as plain LoRA files for programs without this pack: the mean over an "
            "interval of noise levels, the ranks at one noise level, or several files to switch on in "
            "turn.",
            inputs=[
                TLORA.Input("tlora", display_name="T-LoRA", tooltip="From Train or Load."),
                io.Combo.Input(
                    "mode",
                    options=["interval", "timestep", "steps"],
                    default="interval",
                    tooltip="interval: one file, the mean from interval_start to interval_end. timestep: one file, "
                    "the ranks at noise_level. steps: several files to switch on in turn, following the "
                    "schedule.",
                ),
                _level_input(
                    "interval_start", 1.0, "interval: noise level where the interval starts; 1 is pure noise."
                ),
                _level_input(
                    "interval_end", 0.0, "interval: noise level where the interval ends; 0 is the finished picture."
                ),
                _level_input(
                    "noise_level", 0.5, "timestep: noise level whose active ranks go into the file; 1 is pure noise."
                ),
                io.Int.Input(
                    "parts",
                    default=4,
                    min=1,
                    max=4096,
                    tooltip="steps: number of files. More files follow the schedule more closely.",
                ),
                file_name_input(),
                dtype_input(),
            ],
            outputs=[
                io.String.Output(
                    display_name="files", tooltip="One file per line; with steps, also when to switch it on."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file_name=None):
        return wrong_file_name(file_name) or True

    @classmethod
    def execute(cls, tlora, mode, interval_start, interval_end, noise_level, parts, file_name, dtype):
        baked = bake(
            tlora,
            at=noise_level if mode == "timestep" else None,
            interval=(interval_start, interval_end) if mode == "interval" else None,
            parts=parts,
        )
        # The number of the whole comes before the parts', so the next bake gets another.
        chosen = new_lora_path(file_name)
        paths = [one.path(chosen) for one in baked]
        save_all([(one.tlora, path) for one, path in zip(baked, paths)], DTYPES[dtype])
        names = [name_of(path) for path in paths]
        text = "\n".join(name + one.note for name, one in zip(names, baked))
        return io.NodeOutput(text, ui=told_of(names, text))


def _level_input(name: str, default: float, tooltip: str):
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)
