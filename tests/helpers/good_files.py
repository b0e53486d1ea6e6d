"""Small good files of each kind, for tests that damage them, and the rule for what becomes of a damaged one."""

import io
import json
import os
import re
import struct
from collections import Counter
from pathlib import Path

import torch
from foreign_files import orthogonal_parts, reference_flux
from safetensors.torch import save

from tlora_core import LowRank, RankSchedule, TLoRAError, TLoRAFile
from tlora_core.files.foreign import load_any

tried: Counter = Counter()
NAME = "middle_block.1.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_" + NAME.replace(".", "_")
REFERENCE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"


def refuse_or_read(path):
    """load_any's message, None when the file was read."""
    try:
        load_any(path)
    except TLoRAError as error:
        message = str(error)
        tried["refused"] += 1
        assert message.startswith(f'"{path.name}"') and message.endswith(".") and "\n" not in message, message
        assert not re.search(r"[.!?] +[A-Z]", message), message
        return message
    tried["read"] += 1
    return None


def ours() -> bytes:
    layer = LowRank(torch.ones(4, 4), torch.ones(4, 6), 2)
    file = TLoRAFile({NAME: layer}, "tlora", RankSchedule(2, 1), 1000, "discrete", "sdxl", "sks", "dog")
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"tlora-{os.getpid()}.safetensors"
    file.save(path)
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def kohya() -> bytes:
    return save(
        {
            f"{KOHYA}.lora_up.weight": torch.ones(4, 2),
            f"{KOHYA}.lora_down.weight": torch.ones(2, 6),
            f"{KOHYA}.alpha": torch.tensor(2.0),
        }
    )


def reference() -> bytes:
    (B, S, A), (B0, S0, A0) = orthogonal_parts(6, 6, 2)
    parts = {
        "p_layer.weight": B,
        "q_layer.weight": A,
        "lambda_layer": S[None],
        "base_p.weight": B0,
        "base_q.weight": A0,
        "base_lambda": S0[None],
    }
    return save({f"{REFERENCE}.{name}": part.float().contiguous() for name, part in parts.items()})


def flux() -> bytes:
    buffer = io.BytesIO()
    torch.save(reference_flux()[0], buffer)
    return buffer.getvalue()


GOOD = {"ours": ours(), "kohya": kohya(), "reference": reference(), "flux": flux()}


def split_header(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def pair(up, down, alpha=None):
    state = {f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down}
    return lambda folder: save(state | ({} if alpha is None else {f"{KOHYA}.alpha": alpha}))


def reference_parts(**shapes):
    """A layer of the reference, of ones."""
    names = {part: part if "lambda" in part else f"{part}.weight" for part in shapes}
    return lambda folder: save({f"{REFERENCE}.{names[part]}": torch.ones(shape) for part, shape in shapes.items()})
