"""What a T-LoRA costs while sampling at real sizes on real cards: counted and computed, without a GPU.

    python3 tools/host.py bench roofline [--model sdxl|flux] [--weights fp8] [--size 128] [--rank 64] [--json]

One evaluation is made on PyTorch's device "meta", where tensors have a size and no numbers, and every operation's bytes
and multiplications are counted. A card's time for it is the sum, over operations, of the longer of bytes by bandwidth
and arithmetic by speed, and of 4 microseconds to start it. "to_bare" is that time by the bare model's. Attention counts
as one operation that stores no matrix of tokens by tokens. For that nothing is taken to stay in a card's cache. For
"cached" what the operation just before has written takes no bytes, if it is no larger than the card's cache. No time is
counted for Python, which a GPU that is busy hides.

The evaluation is the third of a sampling, after which what is kept is there, at a rank that the second did not have;
three quarters of the components are on. Rows: bare; folded, with copies of weights kept; short, as the pack does where
memory is short; beside, where nothing is folded.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import memory
import torch
from _printing import show
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
START = 4e-6  # seconds
MIB = 2**20
TEXT_TOKENS = {"sdxl": 77, "flux": 512}
BATCH = {"sdxl": 2, "flux": 1}  # FLUX.1 has its guidance as an input
WAYS = {"folded": True, "short": None, "beside": False}  # apply_tlora's `fold`


class Card(NamedTuple):
    """What a card achieves, somewhat below what its maker states: bytes, and operations in half and single precision, a
    second. cache: its size in bytes."""

    bandwidth: float
    half: float
    single: float
    cache: int = 0


CARDS = {
    "4090": Card(0.92e12, 150e12, 60e12, 72 * MIB),
    "3060": Card(0.33e12, 45e12, 11e12, 3 * MIB),
    "5090": Card(1.65e12, 200e12, 90e12, 96 * MIB),
    "H200": Card(4.2e12, 650e12, 50e12, 50 * MIB),
}


class Operation(NamedTuple):
    """One kernel: bytes it reads and writes, its additions and multiplications, and whether in half precision. again:
    of the bytes, those of memory that the kernel just before has written, which is `fresh` bytes large."""

    name: str
    bytes: int
    flops: int
    is_half: bool
    again: int = 0
    fresh: int = 0

    def seconds(self, card: Card, is_cached: bool = False) -> float:
        moved = self.bytes - (self.again if is_cached and self.fresh <= card.cache else 0)
        return START + max(moved / card.bandwidth, self.flops / (card.half if self.is_half else card.single))


class Operations(TorchDispatchMode):
    """Within the block, every operation on META."""

    def __init__(self):
        super().__init__()
        self.all: list[Operation] = []
        self._written: list[Tensor] = []  # by the latest

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, written = function._schema.name.split("::")[1], _on_meta(result)
        if written and name not in memory._NO_KERNELS:
            if name in ("addmm", "baddbmm") and args[0].dim() > 1:
                # On a GPU PyTorch copies the matrix first, and adds the product to the copy.
                self._note("copy", written, args[:1], 0)
            read = _read(function, args, kwargs or {})
            self._note(name, written, read, _flops(name, written[0], args))
        return result

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        """Stands in for torch.nn.functional.scaled_dot_product_attention on [..., tokens, width]."""
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        flops = 2 * prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self._note("attention", [output], [q, k, v], flops)
        return output

    def _note(self, name: str, written: list[Tensor], read: Iterable[Tensor], flops: int) -> None:
        touched = [*written, *read]
        fresh = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in self._written}
        again = sum(_bytes(each) for each in touched if each.untyped_storage()._cdata in fresh)
        size, is_half = sum(_bytes(each) for each in touched), written[0].element_size() == 2
        self.all.append(Operation(name, size, flops, is_half, again, sum(fresh.values())))
        self._written = written

    def seconds(self, card: Card, is_cached: bool = False) -> float:
        return sum(operation.seconds(card, is_cached) for operation in self.all)


def _on_meta(values) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_meta]


def _bytes(tensor: Tensor) -> int:
    """Without repetitions: an expanded tensor has fewer numbers than its shape says."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _read(function, args, kwargs) -> list[Tensor]:
    """The operation's arguments, but for those that it only writes: `out`, and what copy_ and the like fill."""
    if function._schema.name.split("::")[1] in ("copy_", "fill_", "zero_"):
        args = args[1:]
    return _on_meta((args, {name: value for name, value in kwargs.items() if name != "out"}))


def _flops(name: str, output: Tensor, args) -> int:
    """Of products and convolutions; of all else bytes take longer."""
    name = name.removesuffix("_")
    if name in ("mm", "bmm"):
        return 2 * output.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * output.numel() * args[1].shape[-1]
    if name == "convolution_backward":  # of a frozen weight: the gradient of the input alone
        return 2 * args[0].numel() * args[2][0].numel()
    return 2 * output.numel() * args[1][0].numel() if name == "convolution" else 0


@contextmanager
def _stand_ins(levels: Iterable[float], operations: list[Operations], free: int):
    """Within the block each evaluation is at the next noise level, attention notes itself in the last of the
    operations, and so much memory is free."""
    import comfy.model_management

    from tlora_core.hosts.comfy import sampling

    following = iter(levels)

    def noise_level(*_):
        return torch.tensor([next(following)]), 1.0

    def free_memory(device=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    def attention(*args, **kwargs):
        return operations[-1].attention(*args, **kwargs)

    with memory._replaced(
        [
            (sampling, "noise_level", noise_level),
            (torch, "equal", lambda a, b: True),  # the text is that of the evaluation before
            (torch.nn.functional, "scaled_dot_product_attention", attention),
            (comfy.model_management, "get_free_memory", free_memory),
        ]
    ):
        yield


def _inputs(model, kind: str, size: int) -> tuple[Tensor, dict]:
    """Latents and conditioning of one evaluation, on META."""
    import random_models

    base, batch = model.model, BATCH[kind]
    text, options = random_models.conditioning(model, TEXT_TOKENS[kind])[0]
    latents = torch.zeros(batch, base.latent_format.latent_channels, size, size)
    given = {name: value.expand(batch, -1) for name, value in options.items()}
    conditions = base.extra_conds(cross_attn=text.expand(batch, -1, -1), noise=latents, device="cpu", **given)
    dtype = base.get_dtype_inference()
    return latents.to(memory.META), {name: each.cond.to(memory.META, dtype) for name, each in conditions.items()}


def evaluation(model, kind: str, size: int, patched, is_short: bool = False) -> Operations:
    """The operations of the third evaluation of a sampling with `patched`, the MODEL on META or a clone of it."""
    from comfy.ldm.modules.attention import attention_pytorch

    x, inputs = _inputs(model, kind, size)
    base, done = model.model, []
    base.current_patcher = patched
    options = {
        "wrappers": patched.wrappers,
        "optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs),
    }
    with _stand_ins((0.9, 0.6, 0.5), done, 0 if is_short else 1 << 40), torch.no_grad():
        for _ in range(3):
            done.append(Operations())
            with done[-1]:
                base.apply_model(x, torch.ones(len(x), device=memory.META), transformer_options=options, **inputs)
    patched.cleanup()
    base.current_patcher = None
    return done[-1]


def tlora_on_meta(model, rank: int):
    """A T-LoRA of the model's default method on its attention, from half the rank on."""
    from tlora_core import LowRank, RankSchedule, TLoRAFile
    from tlora_core.hosts.comfy.model.defaults import defaults_for
    from tlora_core.hosts.comfy.model.families import target_layers
    from tlora_core.hosts.comfy.model.noise import domain
    from tlora_core.method.adapters import METHODS

    method = defaults_for(model).method
    group = METHODS[method].group

    def update(rows: int, columns: int):
        factors = ((rows, group * rank), (group * rank, columns))
        return LowRank(*(torch.empty(shape, device=memory.META) for shape in factors), group)

    layers = {name: update(*layer.shape) for name, layer in target_layers(model).items()}
    schedule = RankSchedule(rank, rank // 2)
    return TLoRAFile(layers, method, schedule, 1000, domain(model.model.model_sampling), "counted")


def row(way: str, operations: Operations, bare: Operations) -> dict:
    return {
        "what": way,
        "kernels": len(operations.all),
        "gb": round(sum(each.bytes for each in operations.all) / 1e9, 1),
        "tflop": round(sum(each.flops for each in operations.all) / 1e12, 2),
        **{f"ms_{name}": round(1e3 * operations.seconds(card), 1) for name, card in CARDS.items()},
        **{
            what: {n: round(operations.seconds(c, cached) / bare.seconds(c, cached), 3) for n, c in CARDS.items()}
            for what, cached in (("to_bare", False), ("cached", True))
        },
    }


def parts(operations: Operations, bare: Operations) -> dict:
    """How many more operations than the bare model's, and GB, by name."""
    found = defaultdict(lambda: [0, 0.0])
    for sign, each in ((1, operations), (-1, bare)):
        for operation in each.all:
            found[operation.name][0] += sign
            found[operation.name][1] += sign * operation.bytes / 1e9
    return {name: (count, round(gb, 1)) for name, (count, gb) in found.items() if count or abs(gb) > 0.05}


def measure(kind: str, size: int, rank: int, weights: str = "half", with_parts: bool = False) -> list[dict]:
    import random_models

    from tlora_core.hosts.comfy.sampling import apply_tlora

    dtype = {"sdxl": torch.float16, "flux": torch.bfloat16}[kind]
    storage = torch.float8_e4m3fn if weights == "fp8" else None
    model = getattr(random_models, kind)(dtype=dtype, storage=storage, device=memory.META)
    memory.move(model)
    model.model.model_sampling.to(memory.META)
    return rows_of(model, kind, size, tlora_on_meta(model, rank), apply_tlora, with_parts)


def rows_of(model, kind, size, tlora, apply_tlora, with_parts=False) -> list[dict]:
    bare = evaluation(model, kind, size, model)
    rows = [row("bare", bare, bare)]
    for way, fold in WAYS.items():
        counted = evaluation(model, kind, size, apply_tlora(model, tlora, fold=fold), is_short=way == "short")
        rows.append(row(way, counted, bare))
        if with_parts:
            rows[-1]["more_than_bare"] = parts(counted, bare)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TEXT_TOKENS, default="sdxl")
    parser.add_argument("--weights", choices=("half", "fp8"), default="half")
    parser.add_argument("--size", type=int, default=128, help="of the latents; 128 is a picture of 1024 pixels")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--parts", action="store_true", help="say which operations are more than the bare model's")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    sys.argv = sys.argv[:1] + ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    with memory.host_on_meta():
        rows = measure(args.model, args.size, args.rank, args.weights, args.parts)
    show(rows, args.json, model=args.model, weights=args.weights, size=args.size, rank=args.rank)


if __name__ == "__main__":
    main()
