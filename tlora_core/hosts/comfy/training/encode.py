"""Training pictures and captions as the model takes them, made by the host's own VAE and CLIP."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from comfy.sd import CLIP, VAE
from torch import Tensor

from ....errors import TLoRAError
from ....training.dataset import Framed, loss_weights


@dataclass(frozen=True, eq=False)
class Sample:
    """One training picture: the mean [C, ..., h, w] of the VAE's posterior and its standard deviation (None where the
    VAE is deterministic), in the VAE's scale, on the CPU; the loss's weights [h, w] or None; its CONDITIONING."""

    mean: Tensor
    deviation: Tensor | None
    weights: Tensor | None
    conditioning: list

    @property
    def shape(self) -> torch.Size:
        """The latent's, without a batch's dimension."""
        return self.mean.shape


class Encoder:
    """outside: the loss's weight outside a mask; see TrainConfig. told: what the model is told besides, such as FLUX's
    guidance."""

    def __init__(self, clip: CLIP, vae: VAE, outside: float = 0.0, told: Mapping[str, float] | None = None):
        self.clip, self.vae, self.outside, self.told = clip, vae, outside, dict(told or {})
        self.unit = int(vae.spacial_compression_encode())
        self._texts: dict[str, list] = {}

    def check_resolution(self, resolution: int) -> None:
        """Raises TLoRAError unless it is a multiple of the VAE's cell, both in pixels."""
        if resolution % self.unit:
            raise TLoRAError(f"resolution is {resolution}; set it to a multiple of {self.unit}, as this VAE needs.")

    def sample(self, picture: Framed, caption: str) -> Sample:
        """Raises TLoRAError when VAE or CLIP make values of it that are no numbers, or its mask leaves nothing to
        learn."""
        mean, deviation = posterior(self.vae, picture.pixels[None])
        # Here, as all that a training sees of it is a loss that is no number.
        if not _is_finite(mean, deviation):
            raise TLoRAError(
                "vae turns a picture into values that are no numbers; start ComfyUI with --fp32-vae, or connect "
                "another VAE."
            )
        weights = None if picture.mask is None else loss_weights(picture.mask, mean.shape[-2:], self.outside)
        return Sample(mean, deviation, weights, self.conditioning(picture, caption))

    def conditioning(self, picture: Framed, caption: str) -> list:
        """CONDITIONING of the caption with what SDXL is told of sizes; models that ask for none ignore it."""
        if caption not in self._texts:
            self._texts[caption] = self._encoded(caption)
        (width, height), (left, top), (now_wide, now_high) = picture.original, picture.crop, picture.size
        sizes = {
            **self.told,
            "width": width,
            "height": height,
            "crop_w": left,
            "crop_h": top,
            "target_width": now_wide,
            "target_height": now_high,
        }
        return [[tensor, {**options, **sizes}] for tensor, options in self._texts[caption]]

    def _encoded(self, caption: str) -> list:
        texts = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))
        if len(texts) > 1:
            raise TLoRAError(
                f"clip reads prompts in {len(texts)} ways, each for a part of a sampling, and a training needs one; "
                f"switch "
                "schedule_clip off in Set CLIP Hooks, or connect the CLIP from before that node."
            )
        if not all(_is_finite(tensor, options.get("pooled_output")) for tensor, options in texts):
            raise TLoRAError(
                f'clip turns "{caption}" into values that are no numbers; start ComfyUI with --fp32-text-enc, or '
                f"connect another CLIP."
            )
        return texts


def _is_finite(*tensors: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if isinstance(tensor, Tensor))


def posterior(vae: VAE, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(mean, standard deviation) [C, ..., h, w] of what the VAE makes of pixels [1, h, w, 3]; None for a deterministic
    VAE, and where the host had to encode in tiles for want of memory."""
    seen: list[Tensor] = []
    regularization: Any = getattr(vae.first_stage_model, "regularization", None)
    hook: Callable[[], None] = lambda: None  # noqa: E731
    if isinstance(regularization, torch.nn.Module):
        hook = regularization.register_forward_hook(lambda module, args, output: seen.append(args[0])).remove
    try:
        mean = vae.encode(pixels)[0].float().cpu()
    finally:
        hook()
    moments = [z for z in seen if z.shape[1] == 2 * mean.shape[0] and z.shape[2:] == mean.shape[1:]]
    if len(seen) != 1 or not moments:
        return mean, None
    return mean, DiagonalGaussianDistribution(moments[0].float()).std[0].cpu()


def buckets(samples: Sequence[Sample]) -> list[list[int]]:
    """Rows of the samples that fit into a batch: of one shape, with texts of one length, as not every model pads
    them."""
    rows: dict[tuple, list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault((sample.shape, sample.conditioning[0][0].shape), []).append(row)
    return list(rows.values())
