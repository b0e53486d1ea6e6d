"""The tiny base's autoencoder: 128x128 RGB to a 16x16 latent of 16 channels, SDXL's factor of eight.

The encoder is linear, the principal components of 4x4 patches of the picture at half size, so it holds an object of any
colour or drawing as well as the world's own. The decoder adds what a linear one cannot know: sharp edges at full size.
"""
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, pixel_shuffle, pixel_unshuffle, silu

LATENT_CHANNELS = 16
PATCH = 4


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(silu(self.conv1(self.norm(x))))


def _twice(width: int, to: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, 4 * to, 3, padding=1), nn.PixelShuffle(2), ResidualBlock(to))


class TinyAutoencoder(nn.Module):
    """A deterministic autoencoder; `encode` takes and `decode` gives pictures [B, 3, H, W] in -1..1, H and W multiples of
    8, latents are [B, 16, H/8, W/8]. Both names and ranges are what the host expects of a VAE's `first_stage_model`.

    A component's standard deviation over the world, relative to the largest, is kept as its square root: in full, small
    details would drown in the first trace of noise; whitened, they would be as hard to denoise as the picture itself.
    """

    def __init__(self):
        super().__init__()
        size = 3 * PATCH**2
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(LATENT_CHANNELS, size))
        self.register_buffer("scale", torch.ones(LATENT_CHANNELS))
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 64, 3, padding=1), ResidualBlock(64), _twice(64, 32), _twice(32, 24), nn.SiLU(),
            nn.Conv2d(24, 12, 3, padding=1), nn.PixelShuffle(2))
        nn.init.zeros_(self.decoder[-2].weight)
        nn.init.zeros_(self.decoder[-2].bias)

    @torch.no_grad()
    def fit(self, halves: torch.Tensor) -> None:
        """Set the linear part from pictures at half size, [B, 3, H/2, W/2] in -1..1."""
        patches = pixel_unshuffle(halves, PATCH).transpose(0, 1).flatten(1).double()
        variance, vectors = torch.linalg.eigh(patches.cov())
        kept = slice(-1, -LATENT_CHANNELS - 1, -1)
        order = range(len(variance))[kept]
        self.mean.copy_(patches.mean(1))
        self.basis.copy_(vectors.T[list(order)])
        self.scale.copy_((variance[list(order)] * variance[-1]).pow(-0.25))

    def encode_half(self, halves: torch.Tensor) -> torch.Tensor:
        """`encode` of a picture already at half size."""
        patches = pixel_unshuffle(halves, PATCH) - self.mean[:, None, None]
        return torch.einsum("kc,bchw->bkhw", self.basis * self.scale[:, None], patches)

    def decode_half(self, latent: torch.Tensor) -> torch.Tensor:
        """The linear part's picture, at half size."""
        patches = torch.einsum("kc,bkhw->bchw", self.basis / self.scale[:, None], latent)
        return pixel_shuffle(patches + self.mean[:, None, None], PATCH)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encode_half(avg_pool2d(pixels, 2))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return interpolate(self.decode_half(latent), scale_factor=2, mode="bilinear") + self.decoder(latent)
