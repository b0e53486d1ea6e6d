"""The T-LoRA file: exact round trips, a plain LoRA to everyone else, atomic writing, hostile input."""

import base64
import errno
import hashlib
import importlib.util
import io
import json
import os
from dataclasses import replace

import pytest
import torch
from own_files import FIRST, LAYERS, make, tamper
from PIL import Image
from places import REPO
from safetensors import safe_open
from safetensors.torch import load_file

from tlora_core import METHODS, LowRank, RankSchedule, TLoRAError, TLoRAFile
from tlora_core.training.images import thumbnail


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "sks dog.safetensors"
    make().save(path)
    return path


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.of_weight])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_exact_in_the_stored_dtype(tmp_path, method, dtype):
    path = tmp_path / "a.safetensors"
    file = make(method)
    file.save(path, dtype)
    loaded = TLoRAFile.load(path)
    for field in set(TLoRAFile.__dataclass_fields__) - {"layers"}:
        assert getattr(loaded, field) == getattr(file, field), field
    assert list(loaded.layers) == list(file.layers)
    for name, layer in file.layers.items():
        again = loaded.layers[name]
        assert torch.equal(again.up, layer.up.to(dtype)) and torch.equal(again.down, layer.down.to(dtype))
        assert again.group == layer.group
        assert again.up.dtype == again.down.dtype == dtype


def test_half_precision_costs_no_digits_of_a_small_update_and_no_more_than_twice_a_plain_lora():
    spec = importlib.util.spec_from_file_location("bench_files", REPO / "benchmarks" / "files.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = bench.measure(rank=8, blocks={"middle_block.1.transformer_blocks.0": 128})
    assert [(row["dtype"], row["moved"]) for row in rows] == [(d, m) for m in (0.001, 0.01, 1.0) for d in bench.DTYPES]
    for row in rows:
        limit = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[row["dtype"]]
        assert 0 < row["error"] < limit and 0 < row["error_half"] < limit and 1.5 < row["size_ratio"] <= 2, row


def test_others_read_a_plain_lora_of_scale_one(saved):
    tensors = load_file(saved)
    file = make()
    assert len(tensors) == 6
    for name, layer in file.layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        up, down, alpha = (tensors[key + s] for s in (".lora_up.weight", ".lora_down.weight", ".alpha"))
        torch.testing.assert_close(alpha.item() / down.shape[0] * up @ down, layer.up @ layer.down)
    with safe_open(saved, framework="pt") as f:
        metadata = f.metadata()
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "8"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    # As sd-scripts writes them for a folder of pictures named after the words.
    assert json.loads(metadata["ss_tag_frequency"]) == {"sks dog": {"sks dog": 1}}
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert (
        dataset["tag_frequency"] == {"sks dog": {"sks dog": 1}} and dataset["subsets"][0]["class_tokens"] == "sks dog"
    )
    assert metadata["modelspec.trigger_phrase"] == "sks dog" and "sks dog" in metadata["modelspec.title"]
    assert json.loads(metadata["tlora"])["format"] == 1


def test_lora_managers_find_the_hash_of_the_tensors(saved):
    content = saved.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    with safe_open(saved, framework="pt") as f:
        metadata = f.metadata()
    assert metadata["sshs_model_hash"] == digest and metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert "min_rank 2" in metadata["modelspec.description"] and metadata["ss_base_model_version"] == "sdxl_base_v1-0"


def test_number_of_pictures_stands_beside_the_trigger_words(tmp_path):
    for words, training, want in (
        ("sks", {"images": 3}, {"sks dog": {"sks dog": 3}}),
        ("", {"images": 3}, None),
        ("sks", {"images": "x"}, 1),
    ):
        make(token=words, class_word="dog" if words else "", training=training).save(tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", framework="pt") as f:
            told = f.metadata().get("ss_tag_frequency")
        assert (told and json.loads(told)) == ({"sks dog": {"sks dog": 1}} if want == 1 else want)


def test_a_thumbnail_is_in_the_file_only_when_given(tmp_path, saved):
    picture = thumbnail(torch.rand(2, 40, 60, 3))
    make().save(tmp_path / "a.safetensors", thumbnail=picture)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as f:
        kind, _, data = f.metadata()["modelspec.thumbnail"].partition(",")
        assert json.loads(f.metadata()["ssmd_cover_images"]) == [data]
    assert kind == "data:image/jpeg;base64" and base64.b64decode(data) == picture
    assert Image.open(io.BytesIO(picture)).size == (256, 256)
    with safe_open(saved, framework="pt") as f:
        assert not {"modelspec.thumbnail", "ssmd_cover_images"} & f.metadata().keys()
    TLoRAFile.load(tmp_path / "a.safetensors")


def test_equal_tloras_make_equal_files(tmp_path):
    odd = make(token='"犬\\" / é')
    files = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for path in files:
        odd.save(path)
    assert len({path.read_bytes() for path in files}) == 1
    assert TLoRAFile.load(files[0]).token == odd.token


def test_nothing_of_this_machine_is_in_the_file(saved):
    content = saved.read_bytes()
    for private in (str(saved.parent), os.path.expanduser("~"), "sks dog.safetensors"):
        assert private.encode() not in content


def test_layers_of_smaller_rank_run_on_their_own_schedule(tmp_path):
    file = make()
    small = LowRank(torch.randn(8, 4), torch.randn(4, 20), group=2)
    layers = dict(file.layers) | {"output_blocks.0.to_k": small}
    replace(file, layers=layers).save(tmp_path / "a.safetensors")
    loaded = TLoRAFile.load(tmp_path / "a.safetensors")
    assert loaded.schedule_of("output_blocks.0.to_k") == RankSchedule(2, 1)
    assert loaded.schedule_of(next(iter(LAYERS))) == RankSchedule(4, 2)


def test_file_can_be_replaced_while_an_older_copy_is_loaded(saved):
    before = TLoRAFile.load(saved)
    kept = {name: layer.up.clone() for name, layer in before.layers.items()}
    make(rank=2).save(saved)
    assert all(torch.equal(before.layers[name].up, up) for name, up in kept.items())
    assert TLoRAFile.load(saved).schedule.rank == 2


def fail_with_full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "tlora_core.files.atomic.save_file"])
@pytest.mark.parametrize("existed", [True, False])
def test_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, where, existed):
    path = tmp_path / "a.safetensors"
    if existed:
        make(rank=2).save(path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(where, fail_with_full_disk)
    with pytest.raises(TLoRAError, match=r'"a.safetensors" was not saved .*No space left.*free some disk space'):
        make().save(path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX file size limit")
def test_a_write_that_stops_half_way_keeps_the_old_file(tmp_path):
    import resource

    path = tmp_path / "a.safetensors"
    make(rank=2).save(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TLoRAError, match="was not saved"):
            make().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_saving_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make().save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(TLoRAError, match="was not saved"):
        make().save(tmp_path / "missing" / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_the_dtype_cannot_hold_are_not_saved(tmp_path, value):
    file = make()
    name, layer = next(iter(file.layers.items()))
    layer.down[0, 0] = value
    with pytest.raises(TLoRAError, match=f'"{name}" has NaN or infinite values in torch.float16'):
        file.save(tmp_path / "a.safetensors", torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "dora"}, "method is 'dora'"),
        ({"method": "lora"}, "set min_rank to the rank"),
        ({"method": "vanilla_tlora"}, "columns per component"),
        ({"schedule": RankSchedule(8, 4)}, "largest layer has rank 4"),
        ({"layers": {}}, "no layers"),
        ({"layers": {"../up": LowRank(torch.ones(2, 8), torch.ones(8, 2), 2)}}, "'../up' is not the path"),
        ({"num_timesteps": 0}, "num_timesteps is 0"),
        ({"num_timesteps": True}, "num_timesteps is True"),
        ({"num_timesteps": 10**400}, "num_timesteps is 1000"),
        ({"noise_domain": ""}, "noise_domain is empty"),
        ({"base_model": None}, "base_model is None"),
        ({"token": "s\x00ks"}, "token is"),
        ({"class_word": "\ud800"}, "class_word is"),
        ({"training": [1]}, "training is not a table"),
        ({"heights": [1]}, "heights is not a table"),
        ({"heights": {"a.b": 1.5}}, "heights is not a table"),
        ({"heights": {"a.b": 10**9}}, "heights is not a table"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes, named):
    file = make()
    with pytest.raises(TLoRAError, match=named):
        replace(file, **changes)


def test_an_update_of_a_whole_layer_beside_one_of_its_rows_is_refused():
    layer = LowRank(torch.ones(2, 8), torch.ones(8, 2), 2)
    with pytest.raises(TLoRAError, match="all of the layer.*rows from 0 on"):
        make(layers={"a.b": layer, "a.b@0": layer})


def test_layers_that_would_share_a_key_are_refused():
    layer = LowRank(torch.ones(2, 8), torch.ones(8, 2), 2)
    with pytest.raises(TLoRAError, match='"a.b_c" and "a_b.c"'):
        make(layers={"a.b_c": layer, "a_b.c": layer})


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), torch.ones(1)])
def test_training_parameters_that_are_not_json_are_refused(tmp_path, value):
    with pytest.raises(TLoRAError, match="JSON"):
        make(training={"x": value}).save(tmp_path / "a.safetensors")


def test_only_three_dtypes_are_stored(tmp_path):
    with pytest.raises(TLoRAError, match="float32, bfloat16 or float16"):
        make().save(tmp_path / "a.safetensors", torch.int8)


UP, DOWN, ALPHA = FIRST + ".lora_up.weight", FIRST + ".lora_down.weight", FIRST + ".alpha"
DAMAGE = {
    "newer format": (dict(format=3), "format version 3, .* update the node pack"),
    "points that are none": (dict(points=[[0, 4], "x"]), 'no valid "points"'),
    "points beyond any number": (dict(points=[[10**400, 4], [1, 2]]), "curve"),
    "points out of order": (dict(points=[[1, 4], [0, 2]]), "curve"),
    "points against min_rank": (dict(points=[[0, 4], [1, 1]]), "for a curve, set min_rank"),
    "format zero": (dict(format=0), "format version is 0"),
    "format true": (dict(format=True), "format version is True"),
    "no format": (dict(format=...), 'no valid "format"'),
    "unknown method": (dict(method="boft"), "method is 'boft'"),
    "method of another type": (dict(method=["tlora"]), 'no valid "method"'),
    "rank zero": (dict(rank=0, min_rank=0), "rank is 0"),
    "rank as text": (dict(rank="4"), "rank is '4'"),
    "min_rank above rank": (dict(min_rank=5), "min_rank is 5"),
    "alpha negative": (dict(alpha=-1), "alpha is -1"),
    "rank above the tensors": (dict(rank=8), "largest layer has rank 4"),
    "no min_rank": (dict(min_rank=...), 'no valid "min_rank"'),
    "no T": (dict(num_timesteps=...), 'no valid "num_timesteps"'),
    "T null": (dict(num_timesteps=None), "num_timesteps is None"),
    "layers a list": (dict(layers=["a"]), 'no valid "layers"'),
    "no layers": (dict(layers={}), "6 of its tensors belong to no layer"),
    "layer rank wrong": (dict(layers={n: 3 for n in LAYERS}), "has rank 4, but its metadata says 3"),
    "layer rank nested": (dict(layers={n: [4] for n in LAYERS}), "metadata says"),
    "layer not stored": (dict(layers={n: 4 for n in [*LAYERS, "x.y"]}), "'lora_unet_x_y.lora_up.weight' is missing"),
    "layer not named": (dict(layers={next(iter(LAYERS)): 4}), "3 of its tensors belong to no layer"),
    "keys a list": (dict(keys=["a"]), 'no valid "keys"'),
    "keys of numbers": (dict(keys={next(iter(LAYERS)): 1}), 'no valid "keys"'),
    "one key for two layers": (dict(keys=dict.fromkeys(LAYERS, "a")), "two of its layers share their tensors"),
    "a key that is not stored": (dict(keys={next(iter(LAYERS)): "a"}), "'a.lora_up.weight' is missing"),
    "training a list": (dict(training=[]), "training is not a table"),
    "half a pair": (dict(drop=[UP]), "lora_up.weight' is missing"),
    "other half": (dict(drop=[DOWN]), "lora_down.weight' is missing"),
    "no alpha": (dict(drop=[ALPHA]), "alpha' is missing"),
    "alpha rescaled": (dict(tensors={ALPHA: torch.tensor(4.0)}), "alpha that is not its stored rank, 8"),
    "alpha a vector": (dict(tensors={ALPHA: torch.full((2,), 8.0)}), "alpha that is not its stored rank"),
    "NaN": (dict(tensors={UP: torch.full((12, 8), float("nan"))}), "has NaN or infinite values"),
    "infinite": (dict(tensors={DOWN: torch.full((8, 10), float("inf"))}), "has NaN or infinite values"),
    "inner sizes differ": (dict(tensors={UP: torch.ones(12, 6)}), "is not valid"),
    "odd stored rank": (dict(tensors={UP: torch.ones(12, 7), DOWN: torch.ones(7, 10)}), "is not valid"),
    "stored rank zero": (dict(tensors={UP: torch.ones(12, 0), DOWN: torch.ones(0, 10)}), "is not valid"),
    "convolution": (dict(tensors={UP: torch.ones(12, 8, 1, 1)}), "is not valid"),
    "integers": (dict(tensors={UP: torch.ones(12, 8, dtype=torch.int8)}), "not in float32, bfloat16 or float16"),
    "mixed dtypes": (dict(tensors={UP: torch.ones(12, 8).half()}), "differ in dtype"),
    "tensor too many": (
        dict(tensors={"extra": torch.ones(1)}),
        "1 of its tensors belong to no layer, for example 'extra'",
    ),
    "no metadata": (dict(metadata={"format": "pt"}), "no T-LoRA metadata; load a plain LoRA"),
    "not JSON": (dict(metadata={"tlora": "{"}), "metadata is damaged"),
    "JSON NaN": (dict(metadata={"tlora": '{"format": NaN}'}), "metadata is damaged"),
    "JSON list": (dict(metadata={"tlora": "[1]"}), "not a table"),
    "deep JSON": (dict(metadata={"tlora": "[" * 100_000}), "metadata is damaged"),
    "huge number": (dict(metadata={"tlora": '{"format": ' + "9" * 5000 + "}"}), "metadata is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_content_is_one_sentence_naming_the_file(saved, damage):
    changes, message = DAMAGE[damage]
    tamper(saved, **changes)
    with pytest.raises(TLoRAError, match=message) as caught:
        TLoRAFile.load(saved)
    assert str(caught.value).startswith('"sks dog.safetensors": ') and "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(saved):
    content = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(TLoRAError, match='"sks dog.safetensors": it cannot be read as a safetensors file'):
            TLoRAFile.load(saved)


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(60), b"<html>" * 20])
def test_other_kinds_of_file_are_refused(tmp_path, content):
    path = tmp_path / "модель.safetensors"
    path.write_bytes(content)
    with pytest.raises(TLoRAError, match='"модель.safetensors": it cannot be read as a safetensors file'):
        TLoRAFile.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(TLoRAError, match="there is no such file"):
            TLoRAFile.load(path)


def test_free_curve_round_trips_under_a_format_of_its_own(tmp_path):
    path = tmp_path / "curve.safetensors"
    tlora = make(schedule=RankSchedule.from_text(4, 0, 1.0, "0:4, 0.5:3, 1:2"))
    tlora.save(path)
    assert TLoRAFile.load(path).schedule == tlora.schedule
    with safe_open(path, framework="pt") as f:
        assert json.loads(f.metadata()["tlora"])["format"] == 2
    make().save(path)
    with safe_open(path, framework="pt") as f:
        assert json.loads(f.metadata()["tlora"])["format"] == 1 and "points" not in json.loads(f.metadata()["tlora"])
