"""Makes the tiny base model from scratch: draws its world, trains autoencoder and base, measures the gate, writes the
files.

    python3 tools/host.py python tools/train_tiny_base.py --work FOLDER [--stage all] [--device cpu]

Every stage is seeded, saves its progress in the work folder every minute, and resumes there when started again. Stages:
data, autoencoder, latents, text, base, scorer, export, gate, flow; `all` runs them in this order.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_gate import FLOW_WEIGHTS, WEIGHTS, measure, parse_host_arguments, save_grid
from tinylib.decoder import stage_decoder
from tinylib.diffusion import PREFIXES, stage_base, stage_flow
from tinylib.pairs import stage_pairs
from tinylib.pictures import load_autoencoder, stage_autoencoder, stage_data, stage_latents
from tinylib.readers import stage_scorer, stage_text

from tlora_core.tiny import world

torch.set_flush_denormal(True)  # tiny activations are ten times slower otherwise; worker threads inherit it from here


def stage_export(work: Path, args):
    """Writes the averaged weights in half precision under the names of SDXL's model files, and the scorer."""
    average = torch.load(work / "base.pt", weights_only=True)["average"]
    tensors = {}
    for name, value in average.items():
        kind, rest = name.split(".", 1)
        tensors[PREFIXES[kind] + rest] = value.half().contiguous()
    for name, value in load_autoencoder(work, "cpu").state_dict().items():
        tensors["first_stage_model." + name] = value.half()
    save_file(tensors, args.output / "tiny_base.safetensors", metadata={"modelspec.architecture": "tlora-tiny-sdxl"})
    scorer = torch.load(work / "scorer.pt", weights_only=True)["model"]
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in scorer.items()}, args.output / "scorer.safetensors"
    )


def stage_gate(work: Path, args):
    """Measures the exported model and keeps the report beside the other results."""
    report, drawn = measure(args.gate_pictures, concepts=args.gate_concepts, folder=args.output)
    report["steps"] = torch.load(work / "base.pt", weights_only=True)["step"]
    (work / "gate.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
    save_grid(drawn[:48], work / "gate.png")


STAGES = {
    "data": stage_data,
    "autoencoder": stage_autoencoder,
    "latents": stage_latents,
    "text": stage_text,
    "base": stage_base,
    "scorer": stage_scorer,
    "export": stage_export,
    "pairs": stage_pairs,
    "decoder": stage_decoder,
    "gate": stage_gate,
    "flow": stage_flow,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, training states and reports")
    parser.add_argument("--stage", default="all", choices=["all", *STAGES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--odd-scenes", type=int, default=6_000, help="for the autoencoder alone")
    parser.add_argument("--autoencoder-steps", type=int, default=4300)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--scorer-steps", type=int, default=1500)
    parser.add_argument("--gate-pictures", type=int, default=600)
    parser.add_argument("--gate-concepts", type=int, default=len(world.CONCEPTS))
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--base-steps", type=int, default=9000)
    parser.add_argument("--base-rate", type=float, default=1.2e-3)
    parser.add_argument("--pairs", type=int, default=100, help="percentage of the decoder's pairs to make")
    parser.add_argument("--decoder-scenes", type=int, default=4500, help="rendered ones, and as many odd ones")
    parser.add_argument("--decoder-steps", type=int, default=16_000)
    parser.add_argument("--flow-steps", type=int, default=1500)
    parser.add_argument("--flow-rate", type=float, default=5e-4)
    parser.add_argument("--flow-output", type=Path, default=FLOW_WEIGHTS, help="file of the flow-matching U-Net")
    parser.add_argument("--processes", type=int, default=1, help="on a CPU as many as it has cores")
    args = parser.parse_args()
    args.given = sys.argv[1:]
    parse_host_arguments(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if args.stage in ("all", name):
            stage(args.work, args)


if __name__ == "__main__":
    main()
