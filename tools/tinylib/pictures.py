"""The world's pictures, drawn once, and the autoencoder that turns them into latents."""

import math
import multiprocessing
from pathlib import Path

import numpy as np
import torch

from tlora_core.tiny import world
from tlora_core.tiny.autoencoder import TinyAutoencoder

from .common import SIZE, Progress, save_state, set_rate, to_tensor, warm_stable_decay

CELLS = 8


def stage_data(work: Path, args):
    """Draw the training pictures and their object masks once; captions are made anew at every use."""
    if (work / "scenes.npz").exists():
        return
    rng = np.random.default_rng(args.seed)
    scenes = world.sample_scenes(args.scenes, rng)
    pictures, masks = draw(scenes, args.processes, "draw")
    # Objects of any colour with a rim and a core: the autoencoder must represent them, though the base never sees one.
    odd = world.sample_scenes(args.odd_scenes, rng)
    odd.colour, odd.rim, odd.core = (rng.random((args.odd_scenes, 3)) for _ in range(3))
    np.save(work / "odd.npy", draw(odd, args.processes, "draw odd ones")[0])
    np.save(work / "pictures.npy", pictures)
    np.save(work / "masks.npy", masks)
    np.savez(work / "scenes.tmp.npz", **scenes.__dict__)
    (work / "scenes.tmp.npz").replace(work / "scenes.npz")


def draw(scenes: world.Scenes, processes: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures as bytes [B, 64, 64, 3] and the object's share of each latent cell [B, 8, 8]."""
    parts = [take(scenes, slice(i, i + 100)) for i in range(0, len(scenes), 100)]
    done, progress = [], Progress(what, len(parts))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for i, part in enumerate(pool.imap(draw_part, parts)):
            done.append(part)
            progress.step(i)
    pictures, masks = zip(*done)
    return np.concatenate(pictures), np.concatenate(masks)


def draw_part(scenes: world.Scenes):
    masks = world.object_mask(scenes, SIZE).reshape(-1, CELLS, SIZE // CELLS, CELLS, SIZE // CELLS).mean((2, 4))
    return np.round(world.render(scenes, SIZE) * 255).astype(np.uint8), masks.astype(np.float16)


def take(scenes: world.Scenes, rows) -> world.Scenes:
    return world.Scenes(**{k: v[rows] for k, v in scenes.__dict__.items()})


def stage_autoencoder(work: Path, args):
    """L1 reconstruction with noise on the latent, so that the decoder forgives a small error of the diffusion model.

    Half of each batch are odd objects of any colour with a rim and a core, some with their colour channels mixed at
    random: the autoencoder must hold what no training object of the base has, as a real base model's does.
    """
    path, total, batch = work / "autoencoder.pt", args.autoencoder_steps, 16
    torch.manual_seed(args.seed)
    model = TinyAutoencoder().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    pictures, odd = np.load(work / "pictures.npy", mmap_mode="r"), np.load(work / "odd.npy")
    progress = Progress("autoencoder", total, first)
    for step in range(first, total):
        rng = np.random.default_rng((args.seed, 1, step))
        pixels = to_tensor(
            np.concatenate(
                [
                    pictures[np.sort(rng.integers(len(pictures), size=batch // 2))],
                    odd[rng.integers(len(odd), size=batch // 2)],
                ]
            ),
            args.device,
        )
        mix = torch.from_numpy(rng.dirichlet(np.full(3, 0.5), (batch // 8, 3))).to(pixels)
        pixels[-(batch // 8) :] = torch.einsum("bij,bjhw->bihw", mix, pixels[-(batch // 8) :])
        set_rate(optimizer, warm_stable_decay(step, total, 1e-3))
        latent = model.encode(pixels)
        noise = torch.from_numpy(rng.standard_normal(latent.shape)).to(latent)
        output = torch.nn.functional.avg_pool2d(model.decode(latent + 0.05 * noise), 2)
        loss = (output - pixels).abs().mean() + 1e-3 * latent.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        psnr = -10 * math.log10(float((output - pixels).detach().square().mean()) / 4)
        if progress.step(step, loss=loss.item(), psnr=psnr) or step + 1 == total:
            save_state(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    return model


@torch.no_grad()
def stage_latents(work: Path, args):
    """Fix the autoencoder's scale (zero mean, unit variance a channel) and encode every picture once."""
    if (work / "latents.pt").exists():
        return
    model = load_autoencoder(work, args.device)
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    progress = Progress("encode", len(pictures))
    raw = []
    for i in range(0, len(pictures), 200):
        raw.append(model.encode(to_tensor(pictures[i : i + 200], args.device)).cpu())
        progress.step(min(i + 200, len(pictures)) - 1)
    raw = torch.cat(raw)
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    state = torch.load(work / "autoencoder.pt", weights_only=True)
    state["model"]["latent_mean"], state["model"]["latent_std"] = mean, std
    save_state(work / "autoencoder.pt", **state)
    latents = (raw - mean[:, None, None]) / std[:, None, None]
    save_state(work / "latents.pt", latents=latents.half())


def load_autoencoder(work: Path, device):
    model = TinyAutoencoder().to(device)
    model.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True, map_location=device)["model"])
    return model.eval()
