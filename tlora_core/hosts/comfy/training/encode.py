"""Encodes training pictures and captions for the model with the host's VAE and CLIP."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ....errors import TLoRAError
from ....training.dataset import Framed, loss_weights
from .failure import failure_words, ran_out_of_memory

_MISMATCH = "connect model, clip and vae of the same model."


@dataclass(frozen=True, eq=False)
class Sample:
    """One training picture.

    mean: of the VAE's posterior, [C, ..., h, w]. deviation: its standard deviation, of the same shape; None if the VAE
        is deterministic. Both in the VAE's scale, on the CPU.
    weights: of the loss, [h, w], or None. conditioning: the caption's CONDITIONING. of_class: that of the caption
        without the token, for output preservation; None without it.
    """

    mean: Tensor
    deviation: Tensor | None
    weights: Tensor | None
    conditioning: list
    of_class: list | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the latent, without the batch dimension."""
        return self.mean.shape


class Takes(NamedTuple):
    """What a model is made for, where its config says so: the channels of its latents, and the width of the encoded
    text. 0: unknown."""

    channels: int = 0
    text: int = 0

    @classmethod
    def of(cls, model: ModelPatcher) -> "Takes":
        base = model.model
        network, config = (
            getattr(base.diffusion_model, "_orig_mod", base.diffusion_model),
            base.model_config.unet_config,
        )
        key = "context_dim" if isinstance(network, UNetModel) else "context_in_dim"
        width = config.get(key) if isinstance(network, UNetModel) or config.get("image_model") in _OF_FLUX else None
        return cls(_channels_of_vae(model.get_model_object("latent_format")), width if isinstance(width, int) else 0)


def _channels_of_vae(latent_format) -> int:
    """How many channels the VAE's latents have; 0 for a model that packs them in a way of its own."""
    channels, sides = latent_format.latent_channels, (1,) * (latent_format.latent_dimensions - 2)
    packed = latent_format.process_in(torch.zeros(1, channels, *sides, 2, 2))
    return channels if packed.shape[1] == channels else 0


_OF_FLUX = ("flux", "flux2", "chroma")  # whose config says how wide the text is that the encoder gives


class Encoder:
    """outside: weight of the loss outside a mask; see TrainConfig. told: further conditioning values, such as FLUX's
    guidance. takes: what the encodings have to fit."""

    def __init__(
        self,
        clip: CLIP,
        vae: VAE,
        outside: float = 0.0,
        told: Mapping[str, float] | None = None,
        takes: Takes = Takes(),  # noqa: B008  immutable
    ):
        self.clip, self.vae, self.outside, self.told, self.takes = clip, vae, outside, dict(told or {}), takes
        self.unit = int(vae.spacial_compression_encode())
        self._texts: dict[str, list] = {}

    def check_resolution(self, resolution: int) -> None:
        """Raises TLoRAError unless `resolution` (pixels) is a multiple of the VAE's cell."""
        if resolution % self.unit:
            raise TLoRAError(f"resolution is {resolution}; set it to a multiple of {self.unit} for this VAE.")

    def sample(self, picture: Framed, caption: str, class_caption: str | None = None) -> Sample:
        """class_caption: the caption without the token, for output preservation.

        Raises TLoRAError if VAE or CLIP fail, give what the model does not take, or NaN or infinite values, and if
        the mask leaves nothing to learn."""
        with _failing("vae failed to encode a picture", "another VAE"):
            mean, deviation = posterior(self.vae, picture.pixels[None])
        if len(mean) != (self.takes.channels or len(mean)):
            raise TLoRAError(
                f"vae encodes a picture into {len(mean)} channels, but model takes {self.takes.channels}; {_MISMATCH}"
            )
        # Checked here, because the training would only see a NaN loss.
        if not _is_finite(mean, deviation):
            raise TLoRAError(
                "vae encodes a picture into NaN or infinite values; start ComfyUI with --fp32-vae, or connect "
                "another VAE."
            )
        weights = None if picture.mask is None else loss_weights(picture.mask, mean.shape[-2:], self.outside)
        of_class = None if class_caption is None else self.conditioning(picture, class_caption)
        return Sample(mean, deviation, weights, self.conditioning(picture, caption), of_class)

    def conditioning(self, picture: Framed, caption: str) -> list:
        """CONDITIONING of the caption, with the sizes (pixels) for SDXL; other models ignore them."""
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
        with _failing(f'clip failed to encode "{caption}"', "another CLIP"):
            texts = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))
        if len(texts) > 1:
            raise TLoRAError(
                f"clip gives {len(texts)} scheduled encodings of a prompt, but training needs a single one; switch "
                "schedule_clip off in Set CLIP Hooks, or connect the CLIP from before that node."
            )
        if not all(_is_finite(tensor, options.get("pooled_output")) for tensor, options in texts):
            raise TLoRAError(
                f'clip encodes "{caption}" into NaN or infinite values; start ComfyUI with --fp32-text-enc, or connect '
                "another CLIP."
            )
        width = texts[0][0].shape[-1]
        if width != (self.takes.text or width):
            raise TLoRAError(f"clip encodes text {width} wide, but model takes {self.takes.text}; {_MISMATCH}")
        return texts


@contextmanager
def _failing(what: str, instead: str) -> Iterator[None]:
    """Names what fails within the block and what to connect instead. Cancels and out-of-memory errors, of which the
    host takes care, pass."""
    try:
        yield
    except InterruptProcessingException:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        raise TLoRAError(f"{what} ({failure_words(error)}); connect {instead}.") from error


def _is_finite(*tensors: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if isinstance(tensor, Tensor))


def posterior(vae: VAE, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(mean, standard deviation), each [C, ..., h, w], of the VAE's posterior for pixels [1, h, w, 3] in 0..1. The
    deviation is None for a deterministic VAE, and if the host ran short of memory and encoded in tiles."""
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
    """Groups the samples' indices by what can share a batch: one shape and one length of each text, because not every
    model pads texts."""
    groups: dict[tuple, list[int]] = {}
    for index, sample in enumerate(samples):
        texts = [text[0][0].shape for text in (sample.conditioning, sample.of_class) if text is not None]
        groups.setdefault((sample.shape, *texts), []).append(index)
    return list(groups.values())
