"""Make the tiny base model from nothing: draw its world, train autoencoder and base, measure the gate, write the files.

    python3 tools/host.py python tools/train_tiny_base.py --work FOLDER [--stage all] [--device cpu]

The base stage also runs in several processes, each with its own part of the batch, which on a CPU is far faster than
several threads in one: `... python -m torch.distributed.run --nproc_per_node 2 tools/train_tiny_base.py --stage base`.

Every stage is seeded, saves its progress in the work folder every minute and goes on from there when started again.
Stages: data, autoencoder, latents, base, scorer, export, gate; `all` runs them in this order.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import avg_pool2d, cross_entropy

torch.set_flush_denormal(True)  # tiny activations are ten times slower otherwise; worker threads inherit it from here
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # after the host's own folders, which must win for `nodes` and the like

from tlora_core.tiny import world  # noqa: E402
from tlora_core.tiny.autoencoder import LATENT_CHANNELS, TinyAutoencoder  # noqa: E402
from tlora_core.tiny.scorer import AttributeScorer  # noqa: E402
from tlora_core.tiny.tokenizer import padded_ids  # noqa: E402

SCENES = 40_000
ODD_SCENES = 6_000  # objects of any colour with a rim and a core, for the autoencoder alone
SIZE = 64
AVERAGE_EVERY = 5  # steps between updates of the averaged weights
GATE = {"background": 0.95, "colour": 0.90, "shape": 0.80}
LATENT_VARIANCE = 0.25  # unit variance, halved by the latent format


class Progress:
    """Prints one line at most every ten seconds and says when a minute has passed since the last save."""

    def __init__(self, what, total, start=0):
        self.what, self.total, self.first = what, total, start
        self.began = self.printed = self.saved = time.time()

    def step(self, i, **numbers):
        now = time.time()
        if now - self.printed > 10 or i + 1 == self.total:
            self.printed = now
            rate = (i + 1 - self.first) / (now - self.began)
            values = " ".join(f"{k}={v:.4f}" for k, v in numbers.items())
            print(f"{self.what} {i + 1}/{self.total} {rate:.2f}/s {values}", flush=True)
        if now - self.saved > 60:
            self.saved = now
            return True
        return False


def save_state(path: Path, **state):
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def stage_data(work: Path, args):
    """Draw the training pictures and their object masks once; captions are made anew at every use."""
    if (work / "scenes.pt").exists():
        return
    rng = np.random.default_rng(args.seed)
    scenes = world.sample_scenes(SCENES, rng)
    pictures = np.empty((SCENES, SIZE, SIZE, 3), np.uint8)
    masks = np.empty((SCENES, 8, 8), np.float16)
    progress = Progress("draw", SCENES)
    for i in range(0, SCENES, 100):
        part = take(scenes, slice(i, i + 100))
        pictures[i:i + 100] = np.round(world.render(part, SIZE) * 255)
        masks[i:i + 100] = world.object_mask(part, SIZE).reshape(-1, 8, 8, 8, 8).mean((2, 4))
        progress.step(i + 99)
    odd = world.sample_scenes(ODD_SCENES, rng)
    odd.colour, odd.rim, odd.core = (rng.random((ODD_SCENES, 3)) for _ in range(3))
    np.save(work / "odd.npy", np.round(np.concatenate(
        [world.render(take(odd, slice(i, i + 100)), SIZE) for i in range(0, ODD_SCENES, 100)]) * 255).astype(np.uint8))
    np.save(work / "pictures.npy", pictures)
    np.save(work / "masks.npy", masks)
    save_state(work / "scenes.pt", scenes=scenes.__dict__)


def take(scenes: world.Scenes, rows) -> world.Scenes:
    return world.Scenes(**{k: v[rows] for k, v in scenes.__dict__.items()})


def to_tensor(pictures, device):
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step, total, peak, warmup=200):
    return peak * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1, step / total)))


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
        pixels = to_tensor(np.concatenate([pictures[np.sort(rng.integers(SCENES, size=batch // 2))],
                                           odd[rng.integers(ODD_SCENES, size=batch // 2)]]), args.device)
        mix = torch.from_numpy(rng.dirichlet(np.full(3, 0.5), (batch // 8, 3))).to(pixels)
        pixels[-(batch // 8):] = torch.einsum("bij,bjhw->bihw", mix, pixels[-(batch // 8):])
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, total, 1e-3)
        latent = model.encode(pixels)
        noise = torch.from_numpy(rng.standard_normal(latent.shape)).to(latent)
        output = model.decode(latent + 0.05 * noise)
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
    progress = Progress("encode", SCENES)
    raw = []
    for i in range(0, SCENES, 200):
        raw.append(model.encode(to_tensor(pictures[i:i + 200], args.device)).cpu())
        progress.step(i + 199)
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


def captions(scenes, rows, rng):
    """A tenth are empty, which is what classifier-free guidance needs."""
    return ["" if rng.random() < 0.1 else world.caption(scenes, i, rng) for i in rows]


def encode_captions(text, texts, device):
    ids = torch.tensor([padded_ids(t) for t in texts], device=device)
    context, _, pooled, _ = text(ids)
    return context, pooled


def noise_loss(error, sigma, mask):
    """MSE of the predicted noise, three times heavier on the object, plus the same error averaged over 2x2, 4x4 and
    8x8 cells, each weighted so that white noise would count the same: at the noisiest timesteps all that a picture
    says lies in those averages, and plain MSE gives them a 64th of its weight. Min-SNR-5 over timesteps."""
    heavy = 1 + 2 * mask
    loss = (error.square() * heavy).mean((1, 2, 3)) / heavy.mean((1, 2, 3))
    for k in (2, 4, 8):
        loss = loss + 0.3 * k * k * avg_pool2d(error, k).square().mean((1, 2, 3))
    snr = LATENT_VARIANCE / sigma.square()
    return (loss * snr.clamp(max=5) / snr).mean()


def average_gradients(nets):
    """Over all processes, in one message."""
    gradients = [p.grad for p in nets.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    torch._foreach_copy_(gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients)])


def stage_base(work: Path, args):
    """Train U-Net and text encoder together on noise prediction."""
    from comfy.ldm.modules.attention import attention_basic
    from tlora_core.comfy_host import tiny_base
    path, total, batch, device = work / "base.pt", args.base_steps, 32, args.device
    torch.manual_seed(args.seed)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        torch.distributed.init_process_group("gloo")
    base, text = tiny_base.new_modules()
    base, text = base.to(device), text.to(device)
    for module in text.modules():  # the host's CLIP blocks add in place to what layer norm needs for its backward
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    nets = torch.nn.ModuleDict({"unet": base.diffusion_model, "text": text})
    optimizer = torch.optim.AdamW(nets.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {k: v.detach().clone() for k, v in nets.state_dict().items()}
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        nets.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    latents = torch.load(work / "latents.pt", weights_only=True)["latents"]
    masks = torch.from_numpy(np.load(work / "masks.npy"))
    scenes = world.Scenes(**torch.load(work / "scenes.pt", weights_only=False)["scenes"])
    options = {"optimized_attention_override": lambda func, *a, **k: attention_basic(*a, **k)}
    progress, smooth = Progress("base", total, first), None
    for step in range(first, total):
        rng = np.random.default_rng((args.seed, 2, step, rank))
        rows = rng.integers(SCENES, size=batch)
        x0 = latents[rows].to(device).float() * base.latent_format.scale_factor
        t = torch.from_numpy((((np.arange(batch) + rng.random(batch)) / batch) ** 0.8 * 1000).astype(np.int64)).to(device)
        sigma = base.model_sampling.sigmas.to(device)[t].reshape(-1, 1, 1, 1)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, np.float32)).to(device)
        context, pooled = encode_captions(text, captions(scenes, rows, rng), device)
        width, height = (SIZE, SIZE) if rng.random() < 0.5 else rng.integers(32, 1024, 2)
        y = base.encode_adm(pooled_output=pooled, width=width, height=height).to(device)
        predicted = base.diffusion_model((x0 + sigma * noise) / (sigma.square() + 1).sqrt(), t.float(), context=context,
                                         y=y, transformer_options=options)
        loss = noise_loss(predicted - noise, sigma.flatten(), masks[rows].to(device).float()[:, None])
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, total, args.base_rate, warmup=300)
        optimizer.zero_grad()
        loss.backward()
        if processes > 1:
            average_gradients(nets)
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        if step % AVERAGE_EVERY == 0:
            decay = min(0.999 ** AVERAGE_EVERY, (step + 1) / (step + 10 * AVERAGE_EVERY))
            torch._foreach_lerp_(list(average.values()), list(nets.state_dict().values()), 1 - decay)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        if rank == 0 and (progress.step(step, loss=smooth) or step + 1 == total):
            save_state(path, model=nets.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step + 1)


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
    scenes = world.Scenes(**torch.load(work / "scenes.pt", weights_only=False)["scenes"])
    progress = Progress("scorer", total)
    for step in range(total):
        rng = np.random.default_rng((args.seed, 3, step))
        rows = np.sort(rng.integers(SCENES, size=batch))
        pixels = to_tensor(pictures[rows], args.device)
        with torch.no_grad():
            latent = autoencoder.encode(pixels[::4])
            pixels[::4] = autoencoder.decode(latent + 0.15 * torch.randn_like(latent))
        logits = model(pixels + 0.03 * torch.randn_like(pixels))
        target = attributes(scenes, rows, args.device)
        loss = sum(cross_entropy(logits[name], target[name], label_smoothing=0.02) for name in target)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, total, 2e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.step(step, loss=loss.item())
    save_state(path, model=model.state_dict())


def attributes(scenes, rows, device):
    source = {"shape": scenes.shape, "colour": scenes.colour_index, "pattern": scenes.pattern,
              "background": scenes.background, "place": scenes.place}
    return {name: torch.from_numpy(values[rows]).to(device) for name, values in source.items()}


@torch.no_grad()
def scorer_accuracy(model, args, count=2000) -> dict:
    """On rendered pictures that it was not trained on."""
    scenes = world.sample_scenes(count, np.random.default_rng((args.seed, 4)))
    right = {}
    for i in range(0, count, 100):
        part = take(scenes, slice(i, i + 100))
        guess = model.predict(to_tensor(np.round(world.render(part, SIZE) * 255).astype(np.uint8), args.device))
        for name, target in attributes(part, slice(None), args.device).items():
            right[name] = right.get(name, 0) + (guess[name] == target).sum().item() / count
    return right


def stage_export(work: Path, args):
    """Write the averaged weights in half precision, under SDXL's checkpoint names, and the scorer."""
    average = torch.load(work / "base.pt", weights_only=True)["average"]
    tensors = {}
    for name, value in average.items():
        kind, rest = name.split(".", 1)
        prefix = {"unet": "model.diffusion_model.", "text": "conditioner.embedders.0.transformer."}[kind]
        tensors[prefix + rest] = value.half().contiguous()
    for name, value in load_autoencoder(work, "cpu").state_dict().items():
        tensors["first_stage_model." + name] = value.half()
    save_file(tensors, args.output / "tiny_base.safetensors", metadata={"modelspec.architecture": "tlora-tiny-sdxl"})
    scorer = torch.load(work / "scorer.pt", weights_only=True)["model"]
    save_file({k: v.half() if v.is_floating_point() else v for k, v in scorer.items()},
              args.output / "scorer.safetensors")


@torch.no_grad()
def stage_gate(work: Path, args):
    """Measure the exported model as the host runs it: prompts with a shape, colour, pattern, place and background,
    20 Euler steps, guidance 4; how often does the scorer see what was asked for?"""
    from tlora_core.comfy_host import tiny_base
    scorer = AttributeScorer().eval()
    scorer.load_state_dict({k: v.float() for k, v in load_file(args.output / "scorer.safetensors").items()})
    report = {"scorer": scorer_accuracy(scorer, args), "steps": torch.load(work / "base.pt", weights_only=True)["step"]}
    host = HostSampler(*tiny_base.load(str(args.output / "tiny_base.safetensors")))
    scenes = world.sample_scenes(args.gate_pictures, np.random.default_rng((args.seed, 5)))
    rng, right, shown = np.random.default_rng((args.seed, 6)), {}, []
    for i in range(args.gate_pictures):
        picture = host.sample(world.caption(scenes, i, FullCaption(rng), drop=0), seed=i)
        shown.append(picture)
        guess = scorer.predict(picture.permute(0, 3, 1, 2) * 2 - 1)
        for name, target in attributes(scenes, slice(i, i + 1), "cpu").items():
            right.setdefault(name, []).append(bool(guess[name] == target))
    report["base"] = {name: float(np.mean(hits)) for name, hits in right.items()}
    report["passed"] = all(report["base"][k] >= v for k, v in GATE.items()) and min(report["scorer"].values()) >= 0.95
    (work / "gate.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
    save_grid(torch.cat(shown)[:64], work / "gate.png")


class FullCaption:
    """A generator that never drops an attribute nor adds a rare word."""

    def __init__(self, rng):
        self.rng = rng

    def random(self):
        return 0.5


class HostSampler:
    """The host's own sampling of one prompt with the tiny base."""

    def __init__(self, model, clip, vae):
        self.model, self.clip, self.vae = model, clip, vae

    def sample(self, prompt, seed, steps=20, guidance=4.0, count=1):
        import comfy.sample
        positive, negative = (self.clip.encode_from_tokens_scheduled(self.clip.tokenize(t)) for t in (prompt, ""))
        latent = torch.zeros(count, LATENT_CHANNELS, SIZE // 8, SIZE // 8)
        noise = comfy.sample.prepare_noise(latent, seed)
        output = comfy.sample.sample(self.model, noise, steps, guidance, "euler", "normal", positive, negative, latent,
                                     disable_pbar=True, seed=seed)
        return self.vae.decode(output)


def save_grid(pictures, path, columns=8):
    from PIL import Image
    rows = [torch.cat(list(pictures[i:i + columns]), dim=1) for i in range(0, len(pictures), columns)]
    Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy()).resize((1024, 1024), 0).save(path)


STAGES = {"data": stage_data, "autoencoder": stage_autoencoder, "latents": stage_latents, "base": stage_base,
          "scorer": stage_scorer, "export": stage_export, "gate": stage_gate}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and reports")
    parser.add_argument("--stage", default="all", choices=["all", *STAGES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder-steps", type=int, default=4300)
    parser.add_argument("--scorer-steps", type=int, default=2500)
    parser.add_argument("--gate-pictures", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "tlora_core" / "tiny" / "weights")
    parser.add_argument("--base-steps", type=int, default=14000)
    parser.add_argument("--base-rate", type=float, default=1.5e-3)
    args = parser.parse_args()
    sys.argv = sys.argv[:1] + (["--cpu"] if args.device == "cpu" else [])  # what the host parses when it is imported
    import comfy.options
    comfy.options.enable_args_parsing()
    args.output.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if args.stage in ("all", name):
            stage(args.work, args)


if __name__ == "__main__":
    main()
