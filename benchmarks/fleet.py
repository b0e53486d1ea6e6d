"""How long many subjects take on several GPUs, and where more GPUs no longer help: from counted and given figures.

    python3 tools/host.py bench fleet [--model sdxl|flux] [--card H200] [--subjects 1000] [--gpus 1 8 64 512]
        [--step-seconds S] [--draw-seconds S] [--start-seconds S] [--load-gbit R] [--link-gbit R] [--json]

Nothing here is measured on a GPU. A step's and a picture's seconds are bounds: every operation is counted on PyTorch's
device "meta", as in roofline.py, and takes the longer of its bytes by the card's bandwidth and its arithmetic by the
card's speed. A real card takes longer; give what it measured with --step-seconds and --draw-seconds. The rest is given:
seconds until a worker's ComfyUI has started, the rate at which the store of the models serves all workers together, and
the rate at which the machine with the results takes them in.

A worker starts and loads its model once. Each row then trains, draws its validations, and sends its run states and its
results. The link to the results is shared: above a certain number of GPUs ("saturates") rows wait for it.
"""

import argparse
import math
import sys
from typing import NamedTuple

import memory
import roofline
import torch
from _printing import show

MODEL_GB = {"sdxl": 6.9, "flux": 34.0}  # files of the model with text encoders and VAE, in the usual half precision
STEPS = {"sdxl": 800, "flux": 500}  # the pack's defaults
SAMPLER_STEPS = 20
PICTURE_BYTES = 1.5e6  # a PNG of 1024 pixels
BACKWARD = 2.5  # of attention's arithmetic: the forward pass is made again, and three products give its gradients


class Step(roofline.Operations):
    """A training step's operations on META, the backward pass's too. state: bytes of a run state."""

    state = 0

    def attention(self, q, k, v, *args, **kwargs):
        return _Noted.apply(self, q, k, v)


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operations, q, k, v):
        ctx.operations = operations
        output = roofline.Operations.attention(operations, q, k, v)
        ctx.save_for_backward(q, k, v, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, output = ctx.saved_tensors
        made = [torch.empty_like(each) for each in (q, k, v)]
        flops = BACKWARD * 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        ctx.operations._note("attention_backward", made, [q, k, v, output, gradient], int(flops))
        return None, *made


def training_step(model, kind: str, size: int, rank: int) -> Step:
    """The operations of a training step on MODEL with all ranks on."""
    from tlora_core.training.trainer import Trainer

    counted, run = Step(), Trainer.run

    def only_the_last(trainer, *args):
        counted.all.clear()
        counted.state = trainer.state_bytes
        return run(trainer, *args)

    stand_ins = [
        (Trainer, "run", only_the_last),
        (torch.nn.functional, "scaled_dot_product_attention", counted.attention),
    ]
    with memory.host_on_meta(), memory._replaced(stand_ins), counted:
        memory.step(model, roofline.TEXT_TOKENS[kind], size, rank, "fast")
    return counted


def counted(kind: str, card: str, rank: int) -> tuple[float, float, float, float]:
    """Bounds of a training step and of a picture with the T-LoRA folded in, in seconds; the bytes of a T-LoRA file and
    of a run state."""
    import random_models

    from tlora_core.hosts.comfy.sampling import apply_tlora

    size, half = 128, {"sdxl": torch.float16, "flux": torch.bfloat16}[kind]
    model = getattr(random_models, kind)(dtype=torch.bfloat16, device=memory.META)
    step = training_step(model, kind, size, rank)
    with memory.host_on_meta():
        model = getattr(random_models, kind)(dtype=half, device=memory.META)
        memory.move(model)
        model.model.model_sampling.to(memory.META)
        tlora = roofline.tlora_on_meta(model, rank)
        patched = apply_tlora(model, tlora, fold=True)
        evaluation = roofline.evaluation(model, kind, size, patched).seconds(roofline.CARDS[card])
    file = 2 * sum(layer.up.numel() + layer.down.numel() for layer in tlora.layers.values())  # in half precision
    return step.seconds(roofline.CARDS[card]), SAMPLER_STEPS * evaluation, file, step.state


class Work(NamedTuple):
    """What each row takes: seconds on the card, and bytes to the results. start: seconds until a worker's ComfyUI has
    started. model: bytes that each worker loads."""

    train: float
    draw: float
    bytes: float
    start: float
    model: float

    @property
    def seconds(self) -> float:
        return self.train + self.draw


def plan(work: Work, subjects: int, gpus: int, load_rate: float, link_rate: float) -> dict:
    """Hours for all rows, and what bounds them. Rates are in bytes a second."""
    workers = min(gpus, subjects)
    before = work.start + workers * work.model / load_rate
    cards = math.ceil(subjects / workers) * work.seconds
    link = subjects * work.bytes / link_rate
    hours = (before + max(cards, link)) / 3600
    parts = {"cards": cards, "link": link, "loading": before}
    return {
        "gpus": gpus,
        "hours": round(hours, 2),
        "subjects_an_hour": round(subjects / hours),
        "link_used": round(link / max(cards, link), 3),
        "loading_share": round(before / 3600 / hours, 3),
        "bound_by": max(parts, key=lambda name: parts[name]),
    }


def saturates(work: Work, link_rate: float) -> int:
    """How many GPUs fill the link to the results."""
    return math.floor(work.seconds * link_rate / work.bytes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=roofline.TEXT_TOKENS, default="sdxl")
    parser.add_argument("--card", choices=roofline.CARDS, default="H200")
    parser.add_argument("--subjects", type=int, default=1000)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, help="of a training (default: the pack's)")
    parser.add_argument("--pictures", type=int, default=8, help="that a row draws in all its validations")
    parser.add_argument("--states", type=int, default=7, help="that a row sends: one every 100 steps")
    parser.add_argument("--file-mb", type=float, help="of a T-LoRA file (default: counted)")
    parser.add_argument("--state-mb", type=float, help="of a run state (default: counted)")
    parser.add_argument("--step-seconds", type=float, help="as measured on the card (default: the counted bound)")
    parser.add_argument("--draw-seconds", type=float, help="of a picture, as measured (default: the counted bound)")
    parser.add_argument("--start-seconds", type=float, default=30.0, help="until a worker's ComfyUI has started")
    parser.add_argument("--load-gbit", type=float, default=20.0, help="of the models' store, for all workers together")
    parser.add_argument("--link-gbit", type=float, default=10.0, help="into the machine with the results")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def work_of(args: argparse.Namespace, step: float, draw: float, file: float, state: float) -> Work:
    sent = file + args.states * state + args.pictures * PICTURE_BYTES
    steps = args.steps or STEPS[args.model]
    return Work(steps * step, args.pictures * draw, sent, args.start_seconds, MODEL_GB[args.model] * 1e9)


def main() -> None:
    args = _arguments()
    sys.argv = sys.argv[:1] + ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    sizes = [each and each * 1e6 for each in (args.file_mb, args.state_mb)]
    given = args.step_seconds, args.draw_seconds, *sizes
    bounds = counted(args.model, args.card, args.rank) if None in given else given
    step, draw, file, state = (each if each is not None else bound for each, bound in zip(given, bounds))
    work = work_of(args, step, draw, file, state)
    load_rate, link_rate = (gbit * 1e9 / 8 for gbit in (args.load_gbit, args.link_gbit))
    each = {
        "step_seconds": f"{step:.3g} ({'given' if args.step_seconds is not None else 'counted bound'})",
        "draw_seconds": f"{draw:.3g} ({'given' if args.draw_seconds is not None else 'counted bound'})",
        "file_mb": round(file / 1e6),
        "state_mb": round(state / 1e6),
        "row_minutes": round(work.seconds / 60, 2),
        "row_mb": round(work.bytes / 1e6),
        "saturates_at_gpus": saturates(work, link_rate),
    }
    rows = [each, *(plan(work, args.subjects, gpus, load_rate, link_rate) for gpus in args.gpus)]
    show(rows, args.json, model=args.model, card=args.card, subjects=args.subjects)


if __name__ == "__main__":
    main()
