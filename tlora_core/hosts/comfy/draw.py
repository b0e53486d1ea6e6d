"""Draws pictures with the host's sampler: for validation, and of the class for prior preservation."""

from collections.abc import Sequence

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from PIL import Image, ImageDraw
from torch import Tensor

from ...training.images import to_picture
from .model.defaults import defaults_for
from .model.noise import domain

STEPS = 20


def draw(model: ModelPatcher, clip: CLIP, vae: VAE, prompts: Sequence[str], resolution: int, seed: int) -> Tensor:
    """One picture for each prompt, all from the same seed: [len(prompts), resolution, resolution, 3] in 0..1 on the
    CPU. Euler, 20 steps, with the guidance that suits the model; see `model.defaults`."""
    guidance = defaults_for(model).guidance
    scheduler = "simple" if domain(model.get_model_object("model_sampling")) == "flow" else "normal"
    latent = _empty_latent(model, vae, resolution)
    pictures = []
    for prompt in prompts:
        positive, negative = (_conditioning(clip, text, guidance.told) for text in (prompt, ""))
        noise = comfy.sample.prepare_noise(latent, seed)
        drawn = comfy.sample.sample(
            model,
            noise,
            STEPS,
            guidance.scale,
            "euler",
            scheduler,
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=seed,
        )
        decoded = vae.decode(drawn)
        pictures.append(decoded.reshape(-1, *decoded.shape[-3:])[:1].float().cpu())
    return torch.cat(pictures)


def _conditioning(clip: CLIP, text: str, guidance: float | None) -> list:
    told = {} if guidance is None else {"guidance": guidance}
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [[tensor, {**options, **told}] for tensor, options in encoded]


def _empty_latent(model: ModelPatcher, vae: VAE, resolution: int) -> Tensor:
    cells = resolution // int(vae.spacial_compression_encode())
    latent = torch.zeros(1, 4, cells, cells)
    fixed = comfy.sample.fix_empty_latent_channels(model, latent)
    channels = model.get_model_object("latent_format").latent_channels
    return fixed if fixed.shape[1] == channels else torch.zeros(1, channels, *fixed.shape[2:])


def strip(pictures: Tensor, captions: Sequence[str] = ()) -> Image.Image:
    """Joins pictures [n, h, w, 3] in a row, each with its caption below, if any."""
    drawn = [to_picture(picture) for picture in pictures]
    width, height, line = drawn[0].width, drawn[0].height, 14 if captions else 0
    sheet = Image.new("RGB", (width * len(drawn), height + line), "white")
    pen = ImageDraw.Draw(sheet)
    for column, picture in enumerate(drawn):
        sheet.paste(picture, (column * width, 0))
    for column, caption in enumerate(captions):
        pen.text((column * width + 2, height + 1), caption[: width // 6], "black")
    return sheet
