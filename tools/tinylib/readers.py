"""Networks that read captions and pictures: the text encoder's first training, and the scorer."""

from pathlib import Path

import numpy as np
import torch
from tiny_gate import attributes
from torch.nn.functional import cross_entropy

from tlora_core.tiny.scorer import HEADS, AttributeScorer, at_size
from tlora_core.tiny.tokenizer import padded_ids

from .common import Progress, captions, load_scenes, save_state, set_rate, to_tensor, warm_stable_decay
from .pictures import load_autoencoder


def stage_text(work: Path, args):
    """Teach the text encoder what captions say before any picture is seen: its pooled output must tell each
    attribute."""
    from tlora_core.tiny import comfy as tiny_base

    path, total, batch = work / "text.pt", args.text_steps, 128
    if path.exists():
        return
    torch.manual_seed(args.seed)
    text, scenes = clone_before_norms(tiny_base.new_modules()[1]), load_scenes(work)
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(tiny_base.TEXT_WIDTH, count) for name, count in HEADS.items()})
    optimizer = torch.optim.AdamW([*text.parameters(), *heads.parameters()], 1e-3, weight_decay=0.01)
    progress = Progress("text", total)
    for step in range(total):
        rng = np.random.default_rng((args.seed, 5, step))
        rows = rng.integers(len(scenes), size=batch)
        pooled = text(torch.tensor([padded_ids(c) for c in captions(scenes, rows, rng)]))[2]
        target = attributes(scenes, rows)
        loss = sum(cross_entropy(heads[name](pooled), target[name]) for name in target)
        set_rate(optimizer, warm_stable_decay(step, total, 1e-3, warmup=50))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.step(step, loss=loss.item())
    save_state(path, model=text.state_dict())


def clone_before_norms(text):
    """The host's CLIP blocks add in place to what layer norm needs for its backward."""
    for module in text.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    return text


def stage_scorer(work: Path, args):
    """Train the attribute scorer on freshly rendered pictures, half of them blurred by the autoencoder."""
    path, total, batch = work / "scorer.pt", args.scorer_steps, 64
    if path.exists():
        return
    torch.manual_seed(args.seed)
    model = AttributeScorer().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    autoencoder = load_autoencoder(work, args.device)
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    scenes = load_scenes(work)
    progress = Progress("scorer", total)
    for step in range(total):
        rng = np.random.default_rng((args.seed, 3, step))
        rows = np.sort(rng.integers(len(pictures), size=batch))
        pixels = to_tensor(pictures[rows], args.device)
        with torch.no_grad():
            latent = autoencoder.encode(pixels[::4])
            pixels[::4] = at_size(autoencoder.decode(latent + 0.15 * torch.randn_like(latent)))
        logits = model(pixels + 0.03 * torch.randn_like(pixels))
        target = {k: v.to(args.device) for k, v in attributes(scenes, rows).items()}
        loss = sum(cross_entropy(logits[name], target[name], label_smoothing=0.02) for name in target)
        set_rate(optimizer, warm_stable_decay(step, total, 2e-3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.step(step, loss=loss.item())
    save_state(path, model=model.state_dict())
