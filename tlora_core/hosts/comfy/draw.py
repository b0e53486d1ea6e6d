"""Draws pictures with the host's sampler: for validation, and of the class for prior preservation."""

from collections.abc import Sequence

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from PIL import Image, ImageDraw
from torch import Tensor

from ...reports.lettering import Lettering
from ...training.images import to_picture
from .model.defaults import defaults_for
from .model.noise import domain

STEPS = 20


def draw(
    model: ModelPatcher, clip: CLIP, vae: VAE, prompts: Sequence[str], resolution: int, seeds: Sequence[int]
) -> list[Tensor]:
    """For each prompt one picture of each seed, drawn together: [len(seeds), H, W, 3] in 0..1 on the
    CPU. A seed's noise is the same for every prompt, and with whatever other seeds it is drawn. Euler, 20 steps, with
    the guidance that suits the model; see `model.defaults`."""
    guidance = defaults_for(model).guidance
    scheduler = "simple" if domain(model.get_model_object("model_sampling")) == "flow" else "normal"
    empty = _empty_latent(model, vae, resolution)
    latent = empty.repeat(len(seeds), *[1] * (empty.dim() - 1))
    noise = torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])
    pictures = []
    for prompt in prompts:
        positive, negative = (_conditioning(clip, text, guidance.told) for text in (prompt, ""))
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
            seed=seeds[0],
        )
        decoded = vae.decode(drawn)
        # Of a video, the first picture.
        pictures.append((decoded[:, 0] if decoded.dim() == 5 else decoded[: len(seeds)]).float().cpu())
    return pictures


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


def strip(pictures: Sequence[Tensor], captions: Sequence[str] = ()) -> Image.Image:
    """Joins batches [n, h, w, 3] of one size: a column for each, with its caption below in up to three lines."""
    columns = [[to_picture(picture) for picture in batch] for batch in pictures]
    width, height, rows = columns[0][0].width, columns[0][0].height, len(columns[0])
    letters = Lettering(max(11, width // 30))
    texts = [letters.wrapped(caption, width - 8, most=3) for caption in captions]
    below = max((len(lines) * letters.line + 6 for lines in texts), default=0)
    sheet = Image.new("RGB", (width * len(columns), height * rows + below), "white")
    pen = ImageDraw.Draw(sheet)
    for left, column in enumerate(columns):
        for top, picture in enumerate(column):
            sheet.paste(picture, (left * width, top * height))
    for left, lines in enumerate(texts):
        for i, text in enumerate(lines):
            letters.write(pen, (left * width + 4, height * rows + 3 + i * letters.line), text, "black")
    return sheet
