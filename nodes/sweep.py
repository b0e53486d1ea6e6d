"""A model for each cell of an XY sheet."""

from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.hosts.comfy.files import file_stamp, load_lora, lora_names
from ..tlora_core.hosts.comfy.sampling import apply_tlora
from ..tlora_core.reports.sweep import FILE, KINDS, NONE, Axis, Sweep
from .sockets import AXES, CATEGORY, TLORA, strength_input

_FILES = "for file, file names from the loras folder, one per line, or a pattern such as run/heart_step*.safetensors."


class SweepTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRASweep",
            display_name="Sweep (T-LoRA)",
            category=CATEGORY,
            search_aliases=["xy plot", "xyz", "grid", "parameter sweep"],
            description="Outputs the model with a T-LoRA under several settings as a list; the sampler behind it "
            "runs once for each. Varies one or two of strength, min_rank, rank, alpha and file. Compare "
            "(T-LoRA) makes a labelled sheet of the pictures.",
            inputs=[
                io.Model.Input("model", tooltip="The model the T-LoRA was trained on, or one of the same family."),
                TLORA.Input(
                    "tlora",
                    display_name="T-LoRA",
                    optional=True,
                    tooltip="From Train or Load. Not used when an axis is file: the files take its place.",
                ),
                strength_input("Not used when x or y is strength."),
                *_axis_inputs(),
            ],
            outputs=[
                io.Model.Output(is_output_list=True, tooltip="One model per cell, row by row."),
                AXES.Output(display_name="axes", tooltip="Labels of the columns and rows, for Compare (T-LoRA)."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, strength, x, x_values, y, y_values, tlora=None):
        sweep = Sweep.from_text(x, x_values, y, y_values, lora_names())
        if tlora is None and not sweep.files:
            raise TLoRAError("T-LoRA is not connected; connect one from Train or Load, or choose file as x or y.")
        of_files = {name: load_lora(name, model, cls.hidden.unique_id).tlora for name in sweep.files}
        models = []
        for cell in sweep.cells():
            variant = sweep.variant(of_files[cell[FILE]] if tlora is None or of_files else tlora, cell)
            models.append(apply_tlora(model, variant, cell.get("strength", strength)))
        return io.NodeOutput(models, sweep.labels)

    @classmethod
    def fingerprint_inputs(cls, x, x_values, y, y_values, **kwargs):
        stamps = []
        for source, kind, values in (("x_values", x, x_values), ("y_values", y, y_values)):
            if kind is None or kind == FILE and values is None:
                return float("nan")  # the value comes from a connected node and is not known yet: always run
            if kind == FILE:
                found = Axis.from_text(source, kind, values, lora_names()).values
                stamps += [f"{name} {file_stamp(name)}" for name in found]
        return "\n".join(stamps)


def _axis_inputs():
    return [
        io.Combo.Input(
            "x",
            options=list(KINDS),
            default="strength",
            tooltip="The setting that changes from column to column. strength up: more of the subject, then "
            "copies of the training picture. min_rank up: closer to it; down: freer. rank down: "
            "only the first components are kept, with less detail. alpha up: fewer ranks at medium "
            "noise. file: files of other trainings or steps.",
        ),
        io.String.Input(
            "x_values",
            multiline=True,
            default="0.5, 0.75, 1, 1.25",
            tooltip=f"One column per value: numbers separated by commas; {_FILES} More make a wider sheet and "
            "take longer.",
        ),
        io.Combo.Input(
            "y",
            options=[NONE, *KINDS],
            default=NONE,
            tooltip="The setting that changes from row to row, as in x. none: a single row.",
        ),
        io.String.Input(
            "y_values",
            multiline=True,
            default="",
            tooltip=f"One row per value: numbers separated by commas; {_FILES} Columns times rows: at most 64 models.",
        ),
    ]
