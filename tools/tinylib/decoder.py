"""The decoder's further training, which sharpens what the finished base draws. All other parts stay as they are."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from tlora_core.tiny import world
from tlora_core.tiny.autoencoder import TinyAutoencoder

from .common import SIZE, Progress, save_state, set_rate, to_tensor, warm_stable_decay
from .pairs import load_pairs
from .pictures import take

PREFIX = "first_stage_model."
STREAM = 8  # of random numbers; the other stages have their own
SIDE, PATCH = 2 * SIZE, 8  # of decoded pictures; of the patches in which edges are compared
# Pictures of each kind in a batch. The background of a drawn picture was only fitted, so it counts less.
SHARES = {"plain": 1, "odd": 2, "changed": 3, "drawn": 6, "taught": 5}
BACKGROUND_WEIGHT = {"drawn": 0.4, "taught": 0.4}
RATE, CRITIC_RATE, AVERAGE_EVERY = 6e-4, 4e-4, 5
CRITIC_FROM = 0.05  # share of the steps; before it, every decoded picture is told from a rendered one at once
EDGES, STEEPNESS, FEATURES = 0.5, 15.0, 0.3  # weights in the loss, beside 1 for the colours
CRITIC = 0.6  # share of the critic's gradient, by its norm, beside that of the loss


class Critic(nn.Module):
    """Tells rendered pictures from decoded ones, by patches."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 40, 80, 112, 112)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, stride=2, padding=1), nn.GroupNorm(8, b), nn.LeakyReLU(0.2))
            for a, b in zip(widths, widths[1:])
        )
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Verdicts [B, 1, 8, 8], high for rendered ones, and the features of each level, for pictures
        [B, 3, 128, 128] in -1..1."""
        features = []
        for level in self.levels:
            pictures = level(pictures)
            features.append(pictures)
        return self.last(pictures), features


class DecoderTraining:
    """The networks, the average of the decoder's weights, and the data. Resumes from the state in the work folder."""

    def __init__(self, work: Path, args) -> None:
        self.path, self.args, self.steps = work / "decoder.pt", args, args.decoder_steps
        torch.manual_seed(args.seed)
        self.model = TinyAutoencoder().to(args.device)
        self.model.load_state_dict(autoencoder_weights(args.output))
        self.model.requires_grad_(False)
        self.decoder = self.model.decoder.requires_grad_(True).to(memory_format=torch.channels_last)
        self.critic = Critic().to(args.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), RATE, betas=(0.8, 0.99), weight_decay=1e-4)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), CRITIC_RATE, betas=(0.5, 0.9), weight_decay=1e-4
        )
        self.average = {k: v.detach().clone() for k, v in self.decoder.state_dict().items()}
        self.first = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location=args.device)
            for name in ("decoder", "critic", "optimizer", "critic_optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.average, self.first = state["average"], state["step"]
        self.data = {kind: self._kept(work, kind) for kind in SHARES}

    def _kept(self, work: Path, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [N, 16, 8, 8], pictures [N, 128, 128, 3] as bytes, and weights [N, 16, 16] of its places as bytes."""
        path = work / f"decoder_{kind}.pt"
        if not path.exists():
            latents, scenes = self._scenes(work, kind)
            parts = [take(scenes, slice(i, i + 50)) for i in range(0, len(scenes), 50)]
            pictures = torch.from_numpy(np.concatenate([_as_bytes(world.render(p, SIDE)) for p in parts]))
            objects = torch.from_numpy(np.concatenate([world.object_mask(p, SIDE) for p in parts]))[:, None]
            # With a margin, so that the edge counts whole.
            weights = _as_bytes(max_pool2d(max_pool2d(objects, 8), 3, stride=1, padding=1)[:, 0].numpy())
            save_state(path, latents=latents.half(), pictures=pictures, weights=torch.from_numpy(weights))
        kept = torch.load(path, weights_only=True)
        return kept["latents"], kept["pictures"], kept["weights"]

    def _scenes(self, work: Path, kind: str) -> tuple[Tensor, world.Scenes]:
        if kind not in ("plain", "odd"):
            pairs = load_pairs(work)[kind]
            return pairs.latents, pairs.scenes
        rng, count = np.random.default_rng((self.args.seed, STREAM, len(kind))), self.args.decoder_scenes
        scenes = world.sample_scenes(count, rng)
        if kind == "odd":
            scenes.colour, scenes.rim, scenes.core = (rng.random((count, 3)) for _ in range(3))
        with torch.no_grad():
            parts = [take(scenes, slice(i, i + 100)) for i in range(0, len(scenes), 100)]
            latents = [self.model.encode(to_tensor(_as_bytes(world.render(p)), self.args.device)).cpu() for p in parts]
        return torch.cat(latents), scenes

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, pictures in -1..1, and the weights of their pixels [B, 1, 128, 128]."""
        rng, parts = np.random.default_rng((self.args.seed, STREAM, step)), []
        for kind, count in SHARES.items():
            latents, pictures, weights = self.data[kind]
            rows = torch.from_numpy(rng.integers(len(latents), size=count))
            latent = latents[rows].float()
            if kind in ("plain", "odd"):  # what a small error of the U-Net would leave
                strength = torch.from_numpy(rng.uniform(0, 0.3, (count, 1, 1, 1))).float()
                latent = latent + strength * torch.from_numpy(rng.standard_normal(latent.shape, np.float32))
            behind = BACKGROUND_WEIGHT.get(kind, 1.0)
            weight = behind + (1 - behind) * weights[rows][:, None].float() / 255
            weight = weight.repeat_interleave(8, 2).repeat_interleave(8, 3)
            parts.append((latent, to_tensor(pictures[rows].numpy(), "cpu"), weight))
        latents, pictures, weights = (torch.cat(each).to(self.args.device) for each in zip(*parts))
        return latents, pictures.contiguous(memory_format=torch.channels_last), weights

    def step(self, step: int) -> dict[str, float]:
        latents, pictures, weights = self.batch(step)
        for optimizer, rate in ((self.optimizer, RATE), (self.critic_optimizer, CRITIC_RATE)):
            set_rate(optimizer, warm_stable_decay(step, self.steps, rate, warmup=100))
        decoded = self.model.decode(latents)
        colours, edges = ((error * weights).mean() for error in _errors(decoded, pictures))
        steepness = ((_steepness(decoded) - _steepness(pictures)).abs() * avg_pool2d(weights, PATCH)).mean()
        loss = colours + EDGES * edges + STEEPNESS * steepness
        told = {"colours": colours.item(), "edges": edges.item(), "steepness": steepness.item()}
        self.optimizer.zero_grad()
        if step < CRITIC_FROM * self.steps:
            loss.backward()
        else:
            told["critic"] = self._teach_critic(decoded.detach(), pictures)
            decoded.backward(self._with_critic(loss, decoded, pictures))
        nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        if step % AVERAGE_EVERY == 0:
            decay = min(0.998**AVERAGE_EVERY, (step + 1) / (step + 10 * AVERAGE_EVERY))
            torch._foreach_lerp_(list(self.average.values()), list(self.decoder.state_dict().values()), 1 - decay)
        return told

    def _teach_critic(self, decoded: Tensor, pictures: Tensor) -> float:
        self.critic.requires_grad_(True)
        both = self.critic(torch.cat([pictures, decoded]))[0]
        rendered, drawn = both.chunk(2)
        loss = torch.relu(1 - rendered).mean() + torch.relu(1 + drawn).mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return loss.item()

    def _with_critic(self, loss: Tensor, decoded: Tensor, pictures: Tensor) -> Tensor:
        """The gradient at the decoded pictures: of the loss, of the difference to the rendered ones in the critic's
        features, and of its verdict. The norm of the verdict's part is CRITIC times that of the rest (as in Esser et
        al., Taming Transformers, 2021)."""
        self.critic.requires_grad_(False)
        verdict, features = self.critic(decoded)
        with torch.no_grad():
            wanted = self.critic(pictures)[1]
        apart = sum(((a - b).abs().mean() for a, b in zip(features, wanted)), torch.zeros(()))
        (told,) = torch.autograd.grad(loss + FEATURES * apart / len(features), decoded, retain_graph=True)
        (asked,) = torch.autograd.grad(-verdict.mean(), decoded, retain_graph=True)
        return told + CRITIC * told.norm() / asked.norm().clamp(min=1e-12) * asked

    def save(self, step: int) -> None:
        states = {n: getattr(self, n).state_dict() for n in ("decoder", "critic", "optimizer", "critic_optimizer")}
        save_state(self.path, **states, average=self.average, step=step + 1)

    def run(self) -> None:
        smooth, progress = {}, Progress("decoder", self.steps, self.first)
        for step in range(self.first, self.steps):
            for name, value in self.step(step).items():
                smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
            if progress.step(step, **smooth) or step + 1 == self.steps:
                self.save(step)


def autoencoder_weights(folder: Path) -> dict[str, Tensor]:
    """The autoencoder's weights in the finished model's file, in float32."""
    whole = load_file(folder / "tiny_base.safetensors")
    return {name.removeprefix(PREFIX): v.float() for name, v in whole.items() if name.startswith(PREFIX)}


def write_decoder(work: Path, folder: Path) -> None:
    """Puts the averaged decoder into the finished model's file."""
    whole = load_file(folder / "tiny_base.safetensors")
    average = torch.load(work / "decoder.pt", weights_only=True, map_location="cpu")["average"]
    whole.update({f"{PREFIX}decoder.{name}": value.half().contiguous() for name, value in average.items()})
    save_file(whole, folder / "tiny_base.safetensors", metadata={"modelspec.architecture": "tlora-tiny-sdxl"})


def stage_decoder(work: Path, args) -> None:
    DecoderTraining(work, args).run()
    write_decoder(work, args.output)


def _as_bytes(values: np.ndarray) -> np.ndarray:
    return np.round(values * 255).astype(np.uint8)


def _errors(decoded: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The error of each pixel's colour, and of its differences to its neighbours, [B, 3, 128, 128] each. The latter
    also in the picture at half size, whose edges need not be exact to the pixel."""
    error = decoded - pictures
    half = avg_pool2d(error, 2)
    return error.abs(), _differences(error) + _differences(half).repeat_interleave(2, 2).repeat_interleave(2, 3)


def _steepness(pictures: Tensor) -> Tensor:
    """How steep the edges in each patch are, wherever they lie in it: the root of the mean square of the differences of
    neighbours, [B, 3, 128 / PATCH, 128 / PATCH]. An edge that is twice as wide has half the mean square."""
    across, down = (torch.diff(pictures, dim=d, append=pictures.narrow(d, -1, 1)).square() for d in (2, 3))
    return (avg_pool2d(across + down, PATCH) + 1e-6).sqrt()


def _differences(error: Tensor) -> Tensor:
    across, down = (torch.diff(error, dim=d, append=error.narrow(d, -1, 1)).abs() for d in (2, 3))
    return across + down
