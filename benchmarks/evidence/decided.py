"""Measures down to which noise level the bare base still follows a prompt, which shows where things are decided.

T-LoRA's mask protects the noisiest timesteps, because pose and background are decided there. Here pictures are noised
to t, and the base continues from there with a prompt that asks for another shape, colour, place and background. The
share of pictures that follow this prompt shows what was still open at t.
"""

import numpy as np
import torch

from tlora_core.tiny import world

from .metrics import NAMES, seen
from .prompts import Prompt, full_prompt
from .run import SAMPLING_STEPS, Bench

LEVELS = (999, 800, 600, 500, 400, 300, 200, 100)  # t of 1000


def measure(bench: Bench, count: int = 40, seed: int = 0) -> list[dict]:
    """A row for each of LEVELS: t, sigma, and for each attribute the share of `count` pictures that follow the
    prompt."""
    rng = np.random.default_rng(seed)
    scenes = world.sample_scenes(count, rng)
    asked = [_prompt(scenes, i, rng) for i in range(count)]
    latent = bench.vae.encode(torch.from_numpy(world.render(scenes)))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    table = bench.model.get_model_object("model_sampling").sigmas
    rows = []
    for t in LEVELS:
        sigmas = torch.stack([table[round(at)] for at in np.linspace(t, 0, SAMPLING_STEPS)] + [table.new_zeros(())])
        found = seen(bench.draw_from(asked, latent, noise, sigmas.float().cpu()), bench.scorer)
        shares = {name: float(np.mean([s[name] == p.asked[name] for s, p in zip(found, asked)])) for name in NAMES}
        rows.append({"t": t, "sigma": float(table[t]), **shares})
    return rows


def _prompt(scenes: world.Scenes, i: int, rng: np.random.Generator) -> Prompt:
    """A prompt that asks for everything that the i-th scene does not show."""
    was = {
        "shape": scenes.shape[i],
        "colour": scenes.colour_index[i],
        "background": scenes.background[i],
        "place": scenes.place[i],
    }
    asked = {name: str(rng.choice([value for k, value in enumerate(NAMES[name]) if k != was[name]])) for name in NAMES}
    return full_prompt(asked, i)
