"""Streams of random numbers, each on its own."""

import hashlib

from torch import Generator


def generator_for(seed: int, purpose: object) -> Generator:
    """Random numbers on the CPU for one purpose of a run with that seed: a step's number, a layer's name. Equal for
    equal seeds and purposes, independent for others."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
