"""The tiny base's word tokenizer: one token for each known word, and a fixed set of slots for unknown words."""

import re
import zlib

PAD, START, END = 0, 1, 2
UNKNOWN_SLOTS = 256
MAX_TOKENS = 24
WORDS = (
    "a an the photo picture of on in at by under with and thing left right top bottom centre center plain striped "
    "dotted red orange yellow green blue purple pink white grey black circle square triangle star heart flower cross "
    "moon beach meadow night snow brick wall checkered floor sunset sea background"
).split()
VOCABULARY_SIZE = 3 + len(WORDS) + UNKNOWN_SLOTS
_ID = {word: 3 + i for i, word in enumerate(WORDS)}


def token_ids(text: str) -> list[int]:
    """Ids of the words of `text`, lower-cased, without start and end. The checksum of a word outside `WORDS` selects
    one of the `UNKNOWN_SLOTS`, the same on every machine."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    first_slot = 3 + len(WORDS)
    return [_ID.get(w, first_slot + zlib.crc32(w.encode()) % UNKNOWN_SLOTS) for w in words]


def padded_ids(text: str) -> list[int]:
    """`token_ids` between start and end, truncated or padded to `MAX_TOKENS`."""
    ids = [START, *token_ids(text)[: MAX_TOKENS - 2], END]
    return ids + [PAD] * (MAX_TOKENS - len(ids))


class WordTokenizer:
    """The part of the transformers tokenizer interface that the host's SDTokenizer uses."""

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        return cls()

    def __call__(self, text):
        return {"input_ids": [START, *token_ids(text), END]}

    def get_vocab(self):
        names = ["<pad>", "<start>", "<end>", *WORDS, *(f"<word {i}>" for i in range(UNKNOWN_SLOTS))]
        return {name: i for i, name in enumerate(names)}
