"""Tells the page the active rank while a sampler runs."""

import time
import uuid
from dataclasses import asdict

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from server import PromptServer

from ....method.schedule import RankSchedule
from ..model.noise import noise_level
from .pages import tell
from .queued import workflow_id

EVENT = "tlora.sampling"
EVENT_EVERY = 0.1  # seconds; evaluations in between are skipped


def show_active_rank(model: ModelPatcher, schedule: RankSchedule, node_id: str | None) -> ModelPatcher:
    """Makes `model`, which must be the caller's own clone, report its active rank, and returns it. Adds nothing without
    a node or a server."""
    if node_id is not None and getattr(PromptServer, "instance", None) is not None:
        teller = _Teller(schedule, node_id, workflow_id())
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"tlora-live-{uuid.uuid4()}", teller)
    return model


class _Teller:
    """An APPLY_MODEL wrapper that changes nothing."""

    changes_result = False  # for the fingerprint

    def __init__(self, schedule: RankSchedule, node_id: str, workflow: str | None):
        self.schedule, self.node_id, self.workflow = schedule, node_id, workflow
        self._told_at = 0.0
        self._sigmas, self._steps = None, []

    def __call__(self, executor, x, sigma, *args, **kwargs):
        now = time.monotonic()
        if now - self._told_at >= EVENT_EVERY:
            self._told_at = now
            self._tell(executor.class_obj.model_sampling, sigma, _options(args, kwargs).get("sample_sigmas"))
        return executor(x, sigma, *args, **kwargs)

    def _tell(self, sampling, sigma, sigmas) -> None:
        [(level, rank)] = self._ranks(sampling, sigma[:1])
        if sigmas is None:
            self._steps = []
        elif sigmas is not self._sigmas:
            # The sampler ends at the last sigma and does not evaluate the model there.
            self._sigmas, self._steps = sigmas, self._ranks(sampling, sigmas[:-1])
        tell(
            EVENT,
            {
                "node": self.node_id,
                "workflow": self.workflow,
                "level": level,
                "rank": rank,
                "steps": self._steps,
                "schedule": asdict(self.schedule),
            },
        )

    def _ranks(self, sampling, sigmas) -> list[tuple[float, int]]:
        timesteps, T = noise_level(sampling, sigmas)
        return [(t / T, self.schedule.active_rank(t, T)) for t in timesteps.tolist()]


def _options(args, kwargs) -> dict:
    """transformer_options of APPLY_MODEL, which the host passes as the fourth argument after sigma or by name."""
    return kwargs.get("transformer_options") or (args[3] if len(args) > 3 else {})
