"""Damaged files, generated: one clear sentence from `load_any`; nothing is run, written or patched.

Every file here is either refused with a TLoRAError or read; any other exception fails the test. They start from good
files of each kind and are changed in a few places, since noise alone never gets past the first check.
"""

import json
import math

import pytest
import torch
from good_files import GOOD, KOHYA, pair, reference_parts, refuse_or_read, split_header, tried, with_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file


@pytest.fixture(scope="module", autouse=True)
def report_counts():
    yield
    print(f"malformed inputs: {sum(tried.values())} tried, {tried['refused']} refused, {tried['read']} read")


@pytest.mark.parametrize("kind", GOOD)
def test_the_good_files_are_read(tmp_path, kind):
    (tmp_path / "a.bin").write_bytes(GOOD[kind])
    assert refuse_or_read(tmp_path / "a.bin") is None


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
    [
        torch.float16,
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.int8,
        torch.bool,
        torch.int64,
        torch.float8_e4m3fn,
    ]
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
        st.tuples(st.sampled_from(MODULES), st.sampled_from(SUFFIXES)),
        st.tuples(SHAPES, TENSOR_TYPES, VALUES),
        max_size=5,
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
    path.write_bytes(
        reference_parts(q_layer=q, p_layer=p, lambda_layer=scale, base_q=q, base_p=p, base_lambda=scale)(path.parent)
    )
    fits = len(q) == len(p) == 2 and p[1] == q[0] == math.prod(scale) and 0 not in (*q, *p)
    assert (refuse_or_read(path) is None) == fits
