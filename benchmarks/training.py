"""What training a T-LoRA costs, compared with the frozen model's own two passes and with ComfyUI's Train LoRA node.

    python3 tools/host.py bench training [--model sdxl-small|sdxl|flux-small|flux] [--device cpu|cuda] [--json]

Rows are floor, the frozen model forward and backward to its input, without adapters or optimizer; host_default, the
node with its defaults (bfloat16, gradient checkpointing of the whole model); host_no_checkpointing; host_bypass,
without gradient checkpointing and with adapters beside the layers; host_fp32, without gradient checkpointing and in
float32 throughout; tlora; and tlora_checkpointing. The node always trains every layer. Model, rank, latents and batch
are the same everywhere.

Seconds are measured with all rows in turn in one process, for several rounds: medians, and ratios to the floor of the
same round; on a CPU with one thread. A T-LoRA's step includes everything, also the optimizer. The node's step is the
time from one of its steps to the next. Memory is measured with each row in its own process: "growth_mb" is the highest
memory in use above that of the loaded model, "peak_mb" the highest in total. On a GPU the node is left out, and
"run_seconds" extrapolates from the measured steps to a whole run of the paper's, including the start of its adapters.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from _printing import show

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

# name: (function of random_models, its arguments, latent channels, latent size, dtype, text tokens, the paper's steps)
MODELS = {
    "sdxl-small": ("sdxl", {"width": 64}, 4, 32, "float32", 77, 800),
    "sdxl": ("sdxl", {}, 4, 128, "bfloat16", 77, 800),
    "flux-small": (
        "flux",
        {"hidden": 512, "blocks": (4, 8), "context": 512, "vector": 128},
        16,
        32,
        "float32",
        77,
        500,
    ),
    "flux": ("flux", {}, 16, 128, "bfloat16", 512, 500),
}
HOST = {  # what differs from the node's defaults
    "host_default": {},
    "host_no_checkpointing": {"gradient_checkpointing": False},
    "host_bypass": {"gradient_checkpointing": False, "bypass_mode": True},
    "host_fp32": {"gradient_checkpointing": False, "training_dtype": "fp32", "lora_dtype": "fp32"},
}
OURS = {"tlora": False, "tlora_checkpointing": True}
ROWS = ["floor", *HOST, *OURS]


class Setting:
    """One model, and one latent and text for it."""

    def __init__(self, name, weights, rank):
        import random_models
        import torch

        self.name, self.rank = name, rank
        function, arguments, channels, size, dtype, tokens, self.paper_steps = MODELS[name]
        compute = getattr(torch, dtype)
        options = {"dtype": compute, "storage": torch.float8_e4m3fn if weights == "fp8" else None}
        self.make = lambda disable_dynamic=False: getattr(random_models, function)(**arguments, **options)
        self.model = self.make()
        self.model.cached_patcher_init = (
            self.make,
            (),
        )  # the node trains a copy that it loads
        self.device = self.model.load_device
        # On a CPU: processor time of one thread, which other work on the machine hardly changes.
        self.clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self.latent = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
        self.text = random_models.conditioning(self.model, tokens)
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.model])

    def synchronize(self):
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Floor:
    def __init__(self, setting):
        self.setting = setting

    def seconds(self, steps):
        import torch

        from tlora_core import Adapters, RankSchedule
        from tlora_core.hosts.comfy.model.noise import draw_sigmas
        from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
        from tlora_core.hosts.comfy.training.encode import Sample
        from tlora_core.hosts.comfy.training.session import training_session
        from tlora_core.training.config import TrainConfig

        setting, generator = self.setting, torch.Generator().manual_seed(0)
        with training_session(setting.model):
            sample = Sample(setting.latent[0], None, None, setting.text)
            denoiser = HostDenoiser(setting.model, Adapters({}), RankSchedule(1, 1), [sample], TrainConfig())
            base = setting.model.model
            inputs = denoiser.inputs(denoiser.samples, setting.latent)

            def step():
                sigmas = draw_sigmas(base.model_sampling, 1, generator).to(setting.device)
                x = setting.latent.to(setting.device).requires_grad_()
                output = base.apply_model(x, sigmas, **inputs, transformer_options={**denoiser.options, "wrappers": {}})
                output.square().mean().backward()

            step()
            setting.synchronize()
            start = setting.clock()
            for _ in range(steps):
                step()
            setting.synchronize()
            return (setting.clock() - start) / steps


class Host:
    def __init__(self, setting, **changes):
        self.setting = setting
        self.inputs = {
            "model": setting.model,
            "batch_size": 1,
            "grad_accumulation_steps": 1,
            "learning_rate": 1e-4,
            "rank": setting.rank,
            "optimizer": "AdamW",
            "loss_function": "MSE",
            "seed": 0,
            "training_dtype": "bf16",
            "lora_dtype": "bf16",
            "quantized_backward": False,
            "algorithm": "LoRA",
            "gradient_checkpointing": True,
            "checkpoint_depth": 1,
            "offloading": False,
            "existing_lora": "[None]",
            "bucket_mode": False,
            "bypass_mode": False,
            **changes,
        }

    def seconds(self, steps):
        import comfy.utils
        import torch
        from comfy_extras.nodes_train import TrainLoraNode

        ends = []
        comfy.utils.set_progress_bar_global_hook(lambda *args, **kwargs: ends.append(self.setting.clock()))
        try:
            with torch.inference_mode():
                TrainLoraNode.execute(
                    latents=[{"samples": self.setting.latent.clone()}],
                    positive=[self.setting.text],
                    steps=[steps + 1],
                    **{name: [value] for name, value in self.inputs.items()},
                )
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
            gc.collect()
        return (ends[-1] - ends[0]) / steps


class Ours:
    """The trainer keeps its state from one run to the next, so that its adapters are made once."""

    def __init__(self, setting, checkpointing, adapters=None):
        import torch

        from tlora_core import make_adapters
        from tlora_core.hosts.comfy.model.defaults import defaults_for
        from tlora_core.hosts.comfy.model.families import target_layers
        from tlora_core.training.config import TrainConfig
        from tlora_core.training.trainer import Trainer

        self.setting, self.checkpointing = setting, checkpointing
        self.method = defaults_for(setting.model).method
        start = setting.clock()
        with torch.inference_mode(False):
            shapes = {name: layer.shape for name, layer in target_layers(setting.model).items()}
            self.adapters = adapters or make_adapters(
                self.method, "last_random", shapes, setting.rank, 0, setting.device
            )
            setting.synchronize()
            self.start_seconds = setting.clock() - start
            self.trainer = Trainer(self.adapters, TrainConfig(steps=10**6))

    def seconds(self, steps):
        from tlora_core import RankSchedule
        from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
        from tlora_core.hosts.comfy.training.encode import Sample
        from tlora_core.hosts.comfy.training.session import training_session

        setting, trainer = self.setting, self.trainer
        with training_session(setting.model, self.checkpointing):
            sample = Sample(setting.latent[0], None, None, setting.text)
            denoiser = HostDenoiser(
                setting.model, self.adapters, RankSchedule(setting.rank, setting.rank // 2), [sample], trainer.config
            )
            trainer.run(denoiser, trainer.step + 1)
            setting.synchronize()
            start = setting.clock()
            trainer.run(denoiser, trainer.step + steps)
            setting.synchronize()
            return (setting.clock() - start) / steps


def candidate(row, setting, adapters=None):
    if row == "floor":
        return Floor(setting)
    return Host(setting, **HOST[row]) if row in HOST else Ours(setting, OURS[row], adapters)


def memory(row, setting, steps):
    """(highest memory in use, that above the loaded model) in MB, of a run of this row."""
    import ctypes

    import torch

    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        candidate(row, setting).seconds(steps)
        peak = torch.cuda.max_memory_allocated()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        start = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        candidate(row, setting).seconds(steps)
        peak = status("VmHWM")
    return round(peak / 2**20), round((peak - start) / 2**20)


def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def memory_elsewhere(row, args):
    """`memory` of a row, in a process of its own. None where the system does not tell it, or memory does not
    suffice."""
    if args.device == "cpu" and sys.platform != "linux":
        return None, None
    command = [
        sys.executable,
        __file__,
        "--only-memory",
        row,
        "--model",
        args.model,
        "--device",
        args.device,
        "--weights",
        args.weights,
        "--rank",
        str(args.rank),
        "--steps",
        str(args.steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{row}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None, None
    return json.loads(done.stdout.splitlines()[-1])


def measure(args):
    import torch

    if args.device == "cpu":
        torch.set_num_threads(1)
    setting = Setting(args.model, args.weights, args.rank)
    every, adapters = {}, None
    for row in args.rows:
        every[row] = candidate(row, setting, adapters)
        adapters = getattr(every[row], "adapters", adapters)
    seconds = {row: [] for row in every}
    for i in range(args.rounds + 1):
        for j in range(len(args.rows)):
            row = args.rows[(i + j) % len(args.rows)]  # no row always follows the same one
            taken = every[row].seconds(args.steps)
            if i:  # the first round warms up kernels and caches
                seconds[row].append(taken)
    rows = []
    for row, own in seconds.items():
        peak, growth = memory_elsewhere(row, args)
        rows.append(
            {
                "what": row,
                "ratio_to_floor": round(statistics.median(a / b for a, b in zip(own, seconds["floor"])), 3),
                "seconds_per_step": round(statistics.median(own), 4),
                "peak_mb": peak,
                "growth_mb": growth,
            }
        )
        if args.device == "cuda" and row in OURS:
            start = next(c.start_seconds for c in every.values() if hasattr(c, "start_seconds"))
            rows[-1] |= {
                "start_seconds": round(start, 2),
                "run_seconds": round(start + setting.paper_steps * rows[-1]["seconds_per_step"], 1),
            }
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sdxl-small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--weights", choices=("full", "fp8"), default="full", help="how the frozen weights are kept")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rows", type=lambda text: text.split(","), help="some of: " + ", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in each run")
    parser.add_argument("--only-memory", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    # On a GPU the node would need the memory of a second model.
    args.rows = ["floor"] + [
        r for r in args.rows or (ROWS if args.device == "cpu" else ["floor", *OURS]) if r != "floor"
    ]
    sys.argv = sys.argv[:1] + (["--cpu"] if args.device == "cpu" else ["--disable-dynamic-vram"])
    import comfy.options

    comfy.options.enable_args_parsing()
    if args.only_memory:
        print(json.dumps(memory(args.only_memory, Setting(args.model, args.weights, args.rank), args.steps)))
        return
    rows = measure(args)
    show(rows, args.json, model=args.model, device=args.device, weights=args.weights, rounds=args.rounds)


if __name__ == "__main__":
    main()
