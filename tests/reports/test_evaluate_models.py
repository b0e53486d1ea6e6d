"""Which CLIP and DINO models T-LoRA Evaluate accepts, and its message for other models."""

import json
import os

import pytest
import torch
from encoder_folders import PREPARATION, WORDS, pictures

from tlora_core.errors import TLoRAError
from tlora_core.reports.folder_encoder import CLIP_TYPES, DINO_TYPES, FolderEncoder


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_folder_of_another_kind_is_refused_and_no_code_in_a_file_runs(model_folders, tmp_path):
    with pytest.raises(TLoRAError, match="type vit"):
        FolderEncoder(model_folders / "dino", CLIP_TYPES)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((model_folders / "dino" / name).read_text())
    torch.save({"x": torch.zeros(1), "y": Payload(tmp_path / "made")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TLoRAError, match="cannot be loaded.*pytorch_model.bin"):
        FolderEncoder(tmp_path, DINO_TYPES)
    assert not (tmp_path / "made").exists()


def copied(folder, target, change=lambda weights: weights, without=()):
    """`folder` copied to `target`, with changed weights and without some files."""
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        if path.name not in without:
            (target / path.name).write_bytes(path.read_bytes())
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    "name, types, change, count",
    [
        # Files of the host's own clip_vision hold the picture half.
        (
            "clip",
            CLIP_TYPES,
            lambda w: {k: v for k, v in w.items() if k.startswith(("vision_model.", "visual_projection."))},
            21,
        ),
        ("dino", DINO_TYPES, lambda w: {f"blocks.{k}": v for k, v in w.items()}, 22),
        ("dino", DINO_TYPES, lambda w: {k: v for k, v in w.items() if k != "embeddings.cls_token"}, 1),
    ],
)
def test_weights_that_no_file_holds_are_not_left_at_random(model_folders, tmp_path, name, types, change, count):
    with pytest.raises(
        TLoRAError,
        match=rf'^"{tmp_path.name}" lacks {count} of the weights of its model, for example .*; download the whole',
    ):
        FolderEncoder(copied(model_folders / name, tmp_path, change), types)


@pytest.mark.parametrize("name, types, unused", [("clip", CLIP_TYPES, "logit_scale"), ("dino", DINO_TYPES, "pooler.")])
def test_weights_that_do_not_count_may_be_missing(model_folders, tmp_path, name, types, unused):
    encoder = FolderEncoder(
        copied(model_folders / name, tmp_path, lambda w: {k: v for k, v in w.items() if not k.startswith(unused)}),
        types,
    )
    shown = pictures(2, 3)
    assert torch.equal(encoder.images(shown), FolderEncoder(model_folders / name, types).images(shown))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
EXTRA = {
    "id": 12,
    "content": "sks",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"}},
        {"vocab.json": {word: i for i, word in enumerate(WORDS)}},  # its merges.txt is missing
        {"tokenizer.json": {}},
    ],
    ids=["none", "configuration", "half", "damaged"],
)
def test_clip_without_a_whole_tokenizer_scores_nothing(model_folders, tmp_path, files):
    encoder = FolderEncoder(copied(model_folders / "clip", tmp_path, without=TOKENIZER), CLIP_TYPES)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(TLoRAError, match=rf'^"{tmp_path.name}" has no tokenizer for its model \(.+\); add the files'):
        encoder.texts(["a dog", "the snow at night"])


def test_vocabulary_and_merges_are_a_tokenizer_too(model_folders, tmp_path):
    encoder = FolderEncoder(copied(model_folders / "clip", tmp_path, without=TOKENIZER), CLIP_TYPES)
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        "a</w>",
        "d",
        "o",
        "g</w>",
        "do",
        "dog</w>",
        "s",
        "n",
        "s</w>",
        "n</w>",
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    dog, other = encoder.texts(["a dog", "n s"])
    assert float(dog @ other) < 0.999


def test_tokenizer_with_tokens_that_clip_does_not_know_is_refused(model_folders, tmp_path):
    encoder = FolderEncoder(copied(model_folders / "clip", tmp_path), CLIP_TYPES)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["added_tokens"].append(EXTRA)
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    assert encoder.texts(["a dog"]).shape == (1, 8)
    with pytest.raises(TLoRAError, match="token 12 found, 12 tokens in the model"):
        encoder.texts(["a sks dog"])


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 605157884\n"
)


@pytest.mark.parametrize(
    "file, content",
    [
        ("model.safetensors", lambda whole: whole[:-100]),
        ("model.safetensors", lambda _: LFS_POINTER),
        ("model.safetensors", lambda _: b""),
        ("config.json", lambda _: b'{"model_type": "vit", "hidden_size": "x"}'),
        ("config.json", lambda _: b'{"model_type": "vit", "num_attention_heads": 0}'),
        ("config.json", lambda whole: whole.replace(b'"image_size": 16', b'"image_size": [16, 16]')),
        *[
            ("preprocessor_config.json", lambda _, text=text: text)
            for text in (
                b"[]",
                b'"clip"',
                b"{",
                b"{}",
                b'{"image_mean": 0.5, "image_std": 1}',
                b'{"image_mean": [0, 0, 0], "image_std": [1, 0, 1]}',
            )
        ],
    ],
)
def test_damaged_file_is_reported_in_one_sentence(model_folders, tmp_path, file, content):
    for path in (model_folders / "dino").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_bytes(content((tmp_path / file).read_bytes()))
    with pytest.raises(
        TLoRAError, match=rf'^"{tmp_path.name}" cannot be loaded \(.+\); its folder needs .*download them again'
    ):
        FolderEncoder(tmp_path, DINO_TYPES)


@pytest.mark.parametrize("content", [LFS_POINTER, b""], ids=["pointer", "empty"])
def test_damaged_weights_in_openais_own_layout_are_reported_too(model_folders, tmp_path, content):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((model_folders / "dino" / name).read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(TLoRAError, match=r"cannot be loaded \(.+\)"):
        FolderEncoder(tmp_path, DINO_TYPES)


def test_weights_in_openais_own_layout_are_read_the_same(model_folders, tmp_path):
    from safetensors.torch import load_file

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((model_folders / "dino" / name).read_text())
    torch.save(load_file(model_folders / "dino" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    shown = pictures(2, 3)
    assert torch.equal(
        FolderEncoder(tmp_path, DINO_TYPES).images(shown),
        FolderEncoder(model_folders / "dino", DINO_TYPES).images(shown),
    )


@pytest.mark.parametrize("name, types", [("clip", CLIP_TYPES), ("dino", DINO_TYPES)])
def test_half_precision_weights_are_computed_in_float32_by_releases_without_the_dtype_keyword(
    model_folders, tmp_path, monkeypatch, name, types
):
    from transformers import AutoModel

    load = AutoModel.from_pretrained

    def older(*arguments, **options):
        if "dtype" in options:  # transformers before 4.56 passes it on to the model
            raise TypeError("__init__() got an unexpected keyword argument 'dtype'")
        return load(*arguments, **options)

    load(model_folders / name).half().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    monkeypatch.setattr(AutoModel, "from_pretrained", older)
    model = FolderEncoder(tmp_path, types).model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_loader_itself_refuses_names_that_leave_the_folder(comfy, model_folders):
    import folder_paths

    from tlora_core.hosts.comfy.encoders import encoder_names, load_encoder

    folder_paths.add_model_folder_path("clip_vision", str(model_folders))
    assert "clip" in encoder_names(CLIP_TYPES) and "dino" not in encoder_names(CLIP_TYPES)
    for name in ("../" + model_folders.name + "/clip", str(model_folders / "clip"), "dino"):
        with pytest.raises(TLoRAError, match="is no longer in the folder"):
            load_encoder(name, CLIP_TYPES)
    assert load_encoder("clip", CLIP_TYPES).images(pictures(1, 0)).shape == (1, 8)
