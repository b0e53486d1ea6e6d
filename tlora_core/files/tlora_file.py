"""The T-LoRA file: a safetensors file that other programs can load as a plain LoRA.

The tensors carry kohya's names, `lora_unet_<module path with _ for .>.lora_up.weight`, `.lora_down.weight` and `.alpha`
(the stored rank, so the scale is 1). Parts of fused modules carry the names that other programs use for them. Programs
without timestep masks read the full-rank update. The metadata key `tlora` holds, as JSON, the rest of what a T-LoRA
needs: the fields of TLoRAFile, with the rank of each layer in place of its tensors.
`docs/FILE_FORMAT.md` is the specification.
"""

import base64
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import TLoRAError
from ..method.adapters import METHODS, LowRank
from ..method.layer_name import LayerName
from ..method.schedule import RankSchedule
from ..version import __version__
from .atomic import HASH_TO_COME, write_tensors
from .dtypes import HEADER_DTYPES, require_dtype
from .fused_modules import can_join
from .layer_names import layer_key, named_parts, stored_keys
from .untrusted import PHRASE_KEY, check_header, check_line, one_line, printable

FORMAT_VERSION = 2  # the newest version this code reads; _metadata decides which one it writes
METADATA_KEY = "tlora"
MAX_HEIGHT = 1_000_000  # rows of a module; a file by hand could name a number that no memory can hold

_UP, _DOWN, _ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
_LAYER_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*(@[0-9]{1,9})?")
# base_model -> kohya's ss_base_model_version and ModelSpec's architecture
_ARCHITECTURES = {
    "sd15": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd20": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "flux": ("flux1", "flux-1-dev/lora"),
    "fluxschnell": ("flux1", "flux-1-schnell/lora"),
}


@dataclass(frozen=True, eq=False)
class TLoRAFile:
    """A trained T-LoRA with everything needed to apply it again.

    layers: path of a module in the diffusion model -> its update. Where a model keeps several projections in one
        module, like FLUX's q, k and v, "path@row" is the update of the module's rows from `row` on.
    method: a key of METHODS. schedule: for the full rank; schedule_of gives one layer's.
    num_timesteps: T of r(t), in the unit of noise_domain, the parameterisation of t:
        "discrete" counts training timesteps (T = 1000), "flow" is sigma itself (T = 1).
    base_model: the model family it was trained on, for example "sdxl".
    token, class_word: the prompt's "sks" and "dog".
    training: the training settings as JSON values. Stored unchanged: put no path, user name or image in it.
    heights: path of each module that layers name a part of -> all of its rows, as far as known.

    Raises TLoRAError when the fields contradict each other.
    """

    layers: Mapping[LayerName, LowRank]
    method: str
    schedule: RankSchedule
    num_timesteps: float
    noise_domain: str
    base_model: str
    token: str = ""
    class_word: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    pack_version: str = __version__
    heights: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", {LayerName(name): layer for name, layer in self.layers.items()})
        _check_fields(self)
        _check_layers(self)

    @property
    def phrase(self) -> str:
        """The words that stand for the subject in prompts; empty if unknown."""
        return f"{self.token} {self.class_word}".strip()

    def schedule_of(self, name: str) -> RankSchedule:
        """The schedule of one layer, whose rank may be smaller than the file's."""
        return self.schedule.for_rank(self.layers[LayerName(name)].rank)

    @property
    def note(self) -> str:
        """A sentence for the user if other programs cannot find all of the file's layers; else empty."""
        named = named_parts(self.layers, self.base_model)
        lost = {name for name in self.layers if name.is_part and name not in named}
        if not lost:
            return ""
        modules = {name.path for name in lost}
        parts = {name: layer for name, layer in self.layers.items() if name.path in modules}
        can_export = can_join(parts, self.base_model, self.heights)
        return (
            f"Other programs find {len(self.layers) - len(lost)} of the file's {len(self.layers)} layers, as they have "
            "no names for parts of this model's modules"
            + ("; for them, use Export T-LoRA with the layout comfyui." if can_export else ".")
        )

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32, thumbnail: bytes | None = None) -> None:
        """Writes the file in dtype, one of DTYPES' values. An existing file is replaced atomically.

        thumbnail: a small JPEG for LoRA managers and ComfyUI's list of models; everyone who gets the file can see it.
        Raises TLoRAError when dtype cannot represent a value or the file cannot be written.
        """
        path = Path(path)
        require_dtype(dtype)
        tensors: dict[str, Tensor] = {}
        for name, key in stored_keys(self.layers, self.base_model).items():
            stored = self.layers[name].to("cpu", dtype)
            _require_finite(name, stored)
            tensors[key + _UP] = stored.up.detach().contiguous()
            tensors[key + _DOWN] = stored.down.detach().contiguous()
            tensors[key + _ALPHA] = torch.tensor(float(stored.up.shape[1]))
        metadata = _metadata(self)
        if thumbnail is not None:
            encoded = base64.b64encode(thumbnail).decode()
            metadata["modelspec.thumbnail"] = "data:image/jpeg;base64," + encoded
            metadata["ssmd_cover_images"] = json.dumps([encoded])  # ComfyUI's own list of models reads this key
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "TLoRAFile":
        """Reads and validates an untrusted file; the tensors keep the stored dtype.

        Raises TLoRAError, naming the file, when it is missing, damaged, inconsistent or not a T-LoRA.
        """
        path = Path(path)
        try:
            return _read(path)
        except TLoRAError as error:
            raise TLoRAError(f'"{path.name}": {printable(str(error))}') from error
        except (OSError, SafetensorError) as error:
            raise TLoRAError(
                f'"{path.name}": it cannot be read as a safetensors file ({one_line(error)}); '
                "check that it is there and complete, or get it again."
            ) from error


def _check_fields(file: TLoRAFile) -> None:
    if not isinstance(file.method, str) or file.method not in METHODS:
        raise TLoRAError(f"method is {file.method!r}; this version knows {', '.join(METHODS)}.")
    if not METHODS[file.method].is_masked and not file.schedule.is_constant:
        raise TLoRAError(f'The method "{file.method}" has no mask; set min_rank to the rank, {file.schedule.rank}.')
    T = file.num_timesteps
    if not isinstance(T, (int, float)) or isinstance(T, bool) or not 0 < T <= sys.float_info.max:
        raise TLoRAError(f"num_timesteps is {T!r}; it must be a finite number above 0.")
    for name in ("noise_domain", "base_model", "token", "class_word", "pack_version"):
        check_line(name, getattr(file, name))
    for name in ("noise_domain", "base_model"):
        if not getattr(file, name):
            raise TLoRAError(f"{name} is empty; without it the T-LoRA cannot be applied again.")
    heights = file.heights
    if not isinstance(heights, Mapping) or not all(type(n) is int and 0 < n <= MAX_HEIGHT for n in heights.values()):
        raise TLoRAError(f"heights is not a table of rows; pass a whole number from 1 to {MAX_HEIGHT} for each module.")
    if not isinstance(file.training, Mapping):
        raise TLoRAError("training is not a table of parameters; pass names and JSON values.")


def _check_layers(file: TLoRAFile) -> None:
    if not file.layers:
        raise TLoRAError("This T-LoRA has no layers; train or choose one that has some.")
    group = METHODS[file.method].group
    names: dict[str, str] = {}
    for name, layer in file.layers.items():
        if not _LAYER_NAME.fullmatch(name):
            raise TLoRAError(f"{name!r} is not the path of a module; paths are words joined by dots.")
        twin = names.setdefault(layer_key(name), name)
        if twin != name:
            raise TLoRAError(f'The layers "{twin}" and "{name}" share one name in the file; rename one of them.')
        if layer.group != group:
            raise TLoRAError(f'"{name}" has {layer.group} columns per component; "{file.method}" has {group}.')
    for name in file.layers:
        if name.is_part and name.path in file.layers:
            raise TLoRAError(
                f'The layer "{name.path}" has an update of all of the layer and one of its rows from {name.row} on; '
                "keep one."
            )
    largest = max(layer.rank for layer in file.layers.values())
    if largest != file.schedule.rank:
        raise TLoRAError(f"The largest layer has rank {largest}, but the schedule is for rank {file.schedule.rank}.")


def _metadata(file: TLoRAFile) -> dict[str, str]:
    content = {
        # A program that only knows format 1 would apply the formula to a file with a free curve.
        "format": 2 if file.schedule.points else 1,
        "pack_version": file.pack_version,
        "method": file.method,
        "rank": file.schedule.rank,
        "min_rank": file.schedule.min_rank,
        "alpha": file.schedule.alpha,
        **({"points": [list(point) for point in file.schedule.points]} if file.schedule.points else {}),
        "num_timesteps": file.num_timesteps,
        "noise_domain": file.noise_domain,
        "base_model": file.base_model,
        "token": file.token,
        "class_word": file.class_word,
        "training": dict(file.training),
        "layers": {name: layer.rank for name, layer in file.layers.items()},
        "keys": {
            name: key for name, key in stored_keys(file.layers, file.base_model).items() if key != layer_key(name)
        },
        **({"heights": dict(file.heights)} if file.heights else {}),
    }
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TLoRAError(f"A training parameter cannot be written as JSON ({error}); pass plain values.") from error
    return {METADATA_KEY: text, **plain_metadata(file, file.schedule.rank * METHODS[file.method].group)}


def plain_metadata(file: TLoRAFile, stored_rank: int) -> dict[str, str]:
    """The metadata that LoRA managers show: kohya's `ss_` keys and the keys of Stability's ModelSpec 1.0.0."""
    phrase, s = file.phrase, file.schedule
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(stored_rank),
        "ss_network_alpha": str(stored_rank),
        "sshs_model_hash": HASH_TO_COME,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": f"{phrase} T-LoRA".strip(),
        "modelspec.description": f"{file.method}, {s}. "
        "A program that knows nothing of timesteps applies the full rank at all of them.",
        "modelspec.hash_sha256": f"0x{HASH_TO_COME}",
        PHRASE_KEY: phrase,
        "modelspec.tags": "t-lora",
    }
    metadata |= _tags(phrase, file.training.get("images"))
    if file.base_model in _ARCHITECTURES:
        metadata["ss_base_model_version"], metadata["modelspec.architecture"] = _ARCHITECTURES[file.base_model]
    return metadata


def _tags(phrase: str, images: Any) -> dict[str, str]:
    """The trigger words where LoRA managers look for them: in kohya's caption statistics, with the phrase as the only
    caption."""
    if not phrase:
        return {}
    count = images if type(images) is int and images > 0 else 1
    frequency = {phrase: {phrase: count}}  # keyed by image folder, which kohya's users name after the words
    subset = {"img_count": count, "num_repeats": 1, "class_tokens": phrase, "is_reg": False}
    dataset = {"is_dreambooth": True, "num_train_images": count, "subsets": [subset], "tag_frequency": frequency}
    return {"ss_tag_frequency": json.dumps(frequency), "ss_datasets": json.dumps([dataset])}


def _read(path: Path) -> TLoRAFile:
    if not path.is_file():
        raise TLoRAError("there is no such file; choose one from the list or check the folder.")
    check_header(path)
    with safe_open(path, framework="pt") as opened:
        content = read_content(opened.metadata() or {})
        ranks = _field(content, "layers", dict)
        names = _names_in_file(content, ranks)
        keys = set(opened.keys())
        layers = {name: _read_layer(opened, keys, names[name], name, rank, content) for name, rank in ranks.items()}
        unnamed = keys - {key + part for key in names.values() for part in (_UP, _DOWN, _ALPHA)}
    if unnamed:
        raise TLoRAError(
            f"{len(unnamed)} of its tensors belong to no layer, for example {min(unnamed)!r}; get it again."
        )
    schedule = read_schedule(content)
    rest = ("num_timesteps", "noise_domain", "base_model", "token", "class_word", "training", "pack_version")
    fields = [_field(content, name) for name in rest]
    return TLoRAFile(layers, content["method"], schedule, *fields, heights=content.get("heights", {}))


def read_schedule(content: Mapping[str, Any]) -> RankSchedule:
    """The schedule in read_content's table. Raises TLoRAError when it is not valid."""
    rank, min_rank, alpha = (_field(content, name) for name in ("rank", "min_rank", "alpha"))
    return RankSchedule(rank, min_rank, alpha, _points(content))


def _points(content: Mapping[str, Any]) -> tuple[tuple[float, int], ...]:
    points = content.get("points", [])
    number = (int, float)
    if not isinstance(points, list) or not all(
        isinstance(p, list) and len(p) == 2 and isinstance(p[0], number) for p in points
    ):
        raise TLoRAError('its T-LoRA metadata has no valid "points"; get the file again.')
    # Clamped, as Python reads integers of any size and a float cannot represent them all.
    return tuple((float(max(min(level, 2), -1)), active) for level, active in points)


def _names_in_file(content: dict[str, Any], ranks: dict[str, Any]) -> dict[str, str]:
    """Each layer's name in the file. The metadata may list some of them; the rest follow kohya's rule."""
    listed = content.get("keys", {})
    if not isinstance(listed, dict) or not all(isinstance(key, str) for key in listed.values()):
        raise TLoRAError('its T-LoRA metadata has no valid "keys"; get the file again.')
    names = {name: listed.get(name, layer_key(name)) for name in ranks}
    if len(set(names.values())) != len(names):
        raise TLoRAError("two of its layers share their tensors; get the file again.")
    return names


def read_content(metadata: Mapping[str, str]) -> dict[str, Any]:
    """This pack's part of a file's metadata. Raises TLoRAError when it is missing, damaged, or its format or method is
    unknown to this version."""
    if METADATA_KEY not in metadata:
        raise TLoRAError("it has no T-LoRA metadata; load a plain LoRA with the Load LoRA node.")
    try:
        content = json.loads(metadata[METADATA_KEY], parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TLoRAError(f"its T-LoRA metadata is damaged ({error}); get the file again.") from error
    if not isinstance(content, dict):
        raise TLoRAError("its T-LoRA metadata is damaged (not a table); get the file again.")
    version = _field(content, "format", int)
    if isinstance(version, bool) or version < 1:
        raise TLoRAError(f"its format version is {version!r}; get the file again.")
    if version > FORMAT_VERSION:
        raise TLoRAError(
            f"it has format version {version}, but this version of T-LoRA reads up to {FORMAT_VERSION}; "
            "update the node pack."
        )
    if _field(content, "method", str) not in METHODS:
        raise TLoRAError(f"its method is {content['method']!r}; this version knows {', '.join(METHODS)}.")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _field(content: Mapping[str, Any], name: str, kind: type = object) -> Any:
    if not isinstance(content.get(name), kind) or name not in content:
        raise TLoRAError(f'its T-LoRA metadata has no valid "{name}"; get the file again.')
    return content[name]


def _read_layer(opened: Any, keys: set[str], key: str, name: str, rank: object, content: dict[str, Any]) -> LowRank:
    group = METHODS[content["method"]].group
    tensors = []
    for part in (_UP, _DOWN, _ALPHA):
        if key + part not in keys:
            raise TLoRAError(f"the tensor {key + part!r} is missing; get the file again.")
        if opened.get_slice(key + part).get_dtype() not in HEADER_DTYPES:
            raise TLoRAError(f"the tensor {key + part!r} is not in float32, bfloat16 or float16; save it in one.")
        # A copy: the memory-mapped original would keep the file from being replaced on Windows.
        tensors.append(opened.get_tensor(key + part).clone())
    up, down, alpha = tensors
    if up.dtype != down.dtype:
        raise TLoRAError(f'the two halves of the layer "{name}" differ in dtype; get the file again.')
    layer = LowRank(up, down, group)
    if isinstance(rank, bool) or layer.rank != rank:
        raise TLoRAError(f'the layer "{name}" has rank {layer.rank}, but its metadata says {rank!r}; get it again.')
    if alpha.numel() != 1 or alpha.item() != up.shape[1]:
        raise TLoRAError(f'the layer "{name}" has an alpha that is not its stored rank, {up.shape[1]}; get it again.')
    _require_finite(name, layer)
    return layer


def _require_finite(name: str, layer: LowRank) -> None:
    if not layer.is_finite:
        raise TLoRAError(
            f'The layer "{name}" has NaN or infinite values in {layer.up.dtype}; '
            "store it in float32, or train it again with a lower learning rate."
        )
