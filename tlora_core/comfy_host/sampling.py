"""The timestep-aware patch: how a T-LoRA follows the sampler.

One APPLY_MODEL wrapper per application. There the host hands over the sigma of every row of the batch, after it has
joined conditional and unconditional rows, split areas and context windows, whatever the sampler. The wrapper maps
sigma to t, t to ranks, and attaches the adapters for that one evaluation. Nothing stays on the model in between, so a
branch of the graph without the T-LoRA is untouched.
"""
import uuid
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..adapters import LowRank
from ..attach import Attachment, Factors, attached
from ..errors import TLoRAError
from ..file import TLoRAFile
from ..schedule import RankSchedule
from .noise import noise_level

_modules: WeakKeyDictionary = WeakKeyDictionary()


def diffusion_modules(diffusion_model: torch.nn.Module) -> Mapping[str, torch.nn.Module]:
    """The model's modules by path, looked up once a model. Sees through torch.compile's wrapper."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    if model not in _modules:
        _modules[model] = dict(model.named_modules())
    return _modules[model]


class TimestepAwarePatch:
    """The APPLY_MODEL wrapper of one T-LoRA, in training and in sampling.

    `adapters(device, dtype)` gives the adapter of each module path; `schedule` that of the file. `on_evaluation`, where
    given, is told (timesteps [B], active rank or ranks) at each evaluation.
    """

    def __init__(self, adapters: Callable[[torch.device, torch.dtype], Mapping[str, Factors]], schedule: RankSchedule,
                 on_evaluation: Callable | None = None):
        self.adapters, self.schedule, self.on_evaluation = adapters, schedule, on_evaluation

    def __call__(self, executor, x, sigma, *args, **kwargs):
        base = executor.class_obj
        timesteps, T = noise_level(base.model_sampling, sigma)
        modules = diffusion_modules(base.diffusion_model)
        adapters = self.adapters(x.device, base.get_dtype_inference())
        active = {rank: self._active(rank, timesteps, T) for rank in {a.rank for a in adapters.values()}}
        if self.on_evaluation is not None:
            self.on_evaluation(timesteps, self._active(self.schedule.rank, timesteps, T))
        with attached(Attachment(modules[path], adapter, active[adapter.rank]) for path, adapter in adapters.items()):
            return executor(x, sigma, *args, **kwargs)

    def _active(self, rank, timesteps, T):
        ranks = self.schedule.for_rank(rank).active_ranks(timesteps, T)
        first = int(ranks[0])
        return first if bool((ranks == first).all()) else ranks

    def to(self, target):
        """The host moves everything that has `.to` to the sampling device, then casts it to the model's dtype, which
        may be fp8, and at the end moves it off. Adapters are cast where they are used, so there is nothing to do."""
        return self


class DeviceCopies:
    """A T-LoRA's tensors, scaled by strength, on whatever device and dtype an evaluation needs."""

    def __init__(self, layers: Mapping[str, LowRank], strength: float):
        self.layers, self.strength = layers, strength
        self._copies: dict = {}

    def __call__(self, device, dtype) -> Mapping[str, LowRank]:
        key = (device, dtype)
        if key not in self._copies:
            # Copies that autograd accepts, since another T-LoRA may be trained on the patched model. What nodes make is not.
            with torch.inference_mode(False):
                self._copies[key] = {
                    path: LowRank((layer.up * self.strength).to(device, dtype), layer.down.to(device, dtype, copy=True),
                                  layer.group)
                    for path, layer in self.layers.items()}
        return self._copies[key]


class SamplingPatch(TimestepAwarePatch):
    """`TimestepAwarePatch` of a stored T-LoRA; frees its device copies when the host moves models off."""

    def __init__(self, tlora: TLoRAFile, strength: float):
        super().__init__(DeviceCopies(tlora.layers, strength), tlora.schedule)

    def to(self, target):
        if isinstance(target, torch.device) and target.type == "cpu":
            copies = self.adapters._copies
            for key in [k for k in copies if k[0].type != "cpu"]:
                copies.pop(key, None)
        return self


def apply_tlora(model: ModelPatcher, tlora: TLoRAFile, strength: float = 1.0) -> ModelPatcher:
    """A clone of `model` that samples with the T-LoRA; `model` itself is untouched.

    Raises TLoRAError when the T-LoRA does not fit the model: a layer that is missing or has another shape, or a noise
    schedule whose timestep is unknown.
    """
    patched = model.clone()
    if strength == 0:
        return patched
    check_layers(model, tlora)
    sampling = model.get_model_object("model_sampling")
    noise_level(sampling, sampling.sigma_max.reshape(1))
    # A key of its own for each application: the host appends wrappers of one key, and clones share keys.
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"tlora-{uuid.uuid4()}", SamplingPatch(tlora, strength))
    return patched


def check_layers(model: ModelPatcher, tlora: TLoRAFile) -> None:
    modules = diffusion_modules(model.model.diffusion_model)
    missing = [path for path in tlora.layers if not isinstance(modules.get(path), torch.nn.Linear)]
    if missing:
        raise TLoRAError(
            f"This T-LoRA was made for another model ({tlora.base_model}): {len(missing)} of its {len(tlora.layers)} "
            f"layers are not in this one, the first being {missing[0]}; connect the kind of model it was trained on.")
    for path, layer in tlora.layers.items():
        have, want = (layer.up.shape[0], layer.down.shape[1]), tuple(modules[path].weight.shape)
        if have != want:
            raise TLoRAError(
                f"This T-LoRA was made for another model ({tlora.base_model}): its layer {path} is "
                f"{have[0]}x{have[1]} and the model's {want[0]}x{want[1]}; connect the kind of model it was trained on.")
