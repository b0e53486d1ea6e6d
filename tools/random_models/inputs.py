"""What goes into the random models: texts and latents."""

import torch

from .making import family_of


def conditioning(model, tokens: int = 77, seed: int = 0) -> list:
    """CONDITIONING of the widths that the model takes."""
    return [list(family_of(model).text(tokens, torch.Generator().manual_seed(seed)))]


def latent(model, size: int = 8) -> torch.Tensor:
    """An empty latent of one picture, or of a video of one."""
    kind = model.model.latent_format
    return torch.zeros(1, kind.latent_channels, *[1] * (kind.latent_dimensions - 2), size, size)


def own_latent(model):
    """An empty latent of the family's own size for tests; of several kinds in one where the model takes that."""
    import comfy.nested_tensor

    family = family_of(model)
    if not family.latents:
        return latent(model, family.side)
    return comfy.nested_tensor.NestedTensor([torch.zeros(1, *shape) for shape in family.latents])
