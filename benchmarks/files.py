"""Size and accuracy of stored T-LoRAs, and the recomputation of LyCORIS' base terms.

    python3 tools/host.py bench files [--rank 64] [--json]

Two of SDXL's transformer blocks, one of each width (16 layers), are saved and read again, with random factors that have
moved from their start by 0.1 %, 1 % and 100 % of their norm. "error" is the error of the stored update relative to its
norm, with all ranks on and with half of them, for the worst layer; the reference update is computed in float64. The
size of a plain LoRA of the same rank and dtype is given beside it.

"base_terms" compares our decomposition of a weight of SDXL's larger layers with torch's SVD in float32, in turn: median
seconds, and the largest error of the product of the principal, middle and last components against an SVD in float64.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tlora_core import LowRank, RankSchedule, TLoRAFile
from tlora_core.files.dtypes import DTYPES
from tlora_core.files.export import export
from tlora_core.files.foreign.orthogonal import as_low_rank, singular_vectors
from tlora_core.method.starts import orthogonal_starts

MOVED = (0.001, 0.01, 1.0)
TEXT = 2048  # features that attn2's keys and values read
BLOCKS = {"input_blocks.4.1.transformer_blocks.0": 640, "middle_block.1.transformer_blocks.0": 1280}  # path -> width


def shapes_in(blocks):
    """ComfyUI's module path -> (out_features, in_features)."""
    return {
        f"{block}.{attention}.{projection}": (
            width,
            TEXT if attention == "attn2" and projection in ("to_k", "to_v") else width,
        )
        for block, width in blocks.items()
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    }


def product(parts, r):
    """B S A of the first r components, in float64."""
    B, S, A = (part.double() for part in parts)
    return (B[:, :r] * S[:r]) @ A[:r]


def layers(shapes, rank, moved):
    """(trained factors, start) by module path."""
    generator = torch.Generator().manual_seed(0)
    starts = orthogonal_starts("last_random", list(shapes.values()), rank, seed=0, names=shapes)

    def move(part):
        return part + moved * part.norm() * part.numel() ** -0.5 * torch.randn(part.shape, generator=generator)

    return {name: (tuple(move(part) for part in start), start) for name, start in zip(shapes, starts)}


def error(path, parts, r):
    stored = TLoRAFile.load(path).layers
    errors = []
    for name, (trained, start) in parts.items():
        want = product(trained, r) - product(start, r)
        have = stored[name].up[:, : 2 * r].double() @ stored[name].down[: 2 * r].double()
        errors.append(float((have - want).norm() / want.norm()))
    return max(errors)


def plain_size(shapes, rank, dtype, folder):
    generator = torch.Generator().manual_seed(0)
    random = {
        name: LowRank(torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator))
        for name, (out, width) in shapes.items()
    }
    file = TLoRAFile(random, "lora", RankSchedule(rank, rank), 1000, "discrete", "sdxl", "sks", "dog")
    return export(file, folder / "plain.safetensors", "kohya", dtype).stat().st_size


def measure(rank, blocks=BLOCKS):
    shapes, rows = shapes_in(blocks), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for moved in MOVED:
            parts = layers(shapes, rank, moved)
            updates = {path: as_low_rank(*both) for path, both in parts.items()}
            file = TLoRAFile(updates, "tlora", RankSchedule(rank, rank // 2), 1000, "discrete", "sdxl", "sks", "dog")
            for word, dtype in DTYPES.items():
                path = folder / "tlora.safetensors"
                file.save(path, dtype)
                size, plain = path.stat().st_size, plain_size(shapes, rank, dtype, folder)
                rows.append(
                    {
                        "dtype": word,
                        "moved": moved,
                        "error": error(path, parts, rank),
                        "error_half": error(path, parts, rank // 2),
                        "mb": round(size / 2**20, 2),
                        "plain_mb": round(plain / 2**20, 2),
                        "size_ratio": round(size / plain, 3),
                    }
                )
    return rows


def float32_svd(weight):
    return torch.linalg.svd(weight, full_matrices=False)


def measure_base_terms(rank, rounds):
    rows = []
    for shape in ((1280, 1280), (1280, TEXT)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        exact = torch.linalg.svd(weight.double(), full_matrices=False)
        seconds = {singular_vectors: [], float32_svd: []}
        for _ in range(rounds):
            for decompose, times in seconds.items():
                start = time.perf_counter()
                decompose(weight)
                times.append(time.perf_counter() - start)
        for decompose, times in seconds.items():
            rows.append(
                {
                    "shape": shape,
                    "how": decompose.__name__,
                    "seconds": round(statistics.median(times), 2),
                    "error": base_term_error([part.float() for part in decompose(weight)], exact, rank),
                }
            )
    return rows


def base_term_error(decomposed, exact, rank):
    def term(parts, first):
        U, S, Vh = parts
        return product((U[:, first:], S[first:], Vh[first:]), rank)

    count = len(exact[1])
    firsts = (0, (count - rank) // 2, count - rank)
    return max(float((term(decomposed, f) - term(exact, f)).norm() / term(exact, f).norm()) for f in firsts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="of the decompositions")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    rows, base_terms = measure(args.rank), measure_base_terms(args.rank, args.rounds)
    for row in rows + base_terms:
        print(
            "  ".join(
                f"{key} {value:.2g}" if key.startswith("error") else f"{key} {value}" for key, value in row.items()
            )
        )
    if args.json:
        print(json.dumps({"rank": args.rank, "rows": rows, "base_terms": base_terms}))


if __name__ == "__main__":
    main()
