"""Damaged and hostile files made by hand: one clear sentence from `load_any` and the command line; nothing is run,
written or patched."""

import copy
import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from good_files import GOOD, KOHYA, pair, reference_parts, refuse_or_read, split_header, with_header
from safetensors.torch import save

from tlora_core.cli import main
from tlora_core.files.foreign.hparams import read_hparams


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def saved(**tensors):
    return lambda folder: save({name.replace("__", "."): tensor for name, tensor in tensors.items()})


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


def overlapping_torch_file(folder):
    """One tensor's bytes under ten names: read, ten times as much as the file."""
    source, target = (
        zipfile.ZipFile(io.BytesIO(torch_file(lambda _: {f"a{i}": torch.ones(1000) + i for i in range(10)})(folder))),
        io.BytesIO(),
    )
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            if re.fullmatch(r".*/data/[1-9]", name):
                twin = copy.copy(archive.getinfo(re.sub("[1-9]$", "0", name)))
                twin.filename = name
                archive.filelist.append(twin)
            else:
                archive.writestr(name, source.read(name))
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
    "deep JSON in a table": (
        lambda folder: with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
        "cannot be read",
    ),
    "header that is a list": (lambda folder: with_header([1], b""), "cannot be read"),
    "header that is not UTF-8": (lambda folder: with_header(b'{"\xff\xfe": 1}', b""), "cannot be read"),
    "no tensors": (lambda folder: save({}), "holds no tensors"),
    "a key twice": (twice_the_same_key, "it repeats a key"),
    "tensors that overlap": (lambda folder: with_header({"a": TENSOR, "b": TENSOR}, bytes(4)), "cannot be read"),
    "a shape of 2^62": (lambda folder: with_header({"a": TENSOR | {"shape": [2**62]}}, bytes(4)), "cannot be read"),
    "an unknown dtype": (lambda folder: with_header({"a": TENSOR | {"dtype": "X9"}}, bytes(4)), "cannot be read"),
    "other tensors": (
        saved(model__weight=torch.ones(3)),
        "none of its 1 keys fits; for example 'model.weight': it is not part of a LoRA",
    ),
    "a text encoder's LoRA": (
        saved(lora_te1_a__lora_up__weight=UP, lora_te1_a__lora_down__weight=DOWN),
        "belongs to a text encoder",
    ),
    "a LoHa": (
        saved(lora_unet_a__hada_w1_a=UP, lora_unet_a__hada_w1_b=DOWN),
        "hada_w1_a is not a part of a plain LoRA",
    ),
    "only one half": (
        lambda folder: save({f"{KOHYA}.lora_up.weight": UP}),
        'the "down" part of its layer .* is missing',
    ),
    "the other half": (
        lambda folder: save({f"{KOHYA}.lora_down.weight": DOWN}),
        'the "up" part of its layer .* is missing',
    ),
    "halves of two ranks": (pair(UP, torch.ones(3, 6)), "halves .* do not fit: up is .4, 2., down .3, 6."),
    "rank 0": (pair(torch.ones(4, 0), torch.ones(0, 6)), "has the shape .4, 0., which is not a matrix"),
    "a vector": (pair(torch.ones(4), DOWN), "which is not a matrix"),
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
        "does not have the shape of the trained",
    ),
    "parts of two ranks": (reference_parts(q_layer=(2, 6), p_layer=(6, 3), lambda_layer=(1, 2)), "do not fit: p is"),
    "a pickle that runs code": (lambda folder: pickle.dumps(Payload(folder / "ran")), "cannot be read"),
    "a torch file that runs code": (
        torch_file(lambda folder: {"a": Payload(folder / "ran")}),
        "holds more than tensors",
    ),
    "an old torch file that runs code": (
        lambda folder: b"\x80\x02" + pickle.dumps(Payload(folder / "ran"), 2)[2:],
        "cannot be read",
    ),
    "a compressed torch file": (compressed_torch_file, "compressed archive"),
    "a torch file whose tensors overlap": (overlapping_torch_file, "overlapping parts"),
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


def test_paths_that_are_no_regular_files_are_refused(tmp_path):
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


@pytest.mark.parametrize("what", ["name", "settings"])
def test_content_made_to_take_long_is_read_at_once(tmp_path, what):
    """In quadratic time, each of these takes many minutes: the test would not end."""
    if what == "name":
        (tmp_path / "a.safetensors").write_bytes(
            save({"a" + ".lora_magnitude_vector" * 100_000 + "\nx": torch.ones(1)})
        )
        assert "lora_magnitude_vector" in refuse_or_read(tmp_path / "a.safetensors")
    else:
        (tmp_path / "hparams.yml").write_text(
            "lora_rank: 4\nmin_rank: 2" + " " * 900_000 + "x\nalpha_rank_scale: 1 \t\n"
        )
        settings = read_hparams(tmp_path / "hparams.yml")
        assert (
            settings["lora_rank"] == "4" and settings["alpha_rank_scale"] == "1" and settings["min_rank"].endswith(" x")
        )
