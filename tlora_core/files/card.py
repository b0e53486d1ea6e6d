"""A summary of a LoRA file for a file picker, read from its untrusted header only."""

import base64
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..method.schedule import RankSchedule
from .tlora_file import METADATA_KEY, read_content, read_schedule
from .untrusted import PHRASE_KEY, read_metadata, text_of

MAX_SIDE = 4096  # pixels; a small file can hold an image that decodes to gigabytes
THUMBNAIL_SIDE = 256
_THUMBNAIL = "modelspec.thumbnail"
_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class Card:
    """schedule: of a T-LoRA file. rank: as stated by another program's file. phrase: the words that stand for the
    subject in prompts. thumbnail: whether the file seems to have one."""

    method: str | None = None
    schedule: RankSchedule | None = None
    rank: int | None = None
    base_model: str = ""
    phrase: str = ""
    thumbnail: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_card(path: Path) -> Card:
    """Raises TLoRAError or OSError when the file is missing or its header is damaged."""
    metadata = read_metadata(path)
    common = {"phrase": text_of(metadata.get(PHRASE_KEY)), "thumbnail": isinstance(metadata.get(_THUMBNAIL), str)}
    if METADATA_KEY not in metadata:
        dim = text_of(metadata.get("ss_network_dim"))
        return Card(
            rank=int(dim) if dim.isdecimal() and len(dim) < 6 else None,
            base_model=text_of(metadata.get("ss_base_model_version")),
            **common,
        )
    content = read_content(metadata)
    schedule = read_schedule(content)
    phrase = " ".join(f"{text_of(content.get('token'))} {text_of(content.get('class_word'))}".split())
    return Card(content["method"], schedule, None, text_of(content.get("base_model")), **{**common, "phrase": phrase})


def read_thumbnail(path: Path) -> bytes | None:
    """The file's thumbnail, re-encoded as a JPEG of at most THUMBNAIL_SIDE pixels a side; None without a valid one."""
    kind, _, data = _as_text(read_metadata(path).get(_THUMBNAIL)).partition(";base64,")
    if not kind.startswith("data:image/"):
        return None
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=_FORMATS)
        if max(picture.size) > MAX_SIDE:
            return None
        small = picture.convert("RGB")
    except Exception:  # Pillow raises many kinds for damaged pictures and for decompression bombs
        return None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=85)
    return written.getvalue()


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else ""
