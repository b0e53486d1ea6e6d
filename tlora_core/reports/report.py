"""A report on a T-LoRA's contents, as text and as a picture.

Figures are for the update with all ranks on. They are computed from the thin factors in float64 on the CPU. The update
itself, as large as the model's weight, is never formed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from PIL import Image
from torch import Tensor

from ..files.tlora_file import TLoRAFile
from ..method.adapters import METHODS, Adapter
from ..method.bank import BankAdapter
from ..method.layer_name import LayerName
from .plot import bar_chart, schedule_curve, stacked

SHARE = 0.95  # of the sum of singular values: the paper's measure of effective rank (its Figure 4)
B_KEY = "effective_rank_B"  # in TLoRAFile.training: layer name -> effective rank of the trained factor B

# A word that ends in s names a list, and each of its members is a block: "input_blocks.4", but "middle_block".
_BLOCK = re.compile(r"\w*s\.\d+(?=\.|$)|\w+")
_LEVELS = (1, 0.75, 0.5, 0.25, 0)


@dataclass(frozen=True)
class Block:
    """One block of the model. ranks: effective rank of each layer's update. ranks_b: effective ranks of the recorded
    factors B. norm: Frobenius norm of the updates of all its layers together."""

    name: str
    ranks: list[int]
    ranks_b: list[int]
    norm: float


def singular_values(matrix: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Singular values, float64 on the CPU, in descending order, of a matrix [m, n] or of the product of (up [m, k],
    down [k, n]). For a plain matrix they come from its smaller Gram matrix and are exact to 1e-8 of the largest."""
    if isinstance(matrix, tuple):
        up, down = map(_exact, matrix)
        # With up = Q1 R1 and down^T = Q2 R2 the product is Q1 (R1 R2^T) Q2^T, and Q1, Q2 do not change singular values.
        return torch.linalg.svdvals(torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T)
    exact = _exact(matrix)
    gram = exact.T @ exact if exact.shape[0] >= exact.shape[1] else exact @ exact.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def _exact(matrix: Tensor) -> Tensor:
    """The matrix in float64 on the CPU. Moved first: a single call would cast on the device, and Apple's GPUs have no
    float64."""
    return matrix.detach().to("cpu").to(torch.float64)


def effective_rank(matrix_or_factors: Tensor | tuple[Tensor, Tensor], share: float = SHARE) -> int:
    """The number of largest singular values that hold `share` (above 0, up to 1) of their sum; 0 for a zero matrix.

    The argument is that of singular_values.
    """
    return _rank_holding(singular_values(matrix_or_factors), share)


def effective_rank_of_b(adapters: Mapping[LayerName, Adapter]) -> dict[str, int]:
    """The effective rank of each adapter's trained factor B [out, r], by layer name, as in the paper's Figure 4. Empty
    for methods that are not of low rank."""
    return {name: effective_rank(adapter.B) for name, adapter in adapters.items() if isinstance(adapter, BankAdapter)}


def block_name(layer: str) -> str:
    """The model's block of a layer: "input_blocks.4", "middle_block" or "double_blocks.3"."""
    found = _BLOCK.match(layer)
    assert found is not None  # `TLoRAFile` has checked that it is a path
    return found[0]


def blocks(tlora: TLoRAFile) -> list[Block]:
    """The blocks of the model that the T-LoRA changes, sorted by name and number."""
    recorded = tlora.training.get(B_KEY)
    recorded = recorded if isinstance(recorded, Mapping) else {}
    members: dict[str, list[LayerName]] = {}
    for name in tlora.layers:
        members.setdefault(block_name(name), []).append(name)
    made = []
    for block in sorted(members, key=_number_order):
        values = [singular_values(tlora.layers[name].factors()) for name in members[block]]
        # Checked, as a file may hold anything under this key.
        ranks_b = [recorded[name] for name in members[block] if type(recorded.get(name)) is int]
        made.append(Block(block, [_rank_holding(v, SHARE) for v in values], ranks_b, float(torch.cat(values).norm())))
    return made


def report_text(tlora: TLoRAFile, parts: list[Block]) -> str:
    """The report as lines of plain text; parts: the result of `blocks`."""
    width = max(len(block.name) for block in parts)
    lines = [
        *_settings(tlora),
        "",
        *_ranks(tlora, parts),
        "",
        "by block: effective rank of the update (min/median/max), Frobenius norm of the update",
    ]
    for block in parts:
        b = f", B {_spread(block.ranks_b)}" if block.ranks_b else ""
        count = _layers(len(block.ranks))
        lines.append(f"  {block.name:{width}}  {count}, {_spread(block.ranks)}, norm {block.norm:.4g}{b}")
    return "\n".join(lines)


def report_picture(tlora: TLoRAFile, parts: list[Block]) -> Image.Image:
    """A picture of 640 x 720 pixels: r(t), and the effective rank and the norm of the update of each block."""
    size = (640, 240)
    words = dict.fromkeys(block.name.split(".")[0] for block in parts)
    key = "block (" + ", ".join(f"{word[0]}: {word}" for word in words) + ")"
    labels = [re.sub(r"^(\w)\w*\.?", r"\1", block.name) for block in parts]
    dots = [median(block.ranks_b) if block.ranks_b else None for block in parts]
    title = "effective rank of the update: median, min to max" + ("; dots: of factor B" if any(dots) else "")
    return stacked(
        [
            schedule_curve(tlora.schedule, size=size),
            bar_chart(
                labels,
                [median(block.ranks) for block in parts],
                title,
                key,
                spans=[(min(block.ranks), max(block.ranks)) for block in parts],
                dots=dots,
                size=size,
            ),
            bar_chart(labels, [block.norm for block in parts], "Frobenius norm of the update", key, size=size),
        ]
    )


def _settings(tlora: TLoRAFile) -> list[str]:
    s, T = tlora.schedule, tlora.num_timesteps
    first = next(iter(tlora.layers.values()))
    size = sum(layer.nbytes for layer in tlora.layers.values()) / 1e6
    rest = {name: value for name, value in tlora.training.items() if name != B_KEY}
    return [
        f'T-LoRA for base model {tlora.base_model}: token "{tlora.token}", class word "{tlora.class_word}"',
        f"method {tlora.method}, {s}",
        "active rank r(t) at noise level t/T: " + ", ".join(f"{u:g}: {s.active_rank(u * T, T)}" for u in _LEVELS),
        f"noise domain {tlora.noise_domain}, T = {T:g}",
        f"{_layers(len(tlora.layers))}, {size:.2f} MB in {str(first.up.dtype).removeprefix('torch.')}",
        "training: " + (json.dumps(rest, ensure_ascii=False, default=str)[1:-1] or "not recorded"),
        *filter(None, [tlora.note]),
    ]


def _ranks(tlora: TLoRAFile, parts: list[Block]) -> list[str]:
    ranks = [rank for block in parts for rank in block.ranks]
    ranks_b = [rank for block in parts for rank in block.ranks_b]
    columns = tlora.schedule.rank * METHODS[tlora.method].group
    of_b = f"{_spread(ranks_b)} (rank {tlora.schedule.rank})" if ranks_b else "not recorded in this file"
    return [
        f"effective rank: singular values that hold {SHARE:.0%} of their sum (min/median/max over the layers)",
        f"  of the whole update up @ down, all ranks on: {_spread(ranks)} ({columns} columns)",
        f"  of the trained factor B alone, at the end of training: {of_b}",
    ]


def _rank_holding(values: Tensor, share: float) -> int:
    """values: singular values in descending order."""
    sums = values.cumsum(0)
    # The tolerance absorbs rounding where the sum equals the share exactly, as for equal values.
    return int((sums < share * (1 - 1e-6) * sums[-1]).sum()) + 1 if sums[-1] > 0 else 0


def _spread(ranks: list[int]) -> str:
    return f"{min(ranks)}/{median(ranks):g}/{max(ranks)}"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _number_order(block: str) -> tuple[str, int]:
    word, _, number = block.partition(".")
    return word, int(number or 0)
