"""Load, apply and save a T-LoRA."""

import logging

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..tlora_core.files.dtypes import DTYPES
from ..tlora_core.hosts.comfy.files import file_stamp, load_lora, lora_names, name_of, new_lora_path, told_of
from ..tlora_core.hosts.comfy.page.rank import show_active_rank
from ..tlora_core.hosts.comfy.progress import adding_to, say
from ..tlora_core.hosts.comfy.sampling import apply_tlora
from ..tlora_core.hosts.comfy.training.before_run import wrong_file_name
from ..tlora_core.training.images import thumbnail as make_thumbnail
from .sockets import CATEGORY, SEARCH, TLORA, dtype_input, file_name_input, strength_input


class LoadTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRALoad",
            display_name="Load T-LoRA",
            category=CATEGORY,
            search_aliases=list(SEARCH),
            description="Loads a T-LoRA file and applies it to a model. Reads files of this pack, the T-LoRA "
            "authors' code, LyCORIS and SimpleTuner, and plain LoRAs. Rank, minimum rank and alpha come "
            "from the file if it holds them.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=lora_names(),
                    tooltip="A T-LoRA or LoRA file in the loras folder or one of its subfolders.",
                ),
                strength_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model to apply it to. Leave unconnected to use only the T-LoRA output.",
                ),
                *_schedule(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the T-LoRA."),
                TLORA.Output(display_name="T-LoRA", tooltip="For Apply, Save, Export, Bake, Info, Sweep and Prompts."),
                io.String.Output(display_name="report", tooltip="What matched, what did not, and what was assumed."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, file, strength, model=None, min_rank=-1, alpha=0.0):
        loaded = load_lora(file, model, cls.hidden.unique_id, None if min_rank < 0 else min_rank, alpha or None)
        say(loaded.report, cls.hidden.unique_id)
        if model is None:
            blocked = ExecutionBlocker("Load T-LoRA: connect a model to use its MODEL output.")
            return io.NodeOutput(blocked, loaded.tlora, loaded.report)
        applied = _applied(model, loaded.tlora, strength, cls.hidden.unique_id, loaded.report)
        return io.NodeOutput(applied, loaded.tlora, loaded.report)

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        return file_stamp(file)


def _schedule():
    return [
        io.Int.Input(
            "min_rank",
            default=-1,
            min=-1,
            max=4096,
            optional=True,
            advanced=True,
            tooltip="Components that stay on at pure noise. -1: the file's value. If it has none: half the "
            "rank, or no mask for a plain LoRA or a file that looks like one.",
        ),
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="Exponent of the rank schedule. 0: the file's value, or 1 if it has none.",
        ),
    ]


class ApplyTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRAApply",
            display_name="Apply T-LoRA",
            category=CATEGORY,
            search_aliases=[*SEARCH, "model patcher"],
            description="Makes a model sample with a T-LoRA. Each evaluation uses the ranks that are on at its "
            "noise level, with any sampler and scheduler. The input model is not changed.",
            inputs=[
                io.Model.Input("model", tooltip="The model the T-LoRA was trained on, or one of the same family."),
                TLORA.Input("tlora", display_name="T-LoRA", tooltip="From Train or Load."),
                strength_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with the T-LoRA, ready for a sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, tlora, strength):
        return io.NodeOutput(_applied(model, tlora, strength, cls.hidden.unique_id))


def _applied(model, tlora, strength, node_id, report=""):
    """report: what the node shows already; a sampling may add to it."""
    patched = apply_tlora(model, tlora, strength, tell=adding_to(report, node_id))
    return show_active_rank(patched, tlora.schedule, node_id if strength else None)


class SaveTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRASave",
            display_name="Save T-LoRA",
            category=CATEGORY,
            is_output_node=True,
            description="Saves a T-LoRA into the loras folder. Other programs load the file as a plain LoRA. For "
            "models where they cannot, the node says so, and Export T-LoRA writes a file that they can "
            "load.",
            inputs=[
                TLORA.Input("tlora", display_name="T-LoRA", tooltip="From Train or Load."),
                file_name_input(),
                dtype_input(),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A picture to store in the file for LoRA managers. Everyone who gets the file can see it.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name in Load T-LoRA's list.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file_name=None):
        return wrong_file_name(file_name) or True

    @classmethod
    def execute(cls, tlora, file_name, dtype, thumbnail=None):
        small = make_thumbnail(thumbnail)
        path = new_lora_path(file_name)
        tlora.save(path, DTYPES[dtype], small)
        name = name_of(path)
        if tlora.note:
            logging.warning("[T-LoRA] %s: %s", name, tlora.note)
            say(tlora.note, cls.hidden.unique_id)
        return io.NodeOutput(name, ui=told_of([name], name))
