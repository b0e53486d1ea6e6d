"""T-LoRAs in diffusers' pipelines of SD1.5, SD2, SDXL and FLUX: `load` a file, `apply` it.

    tlora = tlora_core.load("my_subject.safetensors", pipe)
    handle = tlora_core.apply(pipe, tlora)
    picture = pipe("a photo of sks dog on the moon").images[0]

The ranks follow the timestep that the pipeline passes to its denoiser (the U-Net or transformer), read by torch hooks
on that module. Any scheduler, guidance and pipeline around this denoiser works. diffusers itself is not imported.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TLoRAError
from ..files.dtypes import is_plain
from ..files.foreign import ModelDescription, load_any
from ..files.foreign.diffusers_layout import Rows, describe_layout, overlap, rows_by_path
from ..files.layer_fit import check_fit
from ..files.tlora_file import TLoRAFile
from ..layers.overlay import Overlay, overlaid
from ..method.adapters import LowRank
from ..method.layer_name import LayerName
from ..method.schedule import RankSchedule
from ..method.starts import exact_device


def load(
    path: str | Path,
    pipe: Any = None,
    min_rank: int | None = None,
    alpha: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> TLoRAFile:
    """Reads a LoRA or T-LoRA file of any known kind. Unmatched keys and assumptions are logged as a warning.

    pipe: the diffusers pipeline that the file must fit; LyCORIS files need it. The rest is as in `foreign.load_any`.
    Raises TLoRAError, naming the file, when it is missing, damaged, of no known kind, or does not fit.
    """
    loaded = load_any(path, None if pipe is None else _describe(_denoiser_of(pipe)), min_rank, alpha, progress)
    if loaded.unmatched or loaded.notes:
        logging.getLogger(__name__).warning("%s\n%s", Path(path).name, loaded.report)
    return loaded.tlora


def apply(pipe: Any, tlora: TLoRAFile, strength: float = 1.0) -> "Handle":
    """Makes a diffusers pipeline generate with a T-LoRA until the handle is removed. Several T-LoRAs add up.

    The model's weights and modules stay as they are: each evaluation puts the T-LoRA beside its layers and takes it
    off. After a keyboard interrupt, the next evaluation or the removal takes it off.
    Raises TLoRAError when the pipeline's model is of another kind, compiled, or has other layers than the T-LoRA's.
    """
    denoiser = _denoiser_of(pipe)
    return Handle(denoiser, _Applied(pipe, tlora.schedule, _updates(denoiser, tlora, strength)))


class Handle:
    """A T-LoRA on a pipeline. As a context manager, it removes the T-LoRA at the end of the block."""

    def __init__(self, denoiser: nn.Module, applied: "_Applied"):
        self._denoiser, self._applied = denoiser, applied
        self._patched = _Patched.of(denoiser)
        self._patched.applied.append(applied)

    def remove(self) -> None:
        """Removes the T-LoRA. Calling it again does no harm."""
        self._patched.remove(self._denoiser, self._applied)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_) -> None:
        self.remove()


_Update = tuple[nn.Linear, LowRank, int]  # a layer of the denoiser, its update, and the update's first row


class _Applied:
    """One T-LoRA on one pipeline."""

    def __init__(self, pipe: Any, schedule: RankSchedule, updates: list[_Update]):
        self.pipe, self.schedule, self.updates = pipe, schedule, updates
        self._copies_for, self._copies = None, updates

    def overlays(self, kind: str, timestep: object, sample: Tensor) -> list[Overlay]:
        """The overlays for an evaluation on sample [B, ...] at timestep, in the form that this kind of denoiser
        receives: a number, [] or [B]."""
        t, T = _noise_level(self.pipe, kind, torch.as_tensor(timestep).detach().to("cpu", torch.float32).reshape(-1))
        t = t.expand(len(sample)) if len(t) == 1 else t
        active = self.schedule.active_of_layers({update.rank for _, update, _ in self.updates}, t, T)
        copies = self._on(sample.device, sample.dtype)
        return [Overlay(layer, update, active[update.rank], row) for layer, update, row in copies]

    def _on(self, device: torch.device, dtype: torch.dtype) -> list[_Update]:
        if self._copies_for != (device, dtype):
            self._copies_for = device, dtype
            self._copies = [(layer, update.to(device, dtype), row) for layer, update, row in self.updates]
        return self._copies


class _Patched:
    """A denoiser with T-LoRAs: puts all of them on for each evaluation, and takes them off.

    It uses torch's own hooks, because code that offloads or moves models replaces `forward` and later restores the one
    it found.
    """

    _NAME = "_tlora"  # the denoiser's attribute that holds this object

    def __init__(self, denoiser: nn.Module):
        kind = _kind(denoiser)
        assert kind is not None  # `_denoiser_of` has checked it
        self.kind = kind
        self.applied: list[_Applied] = []
        self.evaluation = ExitStack()
        self.hooks = (
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after, always_call=True),
        )

    @classmethod
    def of(cls, denoiser: nn.Module) -> "_Patched":
        if cls._NAME not in denoiser.__dict__:
            denoiser.__dict__[cls._NAME] = cls(denoiser)
        return denoiser.__dict__[cls._NAME]

    def remove(self, denoiser: nn.Module, applied: _Applied) -> None:
        if applied not in self.applied:
            return
        self.evaluation.close()
        self.applied.remove(applied)
        if not self.applied:
            for hook in self.hooks:
                hook.remove()
            denoiser.__dict__.pop(self._NAME, None)

    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.evaluation.close()  # torch skips `_after` after a keyboard interrupt
        sample, timestep = (args[i] if i < len(args) else kwargs[name] for i, name in _INPUTS[self.kind])
        every = [one for applied in self.applied for one in applied.overlays(self.kind, timestep, sample)]
        self.evaluation.enter_context(overlaid(every))

    def _after(self, *_) -> None:
        self.evaluation.close()


# The denoisers' classes -> position and name of `forward`'s first input and of its timestep.
_INPUTS = {
    "UNet2DConditionModel": ((0, "sample"), (1, "timestep")),
    "FluxTransformer2DModel": ((0, "hidden_states"), (3, "timestep")),
}


def _kind(denoiser: object) -> str | None:
    return next((cls.__name__ for cls in type(denoiser).__mro__ if cls.__name__ in _INPUTS), None)


def _denoiser_of(pipe: Any) -> nn.Module:
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    denoiser = next((part for part in parts if part is not None), None)
    if hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None):
        raise TLoRAError(
            "pipe's model is compiled, and the ranks change from step to step; use it without torch.compile."
        )
    kind = _kind(denoiser)
    if denoiser is None or kind is None:
        raise TLoRAError(
            f"pipe is a {type(pipe).__name__}, whose model T-LoRA does not know; use a pipeline of SD1.5, SD2, SDXL "
            f"or FLUX."
        )
    if any(_is_fused(module, kind) for module in denoiser.modules()):
        raise TLoRAError("pipe's attention projections are fused; call pipe.unfuse_qkv_projections() first.")
    return denoiser


def _is_fused(module: nn.Module, kind: str) -> bool:
    """Whether q, k and v come from one layer instead of the three named ones. The U-Net's attention keeps its flag on
    after it is unfused, so there the processor decides."""
    if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
        return True
    return kind == "FluxTransformer2DModel" and getattr(module, "fused_projections", False)


def _noise_level(pipe: Any, kind: str, t: Tensor) -> tuple[Tensor, float]:
    """(t, T) of the timesteps [B] that a denoiser of this kind receives. Raises TLoRAError if their meaning is
    unknown."""
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    if kind == "FluxTransformer2DModel":
        T = 1.0
    elif _gives_log_sigma(scheduler, config):
        low, high = config.get("sigma_min"), config.get("sigma_max")
        if not low or not high:
            raise TLoRAError(
                f"pipe.scheduler, a {type(scheduler).__name__}, does not tell its sigma_min and sigma_max, so the "
                "noise level of its timesteps is unknown; set them in its config."
            )
        low, high = torch.tensor([low, high], dtype=torch.float32).log()
        return ((4 * t - low) / (high - low)).clamp(0, 1), 1.0
    else:
        T = config.get("num_train_timesteps")
    if not T or not bool(((t >= 0) & (t <= T)).all()):
        raise TLoRAError(
            f"The timestep {t.tolist()} that pipe gives its model is not in 0 to {T}, so its noise level is unknown; "
            "use a scheduler for this model."
        )
    return t, float(T)


def _gives_log_sigma(scheduler: Any, config: Mapping[str, Any]) -> bool:
    """Whether timesteps are log(sigma) / 4, as EDM's are."""
    is_continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return is_continuous or hasattr(scheduler, "precondition_noise")


def _linears(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by diffusers' name, even where PEFT has put other adapters around a layer."""
    modules = denoiser.named_modules()
    return {name.removesuffix(".base_layer"): module for name, module in modules if isinstance(module, nn.Linear)}


def _shapes(linears: Mapping[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    return {name: (layer.out_features, layer.in_features) for name, layer in linears.items()}


def _describe(denoiser: nn.Module) -> ModelDescription:
    linears = _linears(denoiser)
    shapes = _shapes(linears)
    rows = rows_by_path(shapes)
    device = exact_device(next(denoiser.parameters()).device)
    return describe_layout(rows, shapes, lambda name, count: _weight(linears, rows, name, count), device)


def _weight(linears: Mapping[str, nn.Linear], rows: Mapping[str, list[Rows]], name: LayerName, count: int) -> Tensor:
    pieces = []
    for part, wanted, first in overlap(rows[name.path], name.row, name.row + count):
        weight = linears[part.module].weight.detach()
        if weight.is_meta or not is_plain(weight):
            raise TLoRAError(
                f"its base term is not stored and cannot be recomputed, since pipe's weight {part.module} is quantised "
                f"or offloaded ({weight.dtype}); load the pipeline in float16, bfloat16 or float32 and without "
                "offloading."
            )
        pieces.append(weight[first : first + wanted.stop - wanted.start].float())
    return torch.cat(pieces)


def _updates(denoiser: nn.Module, tlora: TLoRAFile, strength: float) -> list[_Update]:
    """The T-LoRA's updates on the denoiser's layers. Raises TLoRAError if they do not fit."""
    linears = _linears(denoiser)
    rows, updates = rows_by_path(_shapes(linears)), []
    check_fit(tlora, {path: (parts[-1].stop, linears[parts[0].module].in_features) for path, parts in rows.items()})
    for name, layer in tlora.layers.items():
        for part, wanted, first in overlap(rows[name.path], name.row, name.row + layer.shape[0]):
            update = LowRank(layer.up[wanted] * strength, layer.down, layer.group)
            updates.append((linears[part.module], update, first))
    return updates
