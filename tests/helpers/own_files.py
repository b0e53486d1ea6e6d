"""T-LoRA files as the pack saves them, and damaged versions of them."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlora_core import METHODS, RankSchedule, TLoRAFile, make_adapters

LAYERS = {
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": (12, 10),
    "middle_block.1.transformer_blocks.0.attn2.to_out.0": (8, 20),
}


FIRST = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def make(method="tlora", rank=4, **changes):
    adapters = make_adapters(method, "last_random", LAYERS, rank, seed=0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    fields = {
        "layers": {name: a.detach() for name, a in adapters.items()},
        "method": method,
        "schedule": RankSchedule(rank, rank // 2 if METHODS[method].is_masked else rank),
        "num_timesteps": 1000,
        "noise_domain": "discrete",
        "base_model": "sdxl",
        "token": "sks",
        "class_word": "dog",
        "training": {"steps": 800, "learning_rate": 1e-4, "start": "last_random", "images": 1},
    }
    return TLoRAFile(**(fields | changes))


def tamper(path, metadata=None, drop=(), **content):
    """Rewrites a saved file with changed tensors, whole metadata, or single fields of the T-LoRA metadata."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as f:
        meta = f.metadata()
    tensors.update({k: v for k, v in content.pop("tensors", {}).items()})
    for key in drop:
        del tensors[key]
    fields = json.loads(meta["tlora"])
    fields.update(content)
    fields = {k: v for k, v in fields.items() if v is not ...}
    meta["tlora"] = json.dumps(fields)
    save_file(tensors, path, meta if metadata is None else metadata)
