"""Make the tiny base model from nothing: draw its world, train autoencoder and base, measure the gate, write the files.

    python3 tools/host.py python tools/train_tiny_base.py --work FOLDER [--stage all] [--device cpu]

Every stage is seeded, saves its progress in the work folder every minute and goes on from there when started again.
Stages: data, autoencoder, latents, text, base, scorer, export, gate; `all` runs them in this order.
"""
import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_gate import WEIGHTS, attributes, measure, parse_host_arguments, save_grid
from torch.nn.functional import avg_pool2d, cross_entropy

from tlora_core.tiny import world
from tlora_core.tiny.autoencoder import TinyAutoencoder
from tlora_core.tiny.scorer import HEADS, AttributeScorer
from tlora_core.tiny.tokenizer import padded_ids

torch.set_flush_denormal(True)  # tiny activations are ten times slower otherwise; worker threads inherit it from here

SCENES = 40_000
ODD_SCENES = 6_000  # for the autoencoder alone
SIZE, CELLS = 64, 8
BATCH = 32  # of each process
AVERAGE_EVERY = 5  # steps between updates of the averaged weights


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
    pictures, masks = draw(scenes, args.processes, "draw")
    # Objects of any colour with a rim and a core: the autoencoder must hold what no training object of the base has.
    odd = world.sample_scenes(ODD_SCENES, rng)
    odd.colour, odd.rim, odd.core = (rng.random((ODD_SCENES, 3)) for _ in range(3))
    np.save(work / "odd.npy", draw(odd, args.processes, "draw odd ones")[0])
    np.save(work / "pictures.npy", pictures)
    np.save(work / "masks.npy", masks)
    save_state(work / "scenes.pt", scenes=scenes.__dict__)


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


def to_tensor(pictures, device):
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def warm_stable_decay(step: int, total: int, peak: float, warmup: int = 300) -> float:
    """A constant learning rate between a warm-up and a linear fall to zero over the last third, so that a run that is cut
    or made longer before its fall is still the same run."""
    return peak * min(1, (step + 1) / warmup) * min(1, (total - step) / (total / 3))


def set_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


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
        set_rate(optimizer, warm_stable_decay(step, total, 1e-3))
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


def stage_text(work: Path, args):
    """Teach the text encoder what captions say before any picture is seen: its pooled output must tell each attribute."""
    from tlora_core.comfy_host import tiny_base
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
        rows = rng.integers(SCENES, size=batch)
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


def noise_loss(error, sigma, mask):
    """Weighted MSE of the predicted noise, [B, C, H, W], at `sigma` [B].

    Heavier on the object and most on its edge, where all that tells one shape from another lies; plus the same error
    averaged over 2x2 and 4x4 cells, weighted so that white noise would count half, as what a noisy latent still shows lies
    in such averages. The weight over timesteps is that of Karras et al. 2022 (EDM), section 5, for data of deviation 0.5,
    up to 50: what the object is, is settled where sigma is 1 to 10, and plain MSE of the noise gives a picture's error
    there a hundredth of its weight elsewhere.
    """
    blurred = avg_pool2d(mask, 3, stride=1, padding=1)
    heavy = 1 + 2 * mask + 6 * (4 * blurred * (1 - blurred))
    heavy = heavy / heavy.mean((1, 2, 3), keepdim=True)
    loss = (error.square() * heavy).mean((1, 2, 3))
    for k in (2, 4):
        loss = loss + 0.5 * k * k * (avg_pool2d(error, k).square() * avg_pool2d(heavy, k)).mean((1, 2, 3))
    return (loss * (1 + (sigma / 0.5).square()).clamp(max=50)).mean()


class BaseTraining:
    """U-Net and text encoder, trained together on noise prediction; goes on from `base.pt` where there is one."""

    def __init__(self, work: Path, args):
        from comfy.ldm.modules.attention import attention_basic

        from tlora_core.comfy_host import tiny_base
        self.path, self.args, self.device = work / "base.pt", args, args.device
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        torch.manual_seed(args.seed)
        base, text = tiny_base.new_modules()
        text.load_state_dict(torch.load(work / "text.pt", weights_only=True)["model"])
        self.base, self.text = base.to(self.device), clone_before_norms(text.to(self.device))
        self.options = {"optimized_attention_override": lambda func, *a, **k: attention_basic(*a, **k)}
        self.nets = torch.nn.ModuleDict({"unet": base.diffusion_model, "text": text})
        self.nets.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
        self.optimizer = torch.optim.AdamW(self.nets.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {k: v.detach().clone() for k, v in self.nets.state_dict().items()}
        self.first = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location=self.device)
            self.nets.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.first = state["average"], state["step"]
        self.latents = torch.load(work / "latents.pt", weights_only=True)["latents"]
        self.masks = torch.from_numpy(np.load(work / "masks.npy"))
        self.scenes = load_scenes(work)

    def loss(self, step: int):
        rng = np.random.default_rng((self.args.seed, 2, step, self.rank))
        rows = rng.integers(SCENES, size=BATCH)
        clean = self.latents[rows].to(self.device).float() * self.base.latent_format.scale_factor
        # Spread evenly over the batch, and somewhat denser at the noisy end, where what a picture shows is decided.
        even = (np.arange(BATCH) + rng.random(BATCH)) / BATCH
        t = torch.from_numpy((even**0.8 * 1000).astype(np.int64)).to(self.device)
        sigma = self.base.model_sampling.sigmas.to(self.device)[t].reshape(-1, 1, 1, 1)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(self.device)
        ids = torch.tensor([padded_ids(c) for c in captions(self.scenes, rows, rng)], device=self.device)
        context, _, pooled, _ = self.text(ids)
        # Half of the time any size, so that the model learns to ignore what SDXL is told of sizes.
        width, height = (SIZE, SIZE) if rng.random() < 0.5 else rng.integers(32, 1024, 2)
        y = self.base.encode_adm(pooled_output=pooled, width=width, height=height).to(self.device)
        noisy = ((clean + sigma * noise) / (sigma.square() + 1).sqrt()).to(memory_format=torch.channels_last)
        predicted = self.base.diffusion_model(noisy, t.float(), context=context, y=y, transformer_options=self.options)
        return noise_loss(predicted - noise, sigma.flatten(), self.masks[rows].to(self.device).float()[:, None])

    def step(self, step: int) -> float:
        loss = self.loss(step)
        set_rate(self.optimizer, warm_stable_decay(step, self.args.base_steps, self.args.base_rate))
        self.optimizer.zero_grad()
        loss.backward()
        if self.processes > 1:
            average_gradients(self.nets)
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        self.optimizer.step()
        if step % AVERAGE_EVERY == 0:
            decay = min(0.999**AVERAGE_EVERY, (step + 1) / (step + 10 * AVERAGE_EVERY))
            torch._foreach_lerp_(list(self.average.values()), list(self.nets.state_dict().values()), 1 - decay)
        return loss.item()

    def save(self, step: int) -> None:
        save_state(self.path, model=self.nets.state_dict(), optimizer=self.optimizer.state_dict(), average=self.average,
                   step=step + 1)


def average_gradients(nets):
    """Over all processes, in one message."""
    gradients = [p.grad for p in nets.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    torch._foreach_copy_(gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients)])


def stage_base(work: Path, args):
    """Train the base, each process on its own part of the batch: on a CPU that is far faster than as many threads."""
    if args.processes > 1 and "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
        subprocess.run([*launch, __file__, *args.given, "--stage", "base"], check=True)
        return
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    training, smooth = BaseTraining(work, args), None
    progress = Progress("base", args.base_steps, training.first)
    for step in range(training.first, args.base_steps):
        loss = training.step(step)
        smooth = loss if smooth is None else 0.99 * smooth + 0.01 * loss
        if training.rank == 0 and (progress.step(step, loss=smooth) or step + 1 == args.base_steps):
            training.save(step)


def load_scenes(work: Path) -> world.Scenes:
    return world.Scenes(**torch.load(work / "scenes.pt", weights_only=False)["scenes"])


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
        rows = np.sort(rng.integers(SCENES, size=batch))
        pixels = to_tensor(pictures[rows], args.device)
        with torch.no_grad():
            latent = autoencoder.encode(pixels[::4])
            pixels[::4] = autoencoder.decode(latent + 0.15 * torch.randn_like(latent))
        logits = model(pixels + 0.03 * torch.randn_like(pixels))
        target = {k: v.to(args.device) for k, v in attributes(scenes, rows).items()}
        loss = sum(cross_entropy(logits[name], target[name], label_smoothing=0.02) for name in target)
        set_rate(optimizer, warm_stable_decay(step, total, 2e-3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.step(step, loss=loss.item())
    save_state(path, model=model.state_dict())


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


def stage_gate(work: Path, args):
    """Measure what was exported and keep the report beside the other results."""
    report, drawn = measure(args.gate_pictures, concepts=len(world.CONCEPTS), folder=args.output)
    report["steps"] = torch.load(work / "base.pt", weights_only=True)["step"]
    (work / "gate.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
    save_grid(drawn[:48], work / "gate.png")


STAGES = {"data": stage_data, "autoencoder": stage_autoencoder, "latents": stage_latents, "text": stage_text,
          "base": stage_base, "scorer": stage_scorer, "export": stage_export, "gate": stage_gate}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and reports")
    parser.add_argument("--stage", default="all", choices=["all", *STAGES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder-steps", type=int, default=4300)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--scorer-steps", type=int, default=1500)
    parser.add_argument("--gate-pictures", type=int, default=200)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--base-steps", type=int, default=9000)
    parser.add_argument("--base-rate", type=float, default=1.2e-3)
    parser.add_argument("--processes", type=int, default=1, help="on a CPU as many as it has cores")
    args = parser.parse_args()
    args.given = sys.argv[1:]
    parse_host_arguments(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        if args.stage in ("all", name):
            stage(args.work, args)


if __name__ == "__main__":
    main()
