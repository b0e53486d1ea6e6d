"""The timestep-aware patch: how a T-LoRA follows the sampler.

One APPLY_MODEL wrapper per application. There the host hands over the sigma of every row of the batch, after it has
joined conditional and unconditional rows, split areas and context windows, whatever the sampler. The wrapper maps
sigma to t, t to ranks, and puts the adapters on for that one evaluation. Nothing stays on the model in between, so a
branch of the graph without the T-LoRA is untouched.

An adapter is put on in one of three ways; `benchmarks/README.md` has the figures. Folded into a copy of the layer's
weight (`folded_weight.FoldedWeight`) it costs next to nothing in time. Keys and values of the text fold into their
outputs (`folded_output.FoldedOutput`), which saves time. Else it goes beside the layer, as a low-rank product: layers
in fp8 or quantised, models that are compiled or patched by hooks, and batches whose rows differ in rank. A compiled
model gets its rank as a tensor, so that no step compiles it anew.

The three ways round differently, which in half precision shows in the picture. So which one a layer gets never depends
on how much memory is free: the same seed gives the same picture. Free memory decides only what is kept from one
evaluation to the next, copies of weights and outputs for texts. Where nothing is kept, the same numbers are computed
anew each time, in the memory of one group of layers (`group.GROUP_BYTES`). One exception: in float32 a copy that is
kept follows the rank, and rounds anew as it does, by 1e-7. So float32 copies are kept by a rule that knows only the
sizes of the model and of the device's whole memory.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...files.dtypes import DTYPES, is_plain
from ...files.tlora_file import TLoRAFile
from ...layers.folded_output import FoldedOutput, FoldedOutputs
from ...layers.folded_weight import FoldedWeights, Keeping
from ...layers.group import grouped
from ...layers.overlay import Overlay, StandIn, StandIns, is_replaced, overlaid
from ...layers.stacked import stacked
from ...layers.text_memo import Text, TextMemo
from ...method.adapters import Adapter, LowRank
from ...method.layer_name import LayerName
from ...method.schedule import RankSchedule
from .model.bypasses import call_layers_with_adapters
from .model.internals import hook_patches, sampling_patcher, weights_uuid
from .model.kept_state import nothing_kept, without_results
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
from .model.noise import noise_level, num_timesteps
from .model.weights import without_weights
from .reach import Reach
from .whole_sampling import WholeSampling


class Placed(NamedTuple):
    """A T-LoRA's adapters in the model that is evaluated: (layer, adapter, its rank, first row of the layer) of
    each. ranks: which ranks they have. layers: by module path."""

    adapters: list[tuple[torch.nn.Module, Adapter | LowRank, int, int]]
    ranks: set[int]
    layers: dict[str, torch.nn.Module]


def place(base, adapters: Mapping[LayerName, Adapter | LowRank]) -> Placed:
    """The adapters in their layers of the host's model."""
    modules = diffusion_modules(base.diffusion_model)
    layers = {name.path: modules[name.path] for name in adapters}
    placed = [(layers[name.path], adapter, adapter.rank, name.row) for name, adapter in adapters.items()]
    return Placed(placed, {adapter.rank for adapter in adapters.values()}, layers)


class TimestepAwarePatch:
    """The APPLY_MODEL wrapper of one T-LoRA, in training and in sampling. `schedule` is that of the file."""

    def __init__(self, schedule: RankSchedule):
        self.schedule = schedule

    def __call__(self, executor, x, sigma, c_concat=None, c_crossattn=None, *args, **kwargs):
        overlays, folded, text = self.evaluation(executor.class_obj, x, sigma, c_crossattn)
        base = executor.class_obj
        args = [without_results(each) if isinstance(each, dict) else each for each in args]
        with overlaid(overlays, folded, text), self.watched(base, x), nothing_kept(base):
            return executor(x, sigma, c_concat, c_crossattn if text is None else text.value, *args, **kwargs)

    def evaluation(self, base, x, sigma, text) -> tuple[list[Overlay], StandIns | None, Text | None]:
        """What is put on for one evaluation, what folds it on which layers, and the text that comes back."""
        raise NotImplementedError

    def watched(self, base, x) -> AbstractContextManager:
        """Around an evaluation: notices in the first one which layers the model calls; see `reach`."""
        raise NotImplementedError

    def overlays(self, placed: Placed, timesteps: torch.Tensor, T: float, as_tensors: bool = False) -> list[Overlay]:
        """Each adapter with the ranks of timesteps [B]. as_tensors: for torch.compile, which compiles anew for every
        int."""
        active = self.schedule.active_of_layers(placed.ranks, timesteps, T)
        if as_tensors:
            active = {rank: torch.as_tensor(each, device=timesteps.device) for rank, each in active.items()}
        return [Overlay(layer, adapter, active[rank], row) for layer, adapter, rank, row in placed.adapters]

    def to(self, target):
        """The host moves everything that has `.to` to the sampling device, then casts it to the model's dtype, which
        may be fp8, and at the end moves it off. Adapters are cast where they are used, so there is nothing to do."""
        return self


class Folds:
    """What folds T-LoRAs into the layers of one loaded model during one sampling, shared by all T-LoRAs on it."""

    _of_models: WeakKeyDictionary = WeakKeyDictionary()

    def __init__(self, base):
        self.weights_uuid = weights_uuid(base)
        self.is_compiled = is_compiled(base, sampling_patcher(base))
        self.layers: dict[torch.nn.Module, StandIn | None] = {}  # None: not to be folded
        self.texts: TextMemo | None = None  # None while no layer reads a text
        self._known: WeakSet[SamplingPatch] = WeakSet()  # weak, since a patch's copies hold the model

    @classmethod
    def of(cls, base) -> "Folds":
        folds = cls._of_models.get(base)
        # The host gives its patches a new identity whenever it patches weights anew, which it may do in place.
        if folds is None or folds.weights_uuid != weights_uuid(base):
            folds = cls._of_models[base] = cls(base)
        return folds

    @classmethod
    def forget(cls, patcher: ModelPatcher) -> None:
        """The host's ON_PRE_RUN and ON_CLEANUP callback: before every sampling and after it, also after an error or a
        cancel."""
        cls._of_models.pop(patcher.model, None)
        forget_modules(patcher)

    def prepare(self, patch: "SamplingPatch", base, x: torch.Tensor, text) -> None:
        """Before an evaluation of `base` with a T-LoRA: what folds it into its layers is there in `layers`."""
        if patch in self._known:
            return
        self._known.add(patch)
        placed, dtype = patch.placed(base, x.device), base.get_dtype_inference()
        kinds: dict[torch.nn.Module, tuple] = {}  # layers of one kind have adapters of the same sizes
        for layer, adapter, rank, row in placed.adapters:
            kinds[layer] = (*kinds.get(layer, ()), *(factor.shape for factor in adapter.factors()), rank, row)
        new = {path: layer for path, layer in placed.layers.items() if layer not in self.layers}
        room = _room(base, x) if patch.fold is None else float("inf")
        room -= self._fold_outputs(new, kinds, placed, text, dtype, room)
        foldable = [
            layer for layer in new.values() if layer not in self.layers and _is_foldable(layer, x.device, dtype)
        ]
        for is_moved, others in ((False, 0), (True, bytes_to_come(sampling_patcher(base)))):
            # Where the host moves or casts weights as they are used, there must be room for all the others too.
            layers = [layer for layer in foldable if is_cast(layer) is is_moved]
            copies = sum(layer.weight.numel() * dtype.itemsize for layer in layers)
            room -= copies
            if dtype == torch.float32 and patch.fold is None:
                keeping = Keeping(copies < _lasting_room(base, x.device))
            else:
                keeping = Keeping(others < room)
            for group in _groups(layers, kinds, dtype):
                self._add(FoldedWeights(group, fetched_weight, keeping, _is_constant(group[0])))
        self.layers |= {layer: None for layer in new.values() if layer not in self.layers}

    def _add(self, group: FoldedWeights | FoldedOutputs) -> None:
        self.layers |= zip(group.layers, group.stand_ins())

    def _fold_outputs(self, layers, kinds, placed: Placed, text, dtype, room: float) -> int:
        """Into the text's outputs, and how many bytes they take for one text."""
        of_text = [layer for path, layer in layers.items() if TEXT_LAYER.search(path) and not is_replaced(layer)]
        for group in _groups(of_text, kinds, dtype):
            self._add(FoldedOutputs(group, _is_constant(group[0])))
        hidden = [
            rank * a.group for layer, a, rank, _ in placed.adapters if isinstance(self.layers.get(layer), FoldedOutput)
        ]
        if not hidden or not isinstance(text, torch.Tensor):
            return 0
        numbers = sum(hidden) + sum(layer.out_features for layer in of_text)
        self.texts = self.texts or TextMemo(room=room)
        self.texts.bytes_per_token += numbers * dtype.itemsize
        return text.shape[:-1].numel() * numbers * dtype.itemsize


def _groups(layers: Sequence[torch.nn.Module], kinds: Mapping[torch.nn.Module, tuple], dtype: torch.dtype):
    """The layers in groups to be folded together. One whose numbers might follow the timestep is in none of others,
    since these are made ahead of their use."""
    return grouped(
        layers,
        lambda layer: (kinds[layer], layer.in_features, layer.out_features, _is_constant(layer) or layer),
        lambda layer: layer.in_features * layer.out_features * dtype.itemsize,
    )


def _room(base, x: torch.Tensor) -> float:
    """Bytes that the evaluation of x leaves free. Other models' weights count as free where the host takes them off the
    device when their memory is asked for."""
    patcher, free = sampling_patcher(base), comfy.model_management.get_free_memory(x.device)
    # Hosts without that method take nothing off by themselves.
    with_evictable = patcher.get_free_memory(x.device) if hasattr(patcher, "get_free_memory") else free
    own = patcher.loaded_size()  # counted as evictable too, but needed
    return free + max(0, with_evictable - free - own) - base.memory_required(list(x.shape))


def _lasting_room(base, device: torch.device) -> float:
    """Bytes for copies of weights by what does not change from one sampling to the next."""
    return (comfy.model_management.get_total_memory(device) - sampling_patcher(base).model_size()) / 4


def fetched_weight(layer: torch.nn.Module, like: torch.Tensor):
    """For the length of a block, the layer's weight and bias as its own forward would use them on `like`; None where it
    uses them as they are."""
    return fetched(layer, like) if is_cast(layer) else None


def _is_constant(layer: torch.nn.Module) -> bool:
    """Whether nothing else, which might follow the timestep too, has a hand in what the layer makes of its input."""
    functions = getattr(layer, "weight_function", ()), getattr(layer, "bias_function", ())
    return not any(functions)


def _is_foldable(layer: torch.nn.Module, device, dtype) -> bool:
    """Whether the layer's own forward is just its weight times the input, and a copy of that not many times what is
    stored of it."""
    weight = layer.weight
    return (
        isinstance(layer, torch.nn.Linear)
        and not is_replaced(layer)
        and is_plain(weight)
        and dtype in DTYPES.values()
        and (is_cast(layer) or (weight.device == device and weight.dtype == dtype))
    )


class SamplingPatch(TimestepAwarePatch):
    """`TimestepAwarePatch` of a stored T-LoRA, scaled by strength. Its device copies are made once a sampling and do
    not
    outlast it: of a sweep's models, each with its own, one samples at a time, and with --highvram or --gpu-only the
    host leaves idle ones on the GPU.

    fold: whether it folds where a layer allows that. None keeps what it folds into as memory allows, True always does.
    tell: gets what a user must know of layers that do not follow the noise level.
    """

    def __init__(
        self,
        tlora: TLoRAFile,
        strength: float,
        fold: bool | None = None,
        tell: Callable[[str], object] | None = None,
    ):
        super().__init__(tlora.schedule)
        self.layers, self.strength, self.fold = tlora.layers, strength, fold
        self.reach = Reach(tell)
        self._placed: dict[tuple, Placed] = {}

    def evaluation(self, base, x, sigma, text):
        placed = self.placed(base, x.device)
        timesteps, T = noise_level(base.model_sampling, sigma)
        patcher = sampling_patcher(base)
        if patcher is None:
            return self.overlays(placed, timesteps, T), None, None
        folds = Folds.of(base)
        overlays = self.overlays(placed, timesteps, T, as_tensors=folds.is_compiled)
        if self.fold is False or hook_patches(patcher) or any(isinstance(o.active, torch.Tensor) for o in overlays):
            return overlays, None, None
        folds.prepare(self, base, x, text)
        if folds.texts is None or not isinstance(text, torch.Tensor):
            return overlays, folds.layers, None
        return overlays, folds.layers, folds.texts.find(text, x.device, base.get_dtype_inference())

    def watched(self, base, x):
        if sampling_patcher(base) is not None and Folds.of(base).is_compiled:
            return nullcontext()  # what watches a compiled block would make it be compiled anew
        return self.reach.evaluating(self.placed(base, x.device).layers)

    @contextmanager
    def full_rank(self, patcher: ModelPatcher):
        """Within the block, all layers have all their components."""
        placed = self.placed(patcher.model, patcher.load_device)
        overlays = [Overlay(layer, adapter, rank, row) for layer, adapter, rank, row in placed.adapters]
        with overlaid(overlays), self.reach.preparing(placed.layers):
            yield

    def placed(self, base, device: torch.device) -> Placed:
        key = base, device, base.get_dtype_inference()
        if key not in self._placed:
            # Copies that autograd accepts, since another T-LoRA may be trained on the patched model. What nodes make
            # is not.
            with torch.inference_mode(False):
                copies = stacked(self._in_order(base), self.strength, *key[1:])
            self._placed[key] = place(base, copies)
        return self._placed[key]

    def _in_order(self, base) -> dict[LayerName, LowRank]:
        """The updates in the order of the model's modules, which as a rule is that of their use: layers are folded
        together with those that follow. Text layers are last, and those with several updates apart from those with one,
        so that what is folded together is evenly spaced in a stack."""
        order = {path: i for i, path in enumerate(diffusion_modules(base.diffusion_model))}
        counts = Counter(name.path for name in self.layers)

        def place(name: LayerName) -> tuple:
            return bool(TEXT_LAYER.search(name.path)), counts[name.path], order[name.path], name.row

        return {name: self.layers[name] for name in sorted(self.layers, key=place)}

    def to(self, target):
        """Where the adapters are moved, copies are made anew."""
        if isinstance(target, torch.device):
            self._placed.clear()
        return self

    def forget(self, patcher: ModelPatcher) -> None:
        """The host's ON_PRE_RUN and ON_CLEANUP callback. It calls `to` with the device of idle models too, but not for
        each model of a sampling."""
        self._placed.clear()


def apply_tlora(
    model: ModelPatcher,
    tlora: TLoRAFile,
    strength: float = 1.0,
    fold: bool | None = None,
    tell: Callable[[str], object] | None = None,
) -> ModelPatcher:
    """A clone of `model` that samples with the T-LoRA; `model` itself is untouched. `fold`, `tell`: see SamplingPatch.
    Nodes that would save or combine its weights stop with an error; see `weights`.

    Raises TLoRAError when the T-LoRA does not fit the model: a layer that is missing or has another shape, or a noise
    schedule whose timestep is unknown.
    """
    patched = model.clone()
    if strength == 0:
        return patched
    check_layers(model, tlora)
    sampling = model.get_model_object("model_sampling")
    num_timesteps(sampling)
    # A key of its own for each application: the host appends wrappers of one key, and clones share keys.
    key = f"tlora-{uuid.uuid4()}"
    patch = SamplingPatch(tlora, strength, fold, tell)
    call_layers_with_adapters()
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, patch)
    for moment in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
        patched.add_callback_with_key(moment, key, patch.forget)
        patched.add_callback_with_key(moment, key, Folds.forget)
    WholeSampling(patch.full_rank).put_on(patched, key)
    return without_weights(patched)
