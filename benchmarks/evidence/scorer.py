"""Which colour and pattern an object has that may carry a rim and a core, as the concepts do.

The tiny base's own scorer never saw a rim or a core, and takes them for colour and pattern: on rendered concepts it names
the pattern in 29% to 98% of the pictures and an asked body colour in 13% to 99%, by concept. This one is trained on objects
with rims and cores of random colours and knows none of the concepts. Background, place and shape stay with the other.

    python3 tools/host.py python benchmarks/evidence/scorer.py [--steps 400]
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tlora_core.tiny import world
from tlora_core.tiny.scorer import at_size

WEIGHTS = Path(__file__).with_name("scorer.safetensors")
COLOURS = (*world.COLOURS, "other")  # other: a colour that no prompt names, as the concepts' own are
NEAR = 0.25  # RGB distance from every named colour that makes a random one "other"
DISTANCE_TO_CONCEPTS = 0.1  # RGB distance that body colours in training keep from the concepts'


class ConceptScorer(nn.Module):
    """Colour (`COLOURS`) and pattern (`world.PATTERNS`) of the object."""

    def __init__(self, width: int = 16):
        super().__init__()
        widths, blocks = [3, width, 2 * width, 3 * width, 4 * width], []
        for a, b in zip(widths, widths[1:]):
            blocks += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                       nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * width * 16, 128), nn.ReLU())
        self.heads = nn.ModuleDict({"colour": nn.Linear(128, len(COLOURS)), "pattern": nn.Linear(128, len(world.PATTERNS))})

    def forward(self, pixels):
        """Logits [B, values] by attribute for `pixels` [B, 3, 64, 64] in -1..1."""
        features = self.trunk(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, pixels) -> dict[str, torch.Tensor]:
        """Index of the likeliest value of each attribute, [B] each, in `pixels` [B, H, W, 3] in 0..1."""
        return {name: logits.argmax(1) for name, logits in self(at_size(pixels.movedim(-1, 1)) * 2 - 1).items()}


def load_scorer(path: Path = WEIGHTS) -> ConceptScorer:
    scorer = ConceptScorer()
    scorer.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return scorer.eval()


def training_scenes(count: int, rng: np.random.Generator) -> world.Scenes:
    """Objects of the world; a third in another colour, two thirds with a rim and a core of any colour."""
    scenes = world.sample_scenes(count, rng)
    scenes.pattern = rng.integers(len(world.PATTERNS), size=count)
    named = np.array(list(world.COLOURS.values())) / 255
    held_out = np.array([c.body for c in world.CONCEPTS]) / 255
    for i in np.flatnonzero(rng.random(count) < 1 / 3):
        colour = rng.random(3)
        while (np.linalg.norm(named - colour, axis=1).min() < NEAR
               or np.linalg.norm(held_out - colour, axis=1).min() < DISTANCE_TO_CONCEPTS):
            colour = rng.random(3)
        scenes.colour[i], scenes.colour_index[i] = colour, len(world.COLOURS)
    adorned = rng.random(count) < 2 / 3
    scenes.rim[adorned], scenes.core[adorned] = rng.random((2, adorned.sum(), 3))
    return scenes


def concept_pictures(concept: world.Concept, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rendered pictures of the concept in its own and in named colours and in all patterns, [count, 64, 64, 3], and what they show."""
    scenes = world.concept_scenes(concept, count, rng)
    scenes.pattern = rng.integers(len(world.PATTERNS), size=count)
    colour = rng.integers(len(COLOURS), size=count)
    named = colour < len(world.COLOURS)
    scenes.colour[named] = np.array(list(world.COLOURS.values()))[colour[named]] / 255
    shown = {"colour": colour, "pattern": scenes.pattern, "background": scenes.background, "place": scenes.place}
    return torch.from_numpy(world.render(scenes)), {name: torch.from_numpy(values) for name, values in shown.items()}


def train(steps: int, batch: int = 32, seed: int = 0, through=None) -> ConceptScorer:
    """through: gives the pictures [B, 3, 64, 64] in -1..1 as the tiny base's autoencoder shows them, for a quarter of each batch."""
    torch.manual_seed(seed)
    model = ConceptScorer()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        scenes = training_scenes(batch, np.random.default_rng((seed, step)))
        pixels = torch.from_numpy(world.render(scenes)).movedim(-1, 1) * 2 - 1
        if through is not None:
            pixels[::4] = through(pixels[::4])
        logits = model(pixels + 0.03 * torch.randn_like(pixels))
        target = {"colour": torch.from_numpy(scenes.colour_index), "pattern": torch.from_numpy(scenes.pattern)}
        loss = sum(nn.functional.cross_entropy(logits[name], target[name], label_smoothing=0.02) for name in target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 25 == 24:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return model.eval()


def autoencoder():
    """What the tiny base's autoencoder makes of pictures [B, 3, 64, 64] in -1..1, with a little noise on the latent."""
    from tlora_core.tiny.autoencoder import TinyAutoencoder
    from tlora_core.tiny.scorer import __file__ as beside
    weights = load_file(Path(beside).parent / "weights" / "tiny_base.safetensors")
    model, prefix = TinyAutoencoder(), "first_stage_model."
    model.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})

    @torch.no_grad()
    def through(pixels):
        latent = model.encode(pixels)
        return model.decode(latent + 0.1 * torch.randn_like(latent)).clamp(-1, 1)
    return through


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    model = train(args.steps, through=autoencoder())
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, WEIGHTS)


if __name__ == "__main__":
    main()
