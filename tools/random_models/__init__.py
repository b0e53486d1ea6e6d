"""Models of the host's own classes with random weights, at any size, for tests and benchmarks. Needs the host
importable.

`small` makes one of `SMALL`, the host's families with few and narrow layers; `sdxl`, `flux` and their like make models
at the real sizes.
"""

from .family import Family
from .full_size import flux, klein, krea2, qwen_image, sdxl, z_image
from .inputs import conditioning, latent, own_latent
from .making import config_of, family_of, model_of, quantise
from .tloras import attention_layers, random_tlora
from .transformers import TRANSFORMERS
from .unets import UNETS
from .videos import VIDEOS

SMALL: dict[str, Family] = {**UNETS, **TRANSFORMERS, **VIDEOS}


def small(family: str, **options):
    """The family's model at a size for tests; `options` are those of `making.model_of`."""
    return model_of(SMALL[family], **options)


__all__ = [
    "SMALL",
    "Family",
    "attention_layers",
    "conditioning",
    "config_of",
    "family_of",
    "flux",
    "klein",
    "krea2",
    "latent",
    "model_of",
    "own_latent",
    "quantise",
    "qwen_image",
    "random_tlora",
    "sdxl",
    "small",
    "z_image",
]
