"""Damaged and hostile files: one clear sentence from `load_any` and the command line; nothing is run, written or patched.

Every file here is either refused with a TLoRAError or read; any other exception fails the test. The generated ones start
from good files of each kind and are changed in a few places, since noise alone never gets past the first check.
"""

import io
import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from foreign_files import orthogonal_parts, reference_flux
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tlora_core import LowRank, RankSchedule, TLoRAError, TLoRAFile
from tlora_core.cli import main
from tlora_core.foreign import load_any

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


@pytest.fixture(scope="module", autouse=True)
def report_counts():
    yield
    print(f"malformed inputs: {sum(tried.values())} tried, {tried['refused']} refused, {tried['read']} read")


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


@pytest.mark.parametrize("kind", GOOD)
def test_the_good_files_are_read(tmp_path, kind):
    (tmp_path / "a.bin").write_bytes(GOOD[kind])
    assert refuse_or_read(tmp_path / "a.bin") is None


# --- generated ---

FEW = settings(max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("kind", GOOD)
@FEW
@given(st.data())
def test_changed_bytes(tmp_path_factory, kind, data):
    content = bytearray(GOOD[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    path.write_bytes(content)
    refuse_or_read(path)


def split_header(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", ["ours", "kohya", "reference"])
@FEW
@given(st.data())
def test_changed_headers(tmp_path_factory, kind, data):
    header, body = split_header(GOOD[kind])
    key = data.draw(st.sampled_from(sorted(header)))
    how = data.draw(st.sampled_from(["value", "field", "drop", "rename"]))
    if how == "drop":
        del header[key]
    elif how == "rename":
        header[data.draw(st.text(max_size=12))] = header.pop(key)
    elif how == "field" and header[key]:
        header[key][data.draw(st.sampled_from(sorted(header[key])))] = data.draw(JSON)
    else:
        header[key] = data.draw(JSON)
    path = tmp_path_factory.mktemp("headers") / "a.safetensors"
    path.write_bytes(with_header(header, body))
    refuse_or_read(path)


@FEW
@given(st.data())
def test_changed_fields_of_our_metadata(tmp_path_factory, data):
    header, body = split_header(GOOD["ours"])
    content = json.loads(header["__metadata__"]["tlora"])
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSON)
    header["__metadata__"]["tlora"] = json.dumps(content)
    path = tmp_path_factory.mktemp("metadata") / "a.safetensors"
    path.write_bytes(with_header(header, body))
    refuse_or_read(path)


SHAPES = st.lists(st.integers(0, 5), max_size=4)
TENSOR_TYPES = st.sampled_from(
    [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn]
)
SUFFIXES = [
    ".lora_up.weight",
    ".lora_down.weight",
    ".alpha",
    ".lora_A.weight",
    ".lora_B.weight",
    ".dora_scale",
    "_lora.up.weight",
    "_lora.q_layer.weight",
    ".q_layer.weight",
    ".p_layer.weight",
    ".lambda_layer",
    "_lora.base_q.weight",
    ".hada_w1_a",
    "",
]
MODULES = [
    KOHYA,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q",
    "lycoris_mid_block_attentions_0_proj_in",
    "transformer.transformer_blocks.0.attn.to_q",
    "lora_te1_x",
    "diffusion_model.../../x",
    "diffusion_model.日本",
    "\x00",
]
VALUES = st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1e38, 1e-45])


@settings(FEW, max_examples=200)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(MODULES), st.sampled_from(SUFFIXES)), st.tuples(SHAPES, TENSOR_TYPES, VALUES), max_size=5
    )
)
def test_any_tensors_under_known_names(tmp_path_factory, described):
    tensors = {}
    for (module, suffix), (shape, dtype, value) in described.items():
        tensors[module + suffix] = torch.full(shape, value).to(dtype)
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    save_file(tensors, path)
    refuse_or_read(path)


SIDES = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@settings(FEW, max_examples=400)
@given(SIDES, SIDES)
def test_halves_of_any_shapes(tmp_path_factory, up, down):
    path = tmp_path_factory.mktemp("halves") / "a.safetensors"
    path.write_bytes(pair(torch.ones(up), torch.ones(down))(path.parent))
    fits = len(up) == len(down) == 2 and up[1] == down[0] and 0 not in (*up, *down)
    assert (refuse_or_read(path) is None) == fits


@settings(FEW, max_examples=400)
@given(SIDES, SIDES, SIDES)
def test_reference_parts_of_any_shapes(tmp_path_factory, q, p, scale):
    path = tmp_path_factory.mktemp("parts") / "a.safetensors"
    path.write_bytes(reference_parts(
        q_layer=q, p_layer=p, lambda_layer=scale, base_q=q, base_p=p, base_lambda=scale)(path.parent))
    fits = len(q) == len(p) == 2 and p[1] == q[0] == math.prod(scale) and 0 not in (*q, *p)
    assert (refuse_or_read(path) is None) == fits


# --- by hand ---


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def saved(**tensors):
    return lambda folder: save({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def pair(up, down, alpha=None):
    state = {f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down}
    return lambda folder: save(state | ({} if alpha is None else {f"{KOHYA}.alpha": alpha}))


def reference_parts(**shapes):
    """A layer of the reference, of ones."""
    names = {part: part if "lambda" in part else f"{part}.weight" for part in shapes}
    return lambda folder: save({f"{REFERENCE}.{names[part]}": torch.ones(shape) for part, shape in shapes.items()})


def torch_file(make):
    def build(folder):
        buffer = io.BytesIO()
        torch.save(make(folder), buffer)
        return buffer.getvalue()

    return build


def compressed_torch_file(folder):
    source, target = zipfile.ZipFile(io.BytesIO(GOOD["flux"])), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry.filename))
    return target.getvalue()


def twice_the_same_key(folder):
    header, body = split_header(GOOD["kohya"])
    text = json.dumps(header)
    first = json.dumps({key: header[key] for key in [next(iter(header))]})[1:-1]
    return with_header(f"{text[:-1]}, {first}}}".encode(), body)


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
UP, DOWN = torch.ones(4, 2), torch.ones(2, 6)
FILES = {
    "empty": (lambda folder: b"", "cannot be read"),
    "seven bytes": (lambda folder: b"1234567", "cannot be read"),
    "text": (lambda folder: b"<html>" * 50, "cannot be read"),
    "half of a file": (lambda folder: GOOD["kohya"][:-9], "cannot be read"),
    "half of a torch file": (
        lambda folder: GOOD["flux"][: len(GOOD["flux"]) // 2],
        "holds more than tensors, or is damaged",
    ),
    "header length beyond the file": (lambda folder: struct.pack("<Q", 10**6) + b"{}", "cannot be read"),
    "header length of 2^64 - 1": (lambda folder: b"\xff" * 64, "cannot be read"),
    "header of 100 MB": (lambda folder: with_header(b"{" + b" " * 100_000_001 + b"}", b""), "cannot be read"),
    "long but valid header": (lambda folder: with_header(b"{}" + b" " * 20_000_000, b""), "holds no tensors"),
    "deep JSON": (lambda folder: with_header(b"[" * 200_000, b""), "cannot be read"),
    "deep JSON in a table": (lambda folder: with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "cannot be read"),
    "header that is a list": (lambda folder: with_header([1], b""), "cannot be read"),
    "header that is not UTF-8": (lambda folder: with_header(b'{"\xff\xfe": 1}', b""), "cannot be read"),
    "no tensors": (lambda folder: save({}), "holds no tensors"),
    "a key twice": (twice_the_same_key, "a key stands in it twice"),
    "tensors that overlap": (lambda folder: with_header({"a": TENSOR, "b": TENSOR}, bytes(4)), "cannot be read"),
    "a shape of 2^62": (lambda folder: with_header({"a": TENSOR | {"shape": [2**62]}}, bytes(4)), "cannot be read"),
    "an unknown dtype": (lambda folder: with_header({"a": TENSOR | {"dtype": "X9"}}, bytes(4)), "cannot be read"),
    "other tensors": (
        saved(model__weight=torch.ones(3)),
        "none of its 1 keys fits; 'model.weight', for one: it is no part of a LoRA",
    ),
    "a text encoder's LoRA": (
        saved(lora_te1_a__lora_up__weight=UP, lora_te1_a__lora_down__weight=DOWN),
        "belongs to a text encoder",
    ),
    "a LoHa": (saved(lora_unet_a__hada_w1_a=UP, lora_unet_a__hada_w1_b=DOWN), "hada_w1_a is not a part of a plain LoRA"),
    "only one half": (lambda folder: save({f"{KOHYA}.lora_up.weight": UP}), 'the "down" part of its layer .* is missing'),
    "the other half": (lambda folder: save({f"{KOHYA}.lora_down.weight": DOWN}), 'the "up" part of its layer .* is missing'),
    "halves of two ranks": (pair(UP, torch.ones(3, 6)), "halves .* do not fit: up is .4, 2., down .3, 6."),
    "rank 0": (pair(torch.ones(4, 0), torch.ones(0, 6)), "has the shape .4, 0., which is no matrix"),
    "a vector": (pair(torch.ones(4), DOWN), "which is no matrix"),
    "NaN": (pair(UP * float("nan"), DOWN), "has NaN or infinite values"),
    "infinite": (pair(UP, DOWN / 0), "has NaN or infinite values"),
    "infinite alpha": (pair(UP, DOWN, torch.tensor(float("inf"))), "has NaN or infinite values"),
    "too large a product": (pair(UP * 3e38, DOWN, torch.tensor(1e30)), "too large for float32"),
    "three alphas": (pair(UP, DOWN, torch.ones(3)), "has 3 numbers instead of one"),
    "integers": (pair(UP.to(torch.int8), DOWN.to(torch.int8)), "is torch.int8; save it in"),
    "fp8": (pair(UP.to(torch.float8_e4m3fn), DOWN), "is torch.float8_e4m3fn; save it in"),
    "one layer under two names": (
        lambda folder: save(
            {f"{KOHYA}.lora_up.weight": UP, f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_B.weight": UP.clone()}
        ),
        "the same part of one layer",
    ),
    "a path that climbs": (
        saved(**{"diffusion_model__../../x__lora_up__weight": UP, "diffusion_model__../../x__lora_down__weight": DOWN}),
        "is not the path of a module",
    ),
    "reference without a base": (
        reference_parts(q_layer=(2, 6), p_layer=(6, 2), lambda_layer=(1, 2), base_lambda=(1, 2)),
        'the "base_q, base_p" part',
    ),
    "reference with another base": (
        reference_parts(
            q_layer=(2, 6), p_layer=(6, 2), lambda_layer=(1, 2), base_q=(3, 6), base_p=(6, 3), base_lambda=(1, 3)
        ),
        "has other shapes than the trained",
    ),
    "parts of two ranks": (reference_parts(q_layer=(2, 6), p_layer=(6, 3), lambda_layer=(1, 2)), "do not fit: p is"),
    "a pickle that runs code": (lambda folder: pickle.dumps(Payload(folder / "ran")), "cannot be read"),
    "a torch file that runs code": (torch_file(lambda folder: {"a": Payload(folder / "ran")}), "holds more than tensors"),
    "an old torch file that runs code": (
        lambda folder: b"\x80\x02" + pickle.dumps(Payload(folder / "ran"), 2)[2:],
        "cannot be read",
    ),
    "a compressed torch file": (compressed_torch_file, "compressed archive"),
    "a zip of something": (lambda folder: b"PK\x03\x04" + bytes(60), "holds more than tensors, or is damaged"),
    "a torch file with a list": (torch_file(lambda folder: [torch.ones(1)]), "without a table of tensors"),
    "a torch file with numbers": (
        torch_file(lambda folder: {"a": 1, 2: torch.ones(1)}),
        "none of its 2 keys fits; .* not a tensor",
    ),
    "a torch tensor of 10^18 numbers": (
        torch_file(lambda folder: {f"{KOHYA}.lora_up.weight": torch.as_strided(torch.ones(1), (10**9, 10**9), (0, 0))}),
        "not a tensor",
    ),
    "a sparse torch tensor": (torch_file(lambda folder: {"a": torch.ones(2, 2).to_sparse()}), "not a tensor"),
}


@pytest.mark.parametrize("command", [False, True], ids=["load_any", "command"])
@pytest.mark.parametrize("case", FILES)
def test_made_by_hand(tmp_path, capsys, case, command):
    build, words = FILES[case]
    path = tmp_path / "файл 名.safetensors"
    path.write_bytes(build(tmp_path))
    if command:
        assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 1
        printed = capsys.readouterr()
        assert not printed.out and printed.err.startswith(f'error: "{path.name}": ') and printed.err.count("\n") == 1
        assert re.search(words, printed.err)
    else:
        assert re.search(words, refuse_or_read(path))
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path,
        tmp_path / "gone",
        tmp_path / "dangling",
        tmp_path / "pipe",
        Path("/dev/zero"),
        Path("/dev/null"),
    ):
        assert "there is no such file" in refuse_or_read(path)


def test_a_symlink_to_a_good_file_is_read(tmp_path):
    (tmp_path / "good.safetensors").write_bytes(GOOD["kohya"])
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "good.safetensors")
    assert refuse_or_read(tmp_path / "link.safetensors") is None
