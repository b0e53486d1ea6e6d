"""Draws the rank schedule."""

from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.hosts.comfy.model.noise import noise_level
from ..tlora_core.method.schedule import RankSchedule
from ..tlora_core.reports.plot import schedule_curve
from ..tlora_core.training.images import to_tensor
from .sockets import CATEGORY, TLORA, alpha_input, curve_input, rank_inputs


class TLoRASchedulePreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRASchedulePreview",
            display_name="T-LoRA Schedule Preview",
            category=CATEGORY,
            description="Draws the number of active ranks at each noise level, with a sampler's steps marked.",
            inputs=[
                *rank_inputs(),
                alpha_input(),
                TLORA.Input(
                    "tlora",
                    display_name="T-LoRA",
                    optional=True,
                    tooltip="Draws this T-LoRA's schedule; rank, min_rank, alpha and curve are then ignored.",
                ),
                io.Model.Input("model", optional=True, tooltip="Converts sigmas to noise levels; needed with sigmas."),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="A sampler's sigmas, for example from BasicScheduler."
                ),
                curve_input(),
            ],
            outputs=[io.Image.Output(tooltip="The curve, for Preview Image.")],
        )

    @classmethod
    def execute(cls, rank, min_rank, alpha, tlora=None, model=None, sigmas=None, curve=""):
        schedule = RankSchedule.from_text(rank, min_rank, alpha, curve) if tlora is None else tlora.schedule
        steps = []
        if sigmas is not None:
            if model is None:
                raise TLoRAError("model is not connected; connect the model that the sigmas belong to.")
            # The sampler ends at the last sigma and does not evaluate the model there.
            timesteps, T = noise_level(model.get_model_object("model_sampling"), sigmas[:-1])
            steps = [(t / T, schedule.active_rank(t, T)) for t in timesteps.tolist()]
        return io.NodeOutput(to_tensor(schedule_curve(schedule, steps)))
