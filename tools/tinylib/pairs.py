"""Latents as the finished U-Net leaves them, each with the picture that it stands for: what the decoder is trained on.

The object of a drawn latent is what its prompt asks for, in the pose that fits the picture best; its background is the
one of its kind that fits best. Both come from the world's own rules, so the target is as sharp as a rendered picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlora_core.tiny import world
from tlora_core.tiny.scorer import SIZE, ConceptMatcher, at_size

from .common import Progress
from .pictures import take

STREAM = 7  # of random numbers; the other stages have their own
SMALL = 32  # side of the pictures in which backgrounds are compared
BACKGROUND_SEEDS = 256
COUNT = 6  # pictures of one call to the sampler
DRAWN_CALLS = 3  # calls for each combination of shape, colour and pattern
ODD_CONCEPTS, ODD_CALLS = 72, 3
METHODS = ("lora", "tlora", "vanilla_tlora")
NAMES = list(world.Scenes.__dataclass_fields__)


@dataclass
class Pairs:
    """latents [N, 16, 8, 8] as the VAE takes them, and the scenes that they show."""

    latents: Tensor
    scenes: world.Scenes

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        scenes = {k: torch.from_numpy(getattr(self.scenes, k)) for k in NAMES}
        torch.save({"latents": self.latents.half(), **scenes}, temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Pairs":
        kept = torch.load(path, weights_only=True)
        return cls(kept.pop("latents").float(), world.Scenes(**{k: v.numpy() for k, v in kept.items()}))

    @classmethod
    def joined(cls, parts: list["Pairs"]) -> "Pairs":
        scenes = {k: np.concatenate([getattr(p.scenes, k) for p in parts]) for k in NAMES}
        return cls(torch.cat([p.latents for p in parts]), world.Scenes(**scenes))


class LookMatcher(ConceptMatcher):
    """A ConceptMatcher for the look of any scene: its shape, colour, pattern, rim and core."""

    def __init__(self, look: world.Scenes):
        self.look = look
        super().__init__(world.CONCEPTS[0])  # its look is replaced by `scenes`

    def scenes(self, count: int) -> world.Scenes:
        scenes = take(self.look, np.zeros(count, int))
        scenes.background = np.full(count, list(world.BACKGROUNDS).index("greywall"))
        return scenes


class Backgrounds:
    """Finds the seed with which a background looks most as it does in a picture."""

    def __init__(self) -> None:
        rng = np.random.default_rng(STREAM)
        scenes = world.sample_scenes(BACKGROUND_SEEDS, rng)
        scenes.radius[:] = 1e-3  # the backgrounds alone
        scenes.centre[:] = 3
        self.seeds, self.pictures = scenes.seed, {}
        for index in range(len(world.BACKGROUNDS)):
            scenes.background[:] = index
            # As pictures are made small: a smaller rendering has other details.
            self.pictures[index] = _small(torch.from_numpy(world.render(scenes)).movedim(-1, 1))

    def nearest(self, picture: Tensor, among: Sequence[int], outside: Tensor) -> tuple[int, int]:
        """(background, its seed). picture [3, 64, 64], outside [64, 64]: 1 where the object is not."""
        small, weight = _small(picture), _small(outside[None])
        errors = torch.stack([((self.pictures[b] - small).abs() * weight).sum((1, 2, 3)) for b in among])
        best = int(errors.argmin())
        return among[best // BACKGROUND_SEEDS], int(self.seeds[best % BACKGROUND_SEEDS])


def _small(pictures: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(pictures, SMALL)


def fitted(
    pictures: Tensor, asked: world.Scenes, matcher: LookMatcher, backgrounds: Backgrounds, is_asked: bool
) -> world.Scenes:
    """The scenes, all of the matcher's look, in the poses and with the background details of `pictures` [N, H, W, 3].

    is_asked: whether the backgrounds are those that were asked for. An adapter may have copied its training picture's,
    which the decoder must not hide."""
    _, poses = matcher.fit(pictures)
    scenes = take(asked, slice(None))
    scenes.centre, scenes.radius, scenes.angle = poses[:, :2].numpy(), poses[:, 2].numpy(), poses[:, 3].numpy()
    outside = 1 - torch.from_numpy(world.object_mask(scenes, SIZE))
    every = range(len(world.BACKGROUNDS))
    seen = zip(at_size(pictures.movedim(-1, 1)), scenes.background, outside)
    found = [backgrounds.nearest(picture, [int(b)] if is_asked else every, out) for picture, b, out in seen]
    scenes.background, scenes.seed = (np.array(values) for values in zip(*found))
    return scenes


def odd_concepts(count: int, rng: np.random.Generator) -> list[world.Concept]:
    """Concepts of any colours, for T-LoRAs; none is one of the held-out ones."""
    colours = rng.integers(0, 256, (count, 3, 3))
    return [
        world.Concept(f"odd {i}", world.SHAPES[i % len(world.SHAPES)], *(tuple(int(v) for v in c) for c in colours[i]))
        for i in range(count)
    ]


class Maker:
    """Makes the pairs in parts, each of which is kept in the work folder, so that it can be interrupted."""

    def __init__(self, work: Path, host) -> None:
        self.folder, self.host, self.backgrounds = work / "pairs", host, Backgrounds()
        self.folder.mkdir(exist_ok=True)

    def part(self, kind: str, number: int, calls: int) -> None:
        path = self.folder / f"{kind}_{number:03}.pt"
        if not path.exists():
            getattr(self, kind)(number, calls).save(path)

    def drawn(self, number: int, calls: int) -> Pairs:
        """Pictures of one combination of shape, colour and pattern, drawn by the base from full captions."""
        from tiny_gate import FullCaption

        rng, parts, matcher = np.random.default_rng((STREAM, 1, number)), [], None
        shape, rest = divmod(number, len(world.COLOURS) * len(world.PATTERNS))
        colour, pattern = divmod(rest, len(world.PATTERNS))
        for call in range(calls):
            asked = _alike(rng)
            asked.shape[:], asked.pattern[:], asked.colour_index[:] = shape, pattern, colour
            asked.colour[:] = np.array(list(world.COLOURS.values())[colour]) / 255
            caption = world.caption(asked, 0, FullCaption(), drop=0)
            seed = 1_000_000 + number * calls + call
            latents = self.host.latents(caption, seed, count=COUNT, steps=int(rng.integers(12, 21)))
            matcher = matcher or LookMatcher(take(asked, slice(0, 1)))
            parts.append(self._fitted(latents, asked, matcher, is_asked=True))
        return Pairs.joined(parts)

    def changed(self, number: int, calls: int) -> Pairs:
        """Rendered pictures that the base has noised and denoised again, which leaves their objects where they were."""
        from tiny_gate import FullCaption

        rng, parts = np.random.default_rng((STREAM, 2, number)), []
        for call in range(calls):
            scenes = _alike(rng)
            poses = world.sample_scenes(COUNT, rng)
            scenes.radius, scenes.angle, scenes.seed = poses.radius, poses.angle, poses.seed
            latents = self.host.vae.encode(torch.from_numpy(world.render(scenes)))
            caption = world.caption(scenes, 0, FullCaption(), drop=0)
            strength = float(rng.uniform(0.15, 0.6))
            seed = 2_000_000 + number * calls + call
            parts.append(Pairs(self.host.again(latents, caption, seed, strength), scenes))
        return Pairs.joined(parts)

    def taught(self, number: int, calls: int) -> Pairs:
        """Pictures that the base draws with an adapter for an odd concept."""
        from tlora_core.hosts.comfy.sampling import apply_tlora

        concept = odd_concepts(ODD_CONCEPTS, np.random.default_rng((STREAM, 3)))[number]
        rng, parts = np.random.default_rng((STREAM, 3, number)), []
        matcher = LookMatcher(world.concept_scenes(concept, 1, rng))
        trained = _training(self.host, concept, METHODS[number % len(METHODS)], rng)
        for steps in (120, 240):
            trained.train(steps)
            model = apply_tlora(self.host.model, trained.tlora())
            for call in range(-(-calls // 2)):
                background = list(world.BACKGROUNDS)[rng.integers(len(world.BACKGROUNDS))]
                asked = world.concept_scenes(concept, COUNT, rng, background)
                prompt = f"a photo of a sks {concept.shape} {world.BACKGROUNDS[background]}"
                seed = 3_000_000 + number * calls + call
                latents = self.host.latents(prompt, seed, model=model, count=COUNT)
                parts.append(self._fitted(latents, asked, matcher, is_asked=False))
        return Pairs.joined(parts)

    def _fitted(self, latents: Tensor, asked: world.Scenes, matcher: LookMatcher, is_asked: bool) -> Pairs:
        pictures = self.host.vae.decode(latents)
        return Pairs(latents, fitted(pictures, asked, matcher, self.backgrounds, is_asked))


def _alike(rng: np.random.Generator) -> world.Scenes:
    """COUNT scenes with equal attributes, for one caption."""
    return take(world.sample_scenes(1, rng), np.zeros(COUNT, int))


def _training(host, concept: world.Concept, method: str, rng: np.random.Generator):
    from tlora_core.hosts.comfy.training.personalize import Personalization, TrainRequest
    from tlora_core.training.config import TrainConfig
    from tlora_core.training.dataset import training_images

    background = list(world.BACKGROUNDS)[rng.integers(len(world.BACKGROUNDS))]
    picture = torch.from_numpy(world.render(world.concept_scenes(concept, 1, rng, background)))
    rate = 1.5e-3 if method == "lora" else 3e-3
    config = TrainConfig(steps=240, learning_rate=rate, batch_size=4)
    request = TrainRequest("sks", concept.shape, method=method, rank=16, resolution=64, min_rank=8, config=config)
    return Personalization(host.model, host.clip, host.vae, training_images(picture), request)


def stage_pairs(work: Path, args) -> None:
    """Makes the pairs with the finished base in the output folder."""
    from tiny_gate import HostSampler

    from tlora_core.tiny import comfy as tiny_base

    drawn = len(world.SHAPES) * len(world.COLOURS) * len(world.PATTERNS)
    kinds = [("drawn", drawn, DRAWN_CALLS), ("changed", drawn // 2, DRAWN_CALLS), ("taught", ODD_CONCEPTS, ODD_CALLS)]
    with torch.inference_mode():
        host = HostSampler(*tiny_base.load(str(args.output / "tiny_base.safetensors")))
        maker = Maker(work, host)
        # All kinds in turn, so that an interrupted stage has some of each.
        numbers = sorted(
            ((place + 0.5) / many, kind, n, calls if args.pairs else 1)
            for kind, many, calls in kinds
            for place, n in enumerate(np.random.default_rng(STREAM).permutation(many))
            if place < max(1, many * args.pairs // 100)
        )
        progress = Progress("pairs", len(numbers))
        for done, (_, kind, number, calls) in enumerate(numbers):
            maker.part(kind, int(number), calls)
            progress.step(done)


def load_pairs(work: Path) -> dict[str, Pairs]:
    """All pairs of the work folder, by their kinds."""
    files = sorted((work / "pairs").glob("*.pt"))
    kinds = sorted({file.name.split("_")[0] for file in files})
    return {kind: Pairs.joined([Pairs.load(f) for f in files if f.name.startswith(kind)]) for kind in kinds}
