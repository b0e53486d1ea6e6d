"""The tiny base's autoencoder: 64x64 RGB to an 8x8 latent of 16 channels and back to 128x128 RGB, small enough to train
on a CPU."""

import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

LATENT_CHANNELS = 16
ENCODED_BY, DECODED_BY = 8, 16  # pixels of a picture for each cell of its latent


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(silu(self.conv1(self.norm(x))))


class TinyAutoencoder(nn.Module):
    """A deterministic autoencoder whose latents have zero mean and unit variance in each channel over the world.

    Pictures to encode are [B, 3, H, W] in -1..1, with H and W multiples of 8; latents are [B, 16, H/8, W/8]; decoded
    pictures are [B, 3, 2H, 2W]. The names and ranges of `encode` and `decode` are the host's for a VAE's
    `first_stage_model`.
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(48, 80, 3, padding=1),
            ResidualBlock(80),
            nn.Conv2d(80, 128, 3, stride=2, padding=1),
            ResidualBlock(128),
            nn.SiLU(),
            nn.Conv2d(128, LATENT_CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 128, 3, padding=1),
            *(ResidualBlock(128) for _ in range(4)),
            nn.Conv2d(128, 4 * 80, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(80),
            ResidualBlock(80),
            nn.Conv2d(80, 4 * 40, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(40),
            nn.Conv2d(40, 4 * 24, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(24),
            nn.SiLU(),
            nn.Conv2d(24, 12, 3, padding=1),
        )
        self.register_buffer("latent_mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("latent_std", torch.ones(LATENT_CHANNELS))

    def encode(self, pixels):
        raw = self.encoder(pixel_unshuffle(pixels, 4))
        return (raw - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def decode(self, latent):
        raw = latent * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return pixel_shuffle(self.decoder(raw), 2)
