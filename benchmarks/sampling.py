"""What a T-LoRA costs while sampling, compared with a bare model and with the host's own static LoRA of the same rank.

    python3 tools/host.py bench sampling [--model sdxl|flux|...] [--device cpu|cuda] [--json]

All of them run in turn in one process, for several rounds; a row gives medians. A run is a whole sampling by the host,
Euler with guidance, from a loaded bare model. "seconds_per_step" and "ratio" (to bare) include everything, also the
time in which the host puts a static LoRA's weights in place. "sampling_ratio" leaves that time out, so a static LoRA's
is 1 except for noise. On a CPU everything runs on one thread, and seconds are processor time, to which waiting for
other programs does not add. "peak_mb" is the memory above that of the loaded bare model, without the T-LoRA's own
tensors ("file_mb", float32). "layers" and "kept_mb" are the layers folded in each way and the memory kept for them.

Rows are bare; static_lora; tlora, as the pack chooses; and tlora_product, with nothing folded.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from _printing import show

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

# name: (function of random_models, its arguments, latent channels, latent size, dtype, steps, guidance). The text of
# sdxl-fifth is a fifth as wide as SDXL's too.
MODELS = {
    "sdxl-small": ("sdxl", {"width": 64}, 4, 32, "float32", 8, 5.0),
    "sdxl-fifth": (
        "sdxl",
        {"width": 64, "context": 416},
        4,
        64,
        "float32",
        8,
        5.0,
    ),
    "sdxl": ("sdxl", {}, 4, 128, "bfloat16", 25, 5.0),
    "flux-small": ("flux", {"hidden": 512, "blocks": (4, 8), "context": 512, "vector": 128}, 16, 32, "float32", 8, 1.0),
    "flux": ("flux", {}, 16, 128, "bfloat16", 25, 1.0),
}


class PeakMemory:
    """Highest memory in use within the block, above that at its start, in MB."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        import psutil
        import torch

        self.process = psutil.Process()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            gc.collect()
            if sys.platform == "linux":
                # Otherwise memory that an earlier run freed would hide what this one takes.
                ctypes.CDLL(None).malloc_trim(0)
            self.start = self.highest = self.process.memory_info().rss
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.005):
            self.highest = max(self.highest, self.process.memory_info().rss)

    def __exit__(self, *_):
        import torch

        if self.cuda:
            self.highest = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.thread.join()
        self.mb = (self.highest - self.start) / 2**20


class Runs:
    """The runs of one model. `time(patched)` gives (seconds of loading, seconds of sampling, peak MB)."""

    def __init__(self, name, steps=None):
        import random_models
        import torch

        function, arguments, self.channels, self.size, dtype, default_steps, self.guidance = MODELS[name]
        self.bare = getattr(random_models, function)(**arguments, dtype=getattr(torch, dtype))
        self.steps = steps or default_steps
        self.positive, self.negative = (random_models.conditioning(self.bare, seed=s) for s in (1, 2))

    def time(self, patched):
        import comfy.model_management as mm
        import comfy.sample
        import torch

        latent = torch.zeros(1, self.channels, self.size, self.size)
        self.ways = {}
        noise = comfy.sample.prepare_noise(latent, 0)
        on_gpu = self.bare.load_device.type == "cuda"
        synchronize, clock = (
            (torch.cuda.synchronize, time.perf_counter) if on_gpu else (lambda: None, time.process_time)
        )
        mm.load_models_gpu([self.bare])
        synchronize()
        with PeakMemory(self.bare.load_device) as memory:
            start = clock()
            mm.load_models_gpu([patched])
            synchronize()
            loaded = clock()
            comfy.sample.sample(
                patched,
                noise,
                self.steps,
                self.guidance,
                "euler",
                "simple",
                self.positive,
                self.negative,
                latent,
                disable_pbar=True,
                seed=0,
                callback=self._look,
            )
            synchronize()
            end = clock()
        return loaded - start, end - loaded, memory.mb

    def _look(self, step, *_):
        if step == self.steps - 1:
            self.ways = ways(self.bare.model)


def ways(base):
    """How many layers have their update folded, and what is kept for that."""
    from tlora_core.hosts.comfy.sampling import Folds
    from tlora_core.layers.folded_output import FoldedOutput
    from tlora_core.layers.folded_weight import FoldedWeight

    known = Folds.of(base)
    weights = [fold for fold in known.layers.values() if isinstance(fold, FoldedWeight)]
    outputs = [fold for fold in known.layers.values() if isinstance(fold, FoldedOutput)]
    texts = known.texts.texts if known.texts else []
    tensors = [x for text in texts for output in text.outputs.values() for x in output.tensors]
    return {
        "layers": {"weight": len(weights), "output": len(outputs)},
        "kept_mb": {
            "weight": round(sum(fold.weight.nbytes for fold in weights if fold.weight is not None) / 2**20, 1),
            "output": round(sum(x.nbytes for x in tensors) / 2**20, 1),
        },
    }


@contextmanager
def memory(is_short):
    """Within the block a T-LoRA finds no memory to keep anything in, where it is short."""
    from tlora_core.hosts.comfy import sampling

    before = sampling._room, sampling._lasting_room
    if is_short:
        sampling._room = sampling._lasting_room = lambda *_: 0
    try:
        yield
    finally:
        sampling._room, sampling._lasting_room = before


def static_lora(model, tlora):
    """`model` with the host's own loader of the same update, at full rank."""
    import tempfile

    import comfy.sd
    import comfy.utils

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        tlora.save(path)
        return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0)[0]


def candidates(runs, ranks, counts):
    """(row, MODEL) of everything to be compared."""
    import random_models

    from tlora_core.hosts.comfy.sampling import apply_tlora

    yield {"what": "bare"}, runs.bare
    for rank in ranks:
        tloras = [random_models.random_tlora(runs.bare, rank, seed=s) for s in range(max(counts))]
        for count in counts:
            row = {
                "rank": rank,
                "tloras": count,
                "targets": len(tloras[0].layers),
                "file_mb": round(sum(x.nbytes for x in tloras[0].layers.values()) / 2**20),
            }
            static, auto, product = runs.bare, runs.bare, runs.bare
            for tlora in tloras[:count]:
                static, auto = static_lora(static, tlora), apply_tlora(auto, tlora)
                product = apply_tlora(product, tlora, fold=False)
            yield {"what": "static_lora", **row}, static
            yield {"what": "tlora", **row}, auto
            yield {"what": "tlora_short", **row}, auto
            yield {"what": "tlora_product", **row}, product


def measure(name, ranks, counts, rounds, steps=None):
    import torch

    runs = Runs(name, steps)
    if runs.bare.load_device.type == "cpu":
        torch.set_num_threads(1)
    with torch.inference_mode():
        every = list(candidates(runs, ranks, counts))
        for row, model in every:
            with memory(row["what"] == "tlora_short"):
                runs.time(model)  # warms up kernels and caches
            row.update(runs.ways)
        times = [[] for _ in every]
        for i in range(rounds):
            for index in range(len(every)):
                index = (index + i) % len(every)  # no candidate always follows the same one
                with memory(every[index][0]["what"] == "tlora_short"):
                    times[index].append(runs.time(every[index][1]))
    bare = times[0]
    rows = []
    for (row, _), own in zip(every, times):
        # Each run against the bare one of its own round: what the machine does meanwhile then weighs on both.
        ratio = statistics.median(sum(a[:2]) / sum(b[:2]) for a, b in zip(own, bare))
        rows.append(
            {
                **row,
                "ratio": round(ratio, 3),
                "sampling_ratio": round(statistics.median(a[1] / b[1] for a, b in zip(own, bare)), 3),
                "seconds_per_step": round(statistics.median(a[0] + a[1] for a in own) / runs.steps, 4),
                "load_seconds": round(statistics.median(a[0] for a in own), 3),
                "peak_mb": round(statistics.median(a[2] for a in own)),
            }
        )
    return rows


def numbers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sdxl-small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=numbers, default=[64], help="such as 16,64,128")
    parser.add_argument("--tloras", type=numbers, default=[1], help="how many at once, such as 1,2,3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    sys.argv = sys.argv[:1] + (["--cpu"] if args.device == "cpu" else ["--disable-dynamic-vram"])
    import comfy.options

    comfy.options.enable_args_parsing()
    rows = measure(args.model, args.ranks, args.tloras, args.rounds, args.steps)
    show(rows, args.json, model=args.model, device=args.device, rounds=args.rounds)


if __name__ == "__main__":
    main()
