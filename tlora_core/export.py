"""T-LoRAs in the layouts of other programs.

"kohya", "diffusers" and "comfyui" are plain LoRAs that differ in their names: they apply all ranks at every timestep, which
is not what a T-LoRA was trained for. "reference" is the layout of the paper's own code, which applies the mask again.
"""

import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .adapters import METHODS, LowRank
from .errors import TLoRAError
from .file import DTYPES, TLoRAFile, plain_metadata
from .names import diffusers_name, family_of, part_number, processor_name, split_name
from .writing import write_tensors, write_whole

Tensors = dict[str, Tensor]

# FLUX's fused modules: what they join, in widths of the input, from the first row on.
_FUSED = {"qkv": (1, 1, 1), "linear1": (1, 1, 1, 4)}


def export(tlora: TLoRAFile, path: str | Path, layout: str, dtype: torch.dtype = torch.float16) -> Path:
    """Writes tlora in a layout, one of LAYOUTS, in dtype, one of file.DTYPES' values; returns the path of the weights.

    "reference" makes a folder named like path, as the reference's trainer does: checkpoint-<steps>/ with the weights, and
    logs/hparams.yml with the schedule. The other layouts write the file at path.
    Raises TLoRAError for an unknown layout or dtype, a layer that the layout has no name for, values that dtype cannot
    hold, and when the disk does not take the file.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise TLoRAError(f'layout is "{layout}"; choose one of {", ".join(LAYOUTS)}.')
    if dtype not in DTYPES.values():
        raise TLoRAError(f"dtype is {dtype}; store in float32, bfloat16 or float16.")
    tensors = {
        key: tensor.detach().to("cpu", dtype, copy=True).contiguous() for key, tensor in LAYOUTS[layout](tlora).items()
    }
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise TLoRAError(f"{key} has values that {dtype} cannot hold; store it in float32.")
    if layout == "reference":
        return _write_reference(tlora, path.with_suffix(""), tensors)
    rank = max(tensor.shape[0] for key, tensor in tensors.items() if key.endswith(("lora_down.weight", "lora_A.weight")))
    write_tensors(path, tensors, plain_metadata(tlora, rank))
    return path


def _kohya(tlora: TLoRAFile) -> Tensors:
    return _pairs(fused(tlora), lambda path: "lora_unet_" + path.replace(".", "_"))


def _comfyui(tlora: TLoRAFile) -> Tensors:
    return _pairs(fused(tlora), lambda path: f"diffusion_model.{path}")


def _pairs(layers: Mapping[str, LowRank], key_of: Callable[[str], str]) -> Tensors:
    tensors = {}
    for path, layer in layers.items():
        key = key_of(path)
        tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"] = layer.up, layer.down
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.up.shape[1]))
    return tensors


def _diffusers(tlora: TLoRAFile) -> Tensors:
    tensors = {}
    for name, layer in _split(tlora).items():
        key = f"{_model_part(name)}.{_named(name, layer)}"
        # No alpha: diffusers then takes it to be the rank, so the scale is 1.
        tensors[f"{key}.lora_B.weight"], tensors[f"{key}.lora_A.weight"] = layer.up, layer.down
    return tensors


def _reference(tlora: TLoRAFile) -> Tensors:
    tensors = {}
    for name, layer in _split(tlora).items():
        module, dot, projection = _named(name, layer).replace("to_out.0", "to_out#0").rpartition(".")
        projection = projection.replace("#", ".")
        if not module.endswith(("attn", "attn1", "attn2")) or projection == "to_add_out":
            raise TLoRAError(f'The reference\'s layout has no place for the layer "{name}"; choose another layout.')
        prefix = "" if family_of(name) == "flux" else "unet."
        key = f"{prefix}{module}.processor.{processor_name(projection)}_lora."
        parts = {"down.weight": layer.down, "up.weight": layer.up} if layer.group == 1 else _two_terms(layer)
        tensors |= {key + part: tensor for part, tensor in parts.items()}
    return tensors


LAYOUTS: dict[str, Callable[[TLoRAFile], Tensors]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "comfyui": _comfyui,
    "reference": _reference,
}


def _two_terms(layer: LowRank) -> Tensors:
    """B, S, A and B0, S0, A0 of a layer in difference form, component i of which is [P_i - P0_i, P0_i] [A_i; A_i - A0_i].

    Of the two scales that the difference form leaves open, the first makes A's rows unit vectors. The second does the same
    to A - A0: then no two nearly equal numbers are subtracted when the update is formed. So A0 and B0 are not those
    that training began from, but the update is the same at every rank.
    """
    up, down = layer.up.float(), layer.down.float()
    moved, P0 = up[:, 0::2], up[:, 1::2]
    A, moved_A = down[0::2], down[1::2]
    size, moved_size = (_norm_or_one(rows) for rows in (A, moved_A))
    A, moved_A = A / size[:, None], moved_A / moved_size[:, None]
    P0 = P0 * moved_size
    return _term(moved * size + P0, A, "q_layer.weight", "p_layer.weight", "lambda_layer") | _term(
        P0, A - moved_A, "base_q.weight", "base_p.weight", "base_lambda"
    )


def _term(P: Tensor, A: Tensor, q: str, p: str, lambda_: str) -> Tensors:
    size = _norm_or_one(P.T)
    return {q: A, p: P / size, lambda_: size[None]}


def _norm_or_one(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=1)
    return torch.where(norm > 0, norm, 1.0)


def _write_reference(tlora: TLoRAFile, folder: Path, tensors: Tensors) -> Path:
    steps = tlora.training.get("steps")
    is_flux = all(family_of(name) == "flux" for name in tlora.layers)
    inside = Path(f"checkpoint-{steps if type(steps) is int and steps > 0 else 1}",
                  "lora.pt" if is_flux else "pytorch_lora_weights.safetensors")
    settings = _hparams(tlora)
    temporary = folder.with_name(f".tlora-{uuid.uuid4().hex}.tmp")  # there as a whole, or not at all
    try:
        (temporary / inside).parent.mkdir(parents=True)
        (temporary / "logs").mkdir()
        write_whole(temporary / "logs" / "hparams.yml", lambda path: path.write_text(settings, encoding="utf-8"))
        if is_flux:
            write_whole(temporary / inside, lambda path: torch.save(tensors, path))
        else:
            write_tensors(temporary / inside, tensors, {"format": "pt"})
        if folder.exists():
            raise FileExistsError("it is there already")
        temporary.rename(folder)
    except OSError as error:
        raise TLoRAError(
            f'The folder "{folder.name}" could not be made ({error}); choose a name that is not there yet.'
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / inside


def _hparams(tlora: TLoRAFile) -> str:
    """The settings that the reference's inference reads, as YAML."""
    method, s = METHODS[tlora.method], tlora.schedule
    if s.points:
        raise TLoRAError("tlora has a free curve, which the reference's layout cannot tell; export it as a plain LoRA or keep our file.")
    settings = {
        "alpha_rank_scale": s.alpha,
        "class_name": _quoted(tlora.class_word),
        "lora_rank": s.rank,
        "min_rank": s.min_rank,
        "placeholder_token": _quoted(tlora.token),
        "trainer_class": "sdxl_tlora" if method.is_masked else "sdxl_lora",
        "trainer_type": "ortho_lora" if method.is_orthogonal else "lora",
    }
    return "".join(f"{name}: {value}\n" for name, value in settings.items())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _named(name: str, layer: LowRank) -> str:
    path, row = split_name(name)
    part = part_number(row, (layer.up.shape[0], layer.down.shape[1])) if "@" in name else None
    named = None if part is None and "@" in name else diffusers_name(path, part)
    if named is None:
        raise TLoRAError(f'diffusers\' name of the layer "{name}" is not known; choose the layout kohya or comfyui.')
    return named


def _model_part(name: str) -> str:
    return "transformer" if family_of(name) == "flux" else "unet"


def fused(tlora: TLoRAFile) -> dict[str, LowRank]:
    """Layers by module path: those of one fused module joined into one update of all of it."""
    parts: dict[str, list[str]] = {}
    for name in tlora.layers:
        parts.setdefault(split_name(name)[0], []).append(name)
    return {path: tlora.layers[path] if names == [path] else _joined(tlora, path, names) for path, names in parts.items()}


def _joined(tlora: TLoRAFile, path: str, names: list[str]) -> LowRank:
    layers = [(split_name(name)[1], tlora.layers[name]) for name in names]
    height = _height(tlora.base_model, path.rpartition(".")[2], layers)
    if height is None or any(row + layer.up.shape[0] > height for row, layer in layers):
        raise TLoRAError(f'The size of the module "{path}" is not known; choose the layout diffusers.')
    up = torch.zeros(height, sum(layer.up.shape[1] for _, layer in layers))
    column = 0
    for row, layer in layers:
        up[row : row + layer.up.shape[0], column : column + layer.up.shape[1]] = layer.up
        column += layer.up.shape[1]
    return LowRank(up, torch.cat([layer.down.float() for _, layer in layers]))


def _height(base_model: str, kind: str, layers: list[tuple[int, LowRank]]) -> int | None:
    """Rows of a fused module, of which `layers` holds (first row, update) of parts; None where that cannot be told."""
    width = layers[0][1].down.shape[1]
    if kind == "linear1":
        return (9 if base_model.startswith("flux2") else sum(_FUSED["linear1"])) * width
    if kind == "qkv" and len(layers) == 3:
        return max(row + layer.up.shape[0] for row, layer in layers)  # keys and values may have fewer heads than queries
    if kind == "qkv" and all(layer.up.shape[0] == width for _, layer in layers):
        return 3 * width
    return None


def _split(tlora: TLoRAFile) -> dict[str, LowRank]:
    """Layers by name, with updates of a whole fused module cut into its parts."""
    split = {}
    for name, layer in tlora.layers.items():
        widths = _FUSED.get(name.rpartition(".")[2]) if family_of(name) == "flux" else None
        if widths is None:
            split[name] = layer
            continue
        rows, width = 0, layer.down.shape[1]
        if layer.up.shape[0] != sum(widths) * width:
            raise TLoRAError(f'The layer "{name}" has other parts than FLUX.1\'s; choose the layout kohya or comfyui.')
        for count in widths:
            split[f"{name}@{rows}"] = LowRank(layer.up[rows : rows + count * width], layer.down, layer.group)
            rows += count * width
    return split
