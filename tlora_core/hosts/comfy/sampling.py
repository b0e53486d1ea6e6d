"""The timestep-aware patch: how a T-LoRA follows the sampler.

One APPLY_MODEL wrapper per application. There the host hands over the sigma of every row of the batch, after it has
joined conditional and unconditional rows, split areas and context windows, whatever the sampler. The wrapper maps
sigma to t, t to ranks, and puts the adapters on for that one evaluation. Nothing stays on the model in between, so a
branch of the graph without the T-LoRA is untouched.

An adapter is put on in one of three ways, chosen for each layer at each sampling; `benchmarks/README.md` has the
figures. Folded into a copy of the layer's weight (`folded.FoldedWeight`) it costs next to nothing in time, and the
weight's size in memory. Keys and values of the text fold into their outputs (`folded.FoldedOutput`), which saves time
and takes little memory. Else it goes beside the layer, as a low-rank product, which costs time at every evaluation but
no memory beyond the adapter's own. Copies are made where memory allows; layers in fp8 or quantised, or with another
LoRA that the host adds as it fetches their weights, models that are compiled or patched by hooks, and batches whose
rows differ in rank get the product; a compiled model gets its rank as a tensor, so that no step compiles it anew.
"""

import uuid
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...files.layer_names import split_name
from ...files.tlora_file import TLoRAFile
from ...layers.folded import Folded, FoldedOutput, FoldedWeight, Inputs, Term, folded
from ...layers.overlay import Attachment, Factors, attached, is_replaced
from ...method.adapters import LowRank
from ...method.schedule import RankSchedule
from .model.layers import (
    TEXT_LAYER,
    bytes_to_come,
    check_layers,
    diffusion_modules,
    fetched,
    forget_modules,
    is_cast,
    is_compiled,
)
from .model.noise import noise_level
from .model.weights import without_weights


class TimestepAwarePatch:
    """The APPLY_MODEL wrapper of one T-LoRA, in training and in sampling.

    `adapters(device, dtype)` gives the adapter of each module path; `schedule` that of the file."""

    def __init__(self, adapters: Callable[[torch.device, torch.dtype], Mapping[str, Factors]], schedule: RankSchedule):
        self.adapters, self.schedule = adapters, schedule

    def __call__(self, executor, x, sigma, *args, **kwargs):
        base = executor.class_obj
        timesteps, T = self.noise_level(base, sigma)
        modules = diffusion_modules(base.diffusion_model)
        adapters = self.adapters(x.device, base.get_dtype_inference())
        active = {rank: self.active(base, rank, timesteps, T) for rank in {a.rank for a in adapters.values()}}
        foldable = self.foldable(base, modules, adapters, x) if all(isinstance(a, int) for a in active.values()) else {}
        beside, within = [], []
        for name, adapter in adapters.items():
            path, row = split_name(name)
            if path in foldable:
                within.append((foldable[path], Term(*adapter.factors(), active[adapter.rank] * adapter.group, row)))
            else:
                beside.append(Attachment(modules[path], adapter, active[adapter.rank], row))
        with folded(self, within), attached(beside):
            return executor(x, sigma, *args, **kwargs)

    def noise_level(self, base, sigma) -> tuple[torch.Tensor, float]:
        """(t [B], T) of an evaluation at sigma [B]."""
        return noise_level(base.model_sampling, sigma)

    def foldable(self, base, modules, adapters, x) -> Mapping[str, Folded]:
        """The layers, by module path, whose adapter may be folded in this evaluation."""
        return {}

    def active(self, base, rank, timesteps, T) -> int | torch.LongTensor:
        """How many components of a layer of `rank` are on in this evaluation: see masking.add_low_rank."""
        return self.schedule.active_of_layer(rank, timesteps, T, timesteps.device)

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
            # Copies that autograd accepts, since another T-LoRA may be trained on the patched model. What nodes make is
            # not.
            with torch.inference_mode(False):
                self._copies[key] = {
                    path: LowRank(
                        (layer.up * self.strength).to(device, dtype),
                        layer.down.to(device, dtype, copy=True),
                        layer.group,
                    )
                    for path, layer in self.layers.items()
                }
        return self._copies[key]

    def forget(self) -> None:
        self._copies.clear()


class Folds:
    """The folded layers of one loaded model during one sampling, shared by all T-LoRAs on it."""

    _of_models: WeakKeyDictionary = WeakKeyDictionary()

    def __init__(self, base):
        self.weights_uuid = base.current_weight_patches_uuid
        self.is_compiled = is_compiled(base, base.current_patcher)
        self.layers: dict[str, Folded | None] = {}  # None: not to be folded
        self.inputs = Inputs()

    @classmethod
    def of(cls, base) -> "Folds":
        folds = cls._of_models.get(base)
        # The host gives its patches a new identity whenever it patches weights anew, which it may do in place.
        if folds is None or folds.weights_uuid != base.current_weight_patches_uuid:
            folds = cls._of_models[base] = cls(base)
        return folds

    @classmethod
    def forget(cls, patcher: ModelPatcher) -> None:
        """The host's ON_PRE_RUN and ON_CLEANUP callback: before every sampling and after it, also after an error or a
        cancel."""
        cls._of_models.pop(patcher.model, None)
        forget_modules(patcher)

    def add(self, base, layers: Mapping[str, torch.nn.Module], x: torch.Tensor, dtype, must: bool) -> None:
        """Decide on layers not met before: all that can be folded, if the memory for their copies is there; where the
        host moves or casts weights as they are used, beside all of these."""
        room = comfy.model_management.get_free_memory(x.device) - base.memory_required(list(x.shape))
        plain, cast = [], []
        for path, layer in layers.items():
            self.layers[path] = (
                FoldedOutput(layer, self.inputs) if TEXT_LAYER.search(path) and _is_constant(layer) else None
            )
            if self.layers[path] is None and _is_foldable(layer, x.device, dtype):
                (cast if is_cast(layer) else plain).append(path)
        for paths, fetch, others in ((plain, None, 0), (cast, fetched, bytes_to_come(base.current_patcher))):
            room -= sum(layers[path].weight.numel() * dtype.itemsize for path in paths)
            if must or others < room:
                self.layers |= {path: FoldedWeight(layers[path], fetch) for path in paths}


def _is_constant(layer: torch.nn.Module) -> bool:
    """Whether nothing else, which might follow the timestep too, has a hand in what the layer makes of its input."""
    functions = getattr(layer, "weight_function", ()), getattr(layer, "bias_function", ())
    return not is_replaced(layer) and not any(functions)


_PRECISE = (torch.float32, torch.bfloat16, torch.float16)


def _is_foldable(layer: torch.nn.Module, device, dtype) -> bool:
    """Whether the layer's own forward is just its weight times the input, and a copy of that not many times what is
    stored of it."""
    weight = layer.weight
    return (
        isinstance(layer, torch.nn.Linear)
        and _is_constant(layer)
        and type(weight.data) is torch.Tensor
        and weight.dtype in _PRECISE
        and dtype in _PRECISE
        and (is_cast(layer) or (weight.device == device and weight.dtype == dtype))
    )


def _own_copy(text, device, dtype):
    """The text as the model's layers get it, in a tensor that counts changes in place, which `folded.Inputs` goes
    by."""
    if not isinstance(text, torch.Tensor) or (
        not text.is_inference() and text.dtype == dtype and text.device == device
    ):
        return text
    with torch.inference_mode(False):
        return text.to(device, dtype, copy=True)


class SamplingPatch(TimestepAwarePatch):
    """`TimestepAwarePatch` of a stored T-LoRA. Its device copies are made once a sampling and do not outlast it: of a
    sweep's models, each with its own, one samples at a time, and with --highvram or --gpu-only the host leaves idle
    ones on the GPU.

    fold: None lets memory decide, True folds wherever a layer allows it, False never does.
    """

    def __init__(self, tlora: TLoRAFile, strength: float, fold: bool | None = None):
        super().__init__(DeviceCopies(tlora.layers, strength), tlora.schedule)
        self.fold = fold

    def __call__(self, executor, x, sigma, c_concat=None, c_crossattn=None, *args, **kwargs):
        text = _own_copy(c_crossattn, x.device, executor.class_obj.get_dtype_inference())
        return super().__call__(executor, x, sigma, c_concat, text, *args, **kwargs)

    def active(self, base, rank, timesteps, T):
        active = super().active(base, rank, timesteps, T)
        is_compiled = base.current_patcher is not None and Folds.of(base).is_compiled
        return torch.tensor(active, device=timesteps.device) if is_compiled and isinstance(active, int) else active

    def foldable(self, base, modules, adapters, x):
        patcher = base.current_patcher  # set while sampling only
        if self.fold is False or patcher is None or patcher.hook_patches:
            return {}
        folds = Folds.of(base)
        folds.inputs.new_evaluation()
        paths = {split_name(name)[0] for name in adapters}
        if not paths <= folds.layers.keys():
            new = {path: modules[path] for path in paths - folds.layers.keys()}
            folds.add(base, new, x, base.get_dtype_inference(), must=self.fold is True)
        return {
            path: fold for path, fold in folds.layers.items() if fold is not None and fold.is_current and path in paths
        }

    def to(self, target):
        """Where the adapters are moved, copies are made anew."""
        if isinstance(target, torch.device):
            self.adapters.forget()
        return self

    def forget_copies(self, patcher: ModelPatcher) -> None:
        """The host's ON_CLEANUP callback. It calls `to` with the device of idle models too, but not for each model of a
        sampling."""
        self.adapters.forget()


def apply_tlora(model: ModelPatcher, tlora: TLoRAFile, strength: float = 1.0, fold: bool | None = None) -> ModelPatcher:
    """A clone of `model` that samples with the T-LoRA; `model` itself is untouched. `fold`: see SamplingPatch. Nodes
    that would save or combine its weights stop with an error; see `weights`.

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
    key = f"tlora-{uuid.uuid4()}"
    patch = SamplingPatch(tlora, strength, fold)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, patch)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, patch.forget_copies)
    for moment in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
        patched.add_callback_with_key(moment, key, Folds.forget)
    return without_weights(patched)
