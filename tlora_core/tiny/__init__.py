"""The embedded tiny base model: its picture world, tokenizer, autoencoder and weights. Plain torch and numpy."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights" / "tiny_base.safetensors"
