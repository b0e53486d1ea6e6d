"""What the pack leans on of ComfyUI that is not part of its interface for nodes, in one table, and where something has
a stand-in, the functions that read it.

ComfyUI changes such things without notice. `check` says at the start what this version lacks and what that means,
before anything fails on it.
"""

import importlib.util
import inspect
import logging
import re
import uuid
from typing import Any, NamedTuple

import torch


class Part(NamedTuple):
    """name: of a module's attribute, with dots; or after a "?", of what some code in that module uses, for attributes
    that only instances have. without: what no longer works, or works in another way, where it is missing."""

    module: str
    name: str
    without: str


_SAMPLING, _TRAINING = "T-LoRAs have no effect", "training fails"
_SLOWER = "sampling with a T-LoRA is slower"
_WEIGHTS = "nodes that save or merge models drop the T-LoRA without a word"
_KERNELS = "training fails on models whose kernels have no gradient of their own"
_MEMORY = "the memory that is free is not known, and training and sampling fail"
PARTS = (
    Part("comfy.patcher_extension", "WrappersMP.APPLY_MODEL", _SAMPLING),
    Part("comfy.patcher_extension", "WrappersMP.OUTER_SAMPLE", "layers that prepare the text have no effect"),
    Part("comfy.patcher_extension", "CallbacksMP.ON_PRE_RUN", _SAMPLING),
    Part("comfy.patcher_extension", "CallbacksMP.ON_CLEANUP", "a T-LoRA keeps its memory after a sampling"),
    Part("comfy.model_base", "BaseModel.extra_conds", "layers that prepare the text have no effect"),
    Part("comfy.model_base", "?current_patcher", _SLOWER),
    Part("comfy.model_patcher", "?current_weight_patches_uuid", _SLOWER),
    Part("comfy.model_patcher", "?hook_patches", "a T-LoRA is wrong beside a LoRA that a hook schedules"),
    Part("comfy.model_patcher", "ModelPatcher.is_dynamic", "training takes more of the card's memory than it needs"),
    Part("comfy.model_patcher", "ModelPatcher.model_size", _MEMORY),
    Part("comfy.model_patcher", "ModelPatcher.loaded_size", _MEMORY),
    Part("comfy.model_patcher", "ModelPatcher.state_dict_for_saving", _WEIGHTS),
    Part("comfy.model_patcher", "ModelPatcher.model_state_dict", _WEIGHTS),
    Part("comfy.model_patcher", "ModelPatcher.get_key_patches", _WEIGHTS),
    Part("comfy.model_patcher", "ModelPatcher.add_patches", _WEIGHTS),
    Part("comfy.model_management", "get_free_memory", _MEMORY),
    Part("comfy.model_management", "in_training", "training fails on models with faster ways that cannot be trained"),
    Part("comfy.ops", "cast_bias_weight", f"{_TRAINING}, and so does sampling in fp8 or with little memory"),
    Part("comfy.ops", "uncast_bias_weight", f"{_TRAINING}, and so does sampling in fp8 or with little memory"),
    Part("comfy.ops", "?weight_function", "a LoRA beneath a T-LoRA may be dropped where memory is short"),
    Part("comfy.ops", "?comfy_cast_weights", f"{_TRAINING}, and so does sampling in fp8 or with little memory"),
    Part("comfy.ops", "?_v", "training and sampling fail where dynamic VRAM is on"),
    Part("comfy.ops", "?_v_weight", "training fails where dynamic VRAM is on"),
    Part("comfy.quant_ops", "QuantizedTensor", "the pack does not load"),
    Part("comfy.samplers", "encode_model_conds", _TRAINING),
    Part("comfy.samplers", "cond_cat", _TRAINING),
    Part("comfy.sampler_helpers", "convert_cond", _TRAINING),
    Part("comfy.ldm.modules.attention", "attention_pytorch", "the pack does not load"),
    Part("comfy.ldm.modules.attention", "?optimized_attention_override", "training fails with some attention kernels"),
    Part("comfy.ldm.modules.attention", "BasicTransformerBlock", "the pack does not load"),
    Part("comfy.ldm.modules.diffusionmodules.openaimodel", "ResBlock", "the pack does not load"),
    Part("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel", "the pack does not load"),
    Part("comfy_kitchen", "list_backends", _KERNELS),
    Part("comfy_kitchen", "registry.get_implementation", _KERNELS),
    Part("comfy_api.torch_helpers.torch_compile", "COMPILE_KEY", "a compiled model is compiled anew at each step"),
)


def check() -> list[Part]:
    """What this ComfyUI lacks; logged in one line, if anything."""
    missing = [part for part in PARTS if not _is_there(part)]
    if missing:
        import comfyui_version

        named: dict[str, list[str]] = {}
        for part in missing:
            named.setdefault(part.without, []).append(f"{part.module}.{part.name.lstrip('?')}")
        logging.warning(
            "[T-LoRA] ComfyUI %s is not as this version of T-LoRA knows it: %s. All else works. Look for a newer "
            "version of T-LoRA.",
            comfyui_version.__version__,
            "; ".join(f"without {' and '.join(names)}, {without}" for without, names in named.items()),
        )
    return missing


def _is_there(part: Part) -> bool:
    if importlib.util.find_spec(part.module.partition(".")[0]) is None:
        return True  # a package that is not installed, so that the host does without it, too
    try:
        found = importlib.import_module(part.module)
        if part.name.startswith("?"):
            return re.search(rf"\b{part.name[1:]}\b", inspect.getsource(found)) is not None
        for name in part.name.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return False
    except OSError:  # a ComfyUI without its source
        pass
    return True


def sampling_patcher(base) -> Any:
    """The patcher that samples with the model `base`, and knows of a change of its weights; None outside of a sampling,
    and where this ComfyUI does not tell."""
    return getattr(base, "current_patcher", None) if hasattr(base, "current_weight_patches_uuid") else None


def weights_uuid(base) -> uuid.UUID | None:
    """The identity of the patches in the weights of `base`, which is another one after each change."""
    return getattr(base, "current_weight_patches_uuid", None)


def hook_patches(patcher) -> dict:
    """Patches of weights that follow the steps of a sampling."""
    return getattr(patcher, "hook_patches", {})


def has_compile_wrapper(patcher) -> bool:
    """Whether the host's node for torch.compile has been applied."""
    try:
        from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
    except ImportError:
        return False
    return bool(patcher.get_wrappers("apply_model", COMPILE_KEY))


def is_resident(layer: torch.nn.Module) -> bool:
    """Whether dynamic VRAM handles the layer's weight."""
    return "_v" in vars(layer)  # a module takes long to find that it lacks something


# Attributes in which dynamic VRAM keeps a layer's cast weight and bias from one use to the next.
RESIDENT = ("_v_weight", "_v_bias")
