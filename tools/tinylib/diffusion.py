"""The base's training to predict noise, and of its flow-matching sibling to predict the velocity."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tlora_core.tiny.tokenizer import padded_ids

from .common import SIZE, Progress, captions, load_scenes, save_state, set_rate, warm_stable_decay
from .readers import clone_before_norms

BATCH = 32  # of each process
AVERAGE_EVERY = 5  # steps between updates of the averaged weights
PREFIXES = {"unet": "model.diffusion_model.", "text": "conditioner.embedders.0.transformer."}  # in SDXL's model files


def on_object(error: Tensor, mask: Tensor) -> Tensor:
    """Squared error of each picture [B], given [B, C, H, W]: heavier on the object and most on its edge, which
    distinguishes shapes. Adds the error averaged over 2x2 and 4x4 cells, weighted so that white noise would count half,
    because a noisy latent still shows such averages."""
    blurred = avg_pool2d(mask, 3, stride=1, padding=1)
    heavy = 1 + 2 * mask + 6 * (4 * blurred * (1 - blurred))
    heavy = heavy / heavy.mean((1, 2, 3), keepdim=True)
    loss = (error.square() * heavy).mean((1, 2, 3))
    for k in (2, 4):
        loss = loss + 0.5 * k * k * (avg_pool2d(error, k).square() * avg_pool2d(heavy, k)).mean((1, 2, 3))
    return loss


@dataclass
class Batch:
    """clean, noise [B, C, 8, 8]; place [B], 0 clean to 1 noise; mask [B, 1, 8, 8]; context and y: the encoded text."""

    clean: Tensor
    noise: Tensor
    place: Tensor
    mask: Tensor
    context: Tensor
    y: Tensor


class DiffusionTraining:
    """The networks, the average of their weights, and the data. Resumes from the state in the work folder if there is
    one.

    A subclass defines the networks (`networks`), their error (`loss`), and its random stream (`stream`).
    """

    name: str
    stream: int

    def __init__(self, work: Path, args, steps: int, rate: float):
        from comfy.ldm.modules.attention import attention_basic

        from tlora_core.tiny import comfy as tiny_base

        self.path, self.args, self.device, self.steps, self.rate = (
            work / f"{self.name}.pt",
            args,
            args.device,
            steps,
            rate,
        )
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        torch.manual_seed(args.seed)
        self.base, self.text = tiny_base.new_modules()
        self.nets = torch.nn.ModuleDict(self.networks(work))
        self.base.to(self.device)
        self.text = clone_before_norms(self.text.to(self.device))
        self.nets.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
        self.options = {"optimized_attention_override": lambda func, *a, **k: attention_basic(*a, **k)}
        self.optimizer = torch.optim.AdamW(
            self.nets.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
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

    def networks(self, work: Path) -> dict[str, torch.nn.Module]:
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def draw(self, step: int) -> Batch:
        rng = np.random.default_rng((self.args.seed, self.stream, step, self.rank))
        rows = rng.integers(len(self.latents), size=BATCH)
        clean = self.latents[rows].to(self.device).float() * self.base.latent_format.scale_factor
        # Evenly spread over the batch, and somewhat denser at the noisy end, where a picture's content is decided.
        place = ((np.arange(BATCH) + rng.random(BATCH)) / BATCH) ** 0.8
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(self.device)
        ids = torch.tensor([padded_ids(c) for c in captions(self.scenes, rows, rng)], device=self.device)
        context, _, pooled, _ = self.text(ids)
        # Random sizes half of the time, so that the model learns to ignore SDXL's size conditioning.
        width, height = (SIZE, SIZE) if rng.random() < 0.5 else rng.integers(32, 1024, 2)
        y = self.base.encode_adm(pooled_output=pooled, width=width, height=height).to(self.device)
        mask = self.masks[rows].to(self.device).float()[:, None]
        return Batch(clean, noise, torch.from_numpy(place).to(self.device), mask, context, y)

    def predict(self, noisy: Tensor, t: Tensor, batch: Batch) -> Tensor:
        noisy = noisy.to(memory_format=torch.channels_last)
        return self.base.diffusion_model(
            noisy, t.float(), context=batch.context, y=batch.y, transformer_options=self.options
        )

    def step(self, step: int) -> float:
        loss = self.loss(self.draw(step))
        set_rate(self.optimizer, warm_stable_decay(step, self.steps, self.rate))
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
        save_state(
            self.path,
            model=self.nets.state_dict(),
            optimizer=self.optimizer.state_dict(),
            average=self.average,
            step=step + 1,
        )

    def run(self) -> None:
        smooth, progress = None, Progress(self.name, self.steps, self.first)
        for step in range(self.first, self.steps):
            loss = self.step(step)
            smooth = loss if smooth is None else 0.99 * smooth + 0.01 * loss
            if self.rank == 0 and (progress.step(step, loss=smooth) or step + 1 == self.steps):
                self.save(step)


class NoiseTraining(DiffusionTraining):
    """Trains U-Net and text encoder together on the noise.

    The weight over timesteps is that of Karras et al. 2022 (EDM), section 5, for data of deviation 0.5, up to 50. The
    object is decided where sigma is 1 to 10, and plain MSE of the noise gives a picture's error there a hundredth of
    its weight elsewhere.
    """

    name, stream = "base", 2

    def networks(self, work):
        self.text.load_state_dict(torch.load(work / "text.pt", weights_only=True)["model"])
        return {"unet": self.base.diffusion_model, "text": self.text}

    def loss(self, batch):
        t = (1000 * batch.place).long()
        sigma = self.base.model_sampling.sigmas.to(self.device)[t]
        by_cell = sigma.reshape(-1, 1, 1, 1)
        noisy = (batch.clean + by_cell * batch.noise) / (by_cell.square() + 1).sqrt()
        error = self.predict(noisy, t, batch) - batch.noise
        return (on_object(error, batch.mask) * (1 + (sigma / 0.5).square()).clamp(max=50)).mean()


class FlowTraining(DiffusionTraining):
    """Trains the finished base's U-Net further to predict the velocity, noise minus clean, anywhere on the straight
    line between them. The text encoder stays as it is.

    The weight over times is that of NoiseTraining, converted from the noise's error to the velocity's, but at least a
    half.
    """

    name, stream = "flow", 6

    def networks(self, work):
        finished = load_file(self.args.output / "tiny_base.safetensors")
        for name, module in (("unet", self.base.diffusion_model), ("text", self.text)):
            own = {
                k.removeprefix(PREFIXES[name]): v.float() for k, v in finished.items() if k.startswith(PREFIXES[name])
            }
            module.load_state_dict(own)
        self.text.requires_grad_(False)
        return {"unet": self.base.diffusion_model}

    def loss(self, batch):
        time = batch.place.float()
        noisy = torch.lerp(batch.clean, batch.noise, time.reshape(-1, 1, 1, 1))
        error = self.predict(noisy, 1000 * time, batch) - (batch.noise - batch.clean)
        weight = torch.minimum((1 - time).square() + (time / 0.5).square(), 50 * (1 - time).square()).clamp(min=0.5)
        return (on_object(error, batch.mask) * weight).mean()


def average_gradients(nets):
    """Averages over all processes, in one message."""
    gradients = [p.grad for p in nets.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    torch._foreach_copy_(
        gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients)]
    )


def train(kind: type[DiffusionTraining], work: Path, args, steps: int, rate: float) -> None:
    """Each process trains on its own part of the batch. On a CPU this is far faster than as many threads."""
    if args.processes > 1 and "RANK" not in os.environ:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(args.processes),
        ]
        subprocess.run([*launch, sys.argv[0], *args.given, "--stage", kind.name], check=True)
        return
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    kind(work, args, steps, rate).run()


def stage_base(work: Path, args):
    train(NoiseTraining, work, args, args.base_steps, args.base_rate)


def stage_flow(work: Path, args):
    """Trains the flow-matching U-Net and writes it in half precision; the rest of the model is the base's."""
    train(FlowTraining, work, args, args.flow_steps, args.flow_rate)
    if "RANK" in os.environ:
        return  # the process that started this one writes the file
    average = torch.load(work / "flow.pt", weights_only=True, map_location="cpu")["average"]
    args.flow_output.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name.removeprefix("unet."): value.half().contiguous() for name, value in average.items()}, args.flow_output
    )
