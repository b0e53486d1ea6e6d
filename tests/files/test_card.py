"""What a file picker learns about a file: only from its header, without trust, and only for names in the list."""

import base64
import io
import json
import struct
from urllib.parse import quote

import pytest
import torch
from own_files import make, tamper
from page_clients import ask
from PIL import Image
from safetensors.torch import save_file

from tlora_core import RankSchedule, TLoRAError
from tlora_core.files.card import Card, read_card, read_thumbnail

PLAIN = {"lora_unet_x.lora_up.weight": torch.zeros(4, 2)}


def picture(size=(300, 200), kind="PNG", colour=(200, 30, 40)) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, kind)
    return written.getvalue()


def with_thumbnail(path, text):
    save_file(PLAIN, path, {"modelspec.thumbnail": text})
    return path


def test_our_file_tells_schedule_phrase_and_thumbnail(tmp_path):
    path = tmp_path / "x.safetensors"
    make(token="sks", class_word="dog").save(path, thumbnail=picture(kind="JPEG"))
    card = read_card(path)
    assert card.as_json() == {
        "method": "tlora",
        "schedule": {"rank": 4, "min_rank": 2, "alpha": 1.0, "points": ()},
        "rank": None,
        "base_model": "sdxl",
        "phrase": "sks dog",
        "thumbnail": True,
    }
    shown = Image.open(io.BytesIO(read_thumbnail(path)))
    assert shown.format == "JPEG" and shown.size == (256, 171)
    assert max(abs(a - b) for a, b in zip(shown.getpixel((9, 9)), (200, 30, 40))) < 6


def test_free_curve_is_reported_too(tmp_path):
    path = tmp_path / "x.safetensors"
    make(schedule=RankSchedule.from_text(4, 0, 1.0, "0:4, 0.5:3, 1:1")).save(path)
    assert read_card(path).as_json()["schedule"] == {
        "rank": 4,
        "min_rank": 1,
        "alpha": 1.0,
        "points": ((0.0, 4), (0.5, 3), (1.0, 1)),
    }


def test_another_programs_file_shows_its_own_description(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(
        PLAIN,
        path,
        {"ss_network_dim": "16", "ss_base_model_version": "sdxl_base_v1-0", "modelspec.trigger_phrase": "ohwx"},
    )
    assert read_card(path) == Card(rank=16, base_model="sdxl_base_v1-0", phrase="ohwx")
    save_file(PLAIN, path)
    assert read_card(path) == Card() and read_thumbnail(path) is None


@pytest.mark.parametrize(
    "metadata", [{"ss_network_dim": "-3"}, {"ss_network_dim": "9" * 9}, {"ss_network_dim": "²"}], ids=str
)
def test_nonsense_of_another_program_is_left_out(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    save_file(PLAIN, path, metadata)
    assert read_card(path).rank is None


def test_long_text_with_control_characters_becomes_one_short_line(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(PLAIN, path, {"modelspec.trigger_phrase": "a\nb\x00\u202ec" + "d" * 1000})
    assert read_card(path).phrase == "abc" + "d" * 194


@pytest.mark.parametrize(
    "changes",
    [{"rank": "4"}, {"min_rank": 9}, {"alpha": None}, {"method": ["tlora"]}, {"method": "new"}, {"format": 99}],
    ids=str,
)
def test_damaged_metadata_of_ours_is_refused_in_words(tmp_path, changes):
    path = tmp_path / "x.safetensors"
    make().save(path)
    tamper(path, **changes)
    with pytest.raises(TLoRAError):
        read_card(path)


def test_thumbnail_is_drawn_again_or_left_out(tmp_path):
    path = tmp_path / "x.safetensors"

    def of(text):
        return read_thumbnail(with_thumbnail(path, text))

    encoded = base64.b64encode(picture()).decode()
    assert Image.open(io.BytesIO(of("data:image/png;base64," + encoded))).format == "JPEG"
    huge = base64.b64encode(picture((5000, 5000))).decode()  # a few kB that unpack to 75 MB
    # A picture that claims to be larger than Pillow opens.
    giant = base64.b64encode(
        picture((2, 2)).replace(struct.pack(">II", 2, 2), struct.pack(">II", 60000, 60000))
    ).decode()
    gif = base64.b64encode(picture(kind="GIF")).decode()
    for text in (
        "",
        "https://evil.example/x.jpg",
        "data:text/html;base64," + encoded,
        "data:image/png;base64,@@@@",
        "data:image/png;base64," + encoded[:80],
        "data:image/png;base64," + huge,
        "data:image/png;base64," + giant,
        "data:image/gif;base64," + gif,
    ):
        assert of(text) is None, text[:60]


@pytest.fixture
def loras(comfy, monkeypatch, tmp_path):
    """A loras folder with a file of ours, and a file beside the folder."""
    import folder_paths

    folder = tmp_path / "loras"
    (folder / "sub").mkdir(parents=True)
    make().save(folder / "sub" / "ours.safetensors", thumbnail=picture(kind="JPEG"))
    (folder / "damaged.safetensors").write_bytes(b"no header at all")
    make().save(tmp_path / "secret.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    monkeypatch.setitem(folder_paths.filename_list_cache, "loras", ([], {}, 0.0))
    folder_paths.filename_list_cache.pop("loras")
    return folder


def test_page_gets_cards_and_thumbnails_of_listed_files_only(loras):
    from tlora_core.hosts.comfy.routes.files import add_routes

    def get(path, name):
        [answer] = ask(("GET", f"{path}?name={quote(name)}", {}), add_routes=add_routes)
        return answer

    status, body = get("/tlora/files", "sub/ours.safetensors")
    assert status == 200 and json.loads(body)["schedule"]["rank"] == 4
    status, body = get("/tlora/thumbnail", "sub/ours.safetensors")
    assert status == 200 and Image.open(io.BytesIO(body)).format == "JPEG"
    for name in (
        "../secret.safetensors",
        str(loras.parent / "secret.safetensors"),
        "sub/../sub/ours.safetensors",
        "",
        "x",
    ):
        for path in ("/tlora/files", "/tlora/thumbnail"):
            assert get(path, name)[0] == 404, (path, name)
    status, body = get("/tlora/files", "damaged.safetensors")
    assert status == 422 and str(loras) not in body.decode()
