"""The layout of the paper's own code: a run folder that its inference.py (SDXL) or flux/run_inference.py (FLUX.1)
loads.

That code puts an adapter of the same rank on every attention projection and loads them strictly: a file must hold a
tensor for each. Projections without an update are written as zeros, which have no effect.
"""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TLoRAError
from ..method.adapters import METHODS, LowRank
from .atomic import write_tensors, write_whole
from .layer_names import family_of, processor_name
from .tlora_file import TLoRAFile

Tensors = dict[str, Tensor]

# SDXL's attention: diffusers' block -> its number of attentions, the transformer blocks in each, its width.
_SDXL = {
    "down_blocks.1": (2, 2, 640),
    "down_blocks.2": (2, 10, 1280),
    "mid_block": (1, 10, 1280),
    "up_blocks.0": (3, 10, 1280),
    "up_blocks.1": (3, 2, 640),
}
_SDXL_TEXT = 2048
_FLUX = {"transformer_blocks": 19, "single_transformer_blocks": 38}  # of FLUX.1, which is 3072 wide
_FLUX_WIDTH = 3072
# Single blocks have all of them too, though unused.
_FLUX_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "to_q_proj", "to_k_proj", "to_v_proj")


def reference_tensors(tlora: TLoRAFile, layers: Mapping[str, LowRank]) -> Tensors:
    """The tensors of the weights file. layers: the T-LoRA's layers by their names in diffusers.

    Raises TLoRAError for features that the reference's code lacks: other models, layers outside the attention, layers
    of different ranks; on FLUX.1 also orthogonal methods and an alpha other than 1.
    """
    _require_place(tlora)
    layers = {_processor(name): layer for name, layer in layers.items()}
    for key, layer in layers.items():
        if layer.rank != tlora.schedule.rank:
            raise TLoRAError(
                f'The layer "{key}" has rank {layer.rank} and the schedule {tlora.schedule.rank}, but the '
                "reference's layout has one rank for all layers; choose another layout."
            )
    tensors = {}
    for key, layer in (_empty(tlora, layers) | layers).items():
        parts = {"down.weight": layer.down, "up.weight": layer.up} if layer.group == 1 else _two_terms(layer)
        tensors |= {f"{key}_lora.{part}": tensor for part, tensor in parts.items()}
    return tensors


def write_reference(tlora: TLoRAFile, folder: Path, tensors: Tensors) -> Path:
    """Makes the folder: checkpoint-<steps>/ with the tensors, logs/hparams.yml. Returns the path of the weights.

    Raises TLoRAError for a free curve, an existing folder, and when the folder cannot be written.
    """
    steps = tlora.training.get("steps")
    is_flux = _is_flux(tlora)
    inside = Path(
        f"checkpoint-{steps if type(steps) is int and steps > 0 else 1}",
        "lora.pt" if is_flux else "pytorch_lora_weights.safetensors",
    )
    settings = _hparams(tlora, folder)
    temporary = folder.with_name(f".tlora-{uuid.uuid4().hex}.tmp")  # renamed when complete
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


def _is_flux(tlora: TLoRAFile) -> bool:
    return all(family_of(name) == "flux" for name in tlora.layers)


def _require_place(tlora: TLoRAFile) -> None:
    method, base = METHODS[tlora.method], tlora.base_model
    unsupported = ("flux2", "chroma") if _is_flux(tlora) else ("sd1", "sd2")
    if base.startswith(unsupported):
        raise TLoRAError(
            f'tlora is for the model "{base}", but the reference\'s code only supports SDXL and FLUX.1; choose another '
            "layout."
        )
    if _is_flux(tlora) and any(layer.group == 2 for layer in tlora.layers.values()):
        raise TLoRAError(
            f"tlora's method is \"{tlora.method}\", but the reference's code for FLUX.1 only supports vanilla_tlora "
            "and lora; choose another layout."
        )
    if _is_flux(tlora) and method.is_masked and tlora.schedule.alpha != 1:
        raise TLoRAError(
            f"tlora's alpha is {tlora.schedule.alpha:g}, but the reference's code for FLUX.1 only supports 1; choose "
            "another layout."
        )


def _processor(name: str) -> str:
    """The reference's name for a projection's adapter, without "_lora"."""
    module, _, projection = name.replace("to_out.0", "to_out#0").rpartition(".")
    projection = projection.replace("#", ".")
    if not module.endswith(("attn", "attn1", "attn2")) or projection == "to_add_out":
        raise TLoRAError(f'The reference\'s layout has no place for the layer "{name}"; choose another layout.')
    return f"{module}.processor.{processor_name(projection)}"


def _empty(tlora: TLoRAFile, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Layers of zeros for the projections that the reference's code expects and the T-LoRA lacks; empty for a model of
    unknown size."""
    rank, some = tlora.schedule.rank, next(iter(layers.values()))
    shapes = dict(_flux_shapes(layers) if _is_flux(tlora) else _sdxl_shapes())
    if any(shapes.get(key) != layer.shape for key, layer in layers.items()):
        return {}  # a model of its own size: which layers it has beside these, the file does not tell
    columns = rank * some.group
    return {
        key: LowRank(some.up.new_zeros(rows, columns), some.down.new_zeros(columns, width), some.group)
        for key, (rows, width) in shapes.items()
        if key not in layers
    }


def _sdxl_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """(out_features, in_features) of all projections."""
    for block, (attentions, depth, width) in _SDXL.items():
        for attention in range(attentions):
            for number in range(depth):
                for module in ("attn1", "attn2"):
                    for projection in ("to_q", "to_k", "to_v", "to_out"):
                        reads_text = module == "attn2" and projection in ("to_k", "to_v")
                        place = f"{block}.attentions.{attention}.transformer_blocks.{number}"
                        key = f"{place}.{module}.processor.{projection}"
                        yield key, (width, _SDXL_TEXT if reads_text else width)


def _flux_shapes(layers: Mapping[str, LowRank]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The same for FLUX.1; for a model of another width, only the blocks that the T-LoRA has."""
    width = next(iter(layers.values())).down.shape[1]
    blocks = [f"{kind}.{i}.attn.processor" for kind, count in _FLUX.items() for i in range(count)]
    for block in blocks if width == _FLUX_WIDTH else dict.fromkeys(key.rpartition(".")[0] for key in layers):
        for projection in _FLUX_PROJECTIONS:
            yield f"{block}.{projection}", (width, width)


def _two_terms(layer: LowRank) -> Tensors:
    """B, S, A and B0, S0, A0 of a layer in difference form, whose component i is [P_i - P0_i, P0_i] [A_i; A_i - A0_i].

    The difference form leaves two scales open. The first makes A's rows unit vectors. The second does the same to
    A - A0, so that the update is formed without subtracting nearly equal numbers. A0 and B0 therefore differ from the
    starts of the training, but the update is the same at every rank.
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


def _hparams(tlora: TLoRAFile, folder: Path) -> str:
    """The settings that the reference's inference reads, as YAML. output_dir is the folder's own path, since the code
    only looks there."""
    s = tlora.schedule
    if s.points:
        raise TLoRAError(
            "tlora has a free curve, which the reference's layout cannot express; export it as a plain LoRA or keep "
            "this pack's file."
        )
    settings = {
        "class_name": _quoted(tlora.class_word),
        "min_rank": s.min_rank,
        "output_dir": _quoted(str(folder.absolute())),
        "placeholder_token": _quoted(tlora.token),
        "revision": "null",
    } | (_of_flux(tlora) if _is_flux(tlora) else _of_sdxl(tlora))
    return "".join(f"{name}: {value}\n" for name, value in sorted(settings.items()))


def _of_flux(tlora: TLoRAFile) -> dict[str, object]:
    masked = "true" if METHODS[tlora.method].is_masked else "false"
    variant = "schnell" if tlora.base_model == "fluxschnell" else "dev"
    return {
        "pretrained_model_name_or_path": f"black-forest-labs/FLUX.1-{variant}",
        "rank": tlora.schedule.rank,
        "tlora": masked,
    }


def _of_sdxl(tlora: TLoRAFile) -> dict[str, object]:
    method = METHODS[tlora.method]
    return {
        "alpha_rank_scale": _real(tlora.schedule.alpha),
        "lora_rank": tlora.schedule.rank,
        "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
        "sig_type": "last",  # the start of a new training; inference ignores it
        "trainer_class": "sdxl_tlora" if method.is_masked else "sdxl_lora",
        "trainer_type": "ortho_lora" if method.is_orthogonal else "lora",
    }


def _real(number: float) -> str:
    """A number with a decimal point, since YAML reads 1e-05 as text."""
    text = repr(float(number))
    return text if "." in text else text.replace("e", ".0e")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
