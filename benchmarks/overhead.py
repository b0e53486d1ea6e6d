"""What Python itself takes while a T-LoRA samples on SDXL's 560 layers.

    python3 tools/host.py bench overhead [--rounds 60] [--root FOLDER] [--json]

A small SDXL has its attention layers replaced with ones 8 wide, whose products take next to no time. An evaluation then
is what the patch prepares, puts on and takes off, with all layers called once. "ms" is the processor time of the
quickest evaluation, and "more_ms" what is more than the bare layers. The rank moves at every evaluation. Layers are
updated together in groups as large as SDXL's own. --root compares: it takes the pack of another checkout, so that
commits can be measured in turn.
"""

import argparse
import gc
import importlib.util
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from _printing import show

ROOT = Path(__file__).resolve().parents[1]
WIDTH, TOKENS, RANK = 8, 4, 64
LAYERS_OF_A_GROUP = 10  # of SDXL's, 1280 by 1280, as many as `group.GROUP_BYTES` takes
WAYS = {"folded": True, "beside": False}


class Narrow:
    """A MODEL on the CPU whose attention layers are 8 wide, and its evaluations."""

    def __init__(self, dtype):
        import comfy.ops
        import random_models
        import torch

        from tlora_core.hosts.comfy.model.families import target_layers

        self.model = random_models.sdxl(64, context=64, dtype=dtype)
        network = self.model.model.diffusion_model
        self.names = list(target_layers(self.model))
        for name in self.names:
            parent, _, last = name.path.rpartition(".")
            layer = comfy.ops.disable_weight_init.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
            torch.nn.init.normal_(layer.weight).requires_grad_(False)
            setattr(network.get_submodule(parent), last, layer)
        of_paths = {path: module for path, module in network.named_modules() if path in set(self.names)}
        self.layers = list(of_paths.values())
        self.is_text = [path.endswith(("attn2.to_k", "attn2.to_v")) for path in of_paths]
        self.class_obj = self.model.model
        self.x = torch.randn(2, TOKENS, WIDTH, dtype=dtype)
        self.text = torch.randn(2, TOKENS, WIDTH, dtype=dtype)

    def tlora(self):
        import torch

        from tlora_core import LowRank, RankSchedule, TLoRAFile
        from tlora_core.hosts.comfy.model.noise import domain

        def update():
            return LowRank(torch.randn(WIDTH, 2 * RANK), torch.randn(2 * RANK, WIDTH), 2)

        sampling = self.class_obj.model_sampling
        updates = {name: update() for name in self.names}
        return TLoRAFile(updates, "tlora", RankSchedule(RANK, RANK // 2), 1000, domain(sampling), "counted")

    def __call__(self, x, sigma, c_concat, text, *args, **kwargs):
        """Stands in for the host's model: calls all layers."""
        for layer, is_text in zip(self.layers, self.is_text):
            layer(text if is_text else x)

    def quickest(self, patch, rounds: int) -> float:
        """Milliseconds of the quickest of so many evaluations, with `patch` or bare."""
        import torch

        self.class_obj.current_patcher = self.model
        best = float("inf")
        for i in range(rounds + 3):
            sigma = torch.full((2,), 14.0 * 0.93 ** (i % 60))
            began = time.process_time()
            if patch is None:
                self(self.x, sigma, None, self.text)
            else:
                patch(self, self.x, sigma, None, self.text)
            if i >= 3:
                best = min(best, time.process_time() - began)
        self.class_obj.current_patcher = None
        return 1e3 * best


def measure(dtype: str, rounds: int) -> list[dict]:
    import torch

    from tlora_core.hosts.comfy.sampling import Folds, SamplingPatch

    narrow = Narrow(getattr(torch, dtype))
    tlora, rows = narrow.tlora(), []
    group = LAYERS_OF_A_GROUP * WIDTH * WIDTH * narrow.x.element_size()
    with ExitStack() as stack, torch.inference_mode():
        if importlib.util.find_spec("tlora_core.layers.group"):
            stack.enter_context(mock.patch("tlora_core.layers.group.GROUP_BYTES", group))
        gc.disable()
        bare = narrow.quickest(None, rounds)
        for way, fold in WAYS.items():
            patch = SamplingPatch(tlora, 1.0, fold)
            took = narrow.quickest(patch, rounds)
            Folds.forget(narrow.model)
            rows.append({"what": way, "dtype": dtype, "ms": round(took, 2), "more_ms": round(took - bare, 2)})
        gc.enable()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout whose pack is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    sys.path[:0] = [str(args.root.resolve()), str(args.root.resolve() / "tools")]
    sys.argv = sys.argv[:1] + ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_num_threads(1)
    rows = [row for dtype in ("float32", "bfloat16") for row in measure(dtype, args.rounds)]
    show(rows, args.json)


if __name__ == "__main__":
    main()
