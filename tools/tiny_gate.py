"""Measures the tiny base model as ComfyUI runs it: does it draw what its prompts say, and can a LoRA teach it a
concept?

    python3 tools/host.py python tools/tiny_gate.py [--pictures 600] [--concepts 12] [--grid PICTURE.png] [--flow]

Prints a JSON report; the exit status is 1 if the gate is not passed. The gate: the background is right in 95% of the
pictures, the colour in 90% and the shape in 95%, according to a scorer that is right on at least 95% of rendered
pictures. At 64 pixels, edges are as sharp as in rendered pictures of the same scenes, within 22%. And a plain LoRA
trained on one picture of a held-out concept reproduces it under its training prompt, at one of the measured steps, for
at least 80% of the concepts. `weights/gate.json` is the report of the bundled weights.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import adaptive_avg_pool2d

from tlora_core.tiny import world
from tlora_core.tiny.autoencoder import LATENT_CHANNELS
from tlora_core.tiny.scorer import SIZE, AttributeScorer, ConceptMatcher

WEIGHTS = Path(world.__file__).parent / "weights"
FLOW_WEIGHTS = Path(__file__).resolve().parents[1] / "benchmarks" / "weights" / "flow_unet.safetensors"
GATE = {"background": 0.95, "colour": 0.90, "shape": 0.95}
SHARPNESS_GATE = 0.22  # how far it may be from that of rendered pictures
CONCEPTS_GATE = 0.80  # share of the held-out concepts that a LoRA reproduces
SCORER_GATE = 0.95
LIKENESS_STEPS = (80, 160, 240, 320)  # concepts differ in the steps they need, and in when they are copied


def parse_host_arguments(device: str = "cpu") -> None:
    """The host reads the command line when it is first imported; this gives it arguments of its own."""
    sys.argv = sys.argv[:1] + (["--cpu"] if device == "cpu" else [])
    import comfy.options

    comfy.options.enable_args_parsing()


def load_scorer(folder: Path = WEIGHTS) -> AttributeScorer:
    scorer = AttributeScorer()
    scorer.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "scorer.safetensors").items()}
    )
    return scorer.eval()


def load_flow(folder: Path = WEIGHTS, unet: Path = FLOW_WEIGHTS):
    """(MODEL, CLIP, VAE) of the tiny base with the U-Net that was trained further to predict the velocity, set up as
    the host's node ModelSamplingSD3 does with a shift of 1, which is no shift."""
    from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow

    from tlora_core.tiny import comfy as tiny_base

    class Flow(ModelSamplingDiscreteFlow, CONST):
        pass

    model, clip, vae = tiny_base.load(str(folder / "tiny_base.safetensors"))
    model.model.diffusion_model.load_state_dict({k: v.float() for k, v in load_file(unet).items()})
    model.add_object_patch("model_sampling", Flow(model.model.model_config))
    return model, clip, vae


def attributes(scenes: world.Scenes, rows=slice(None)) -> dict[str, torch.Tensor]:
    source = {
        "shape": scenes.shape,
        "colour": scenes.colour_index,
        "pattern": scenes.pattern,
        "background": scenes.background,
        "place": scenes.place,
    }
    return {name: torch.from_numpy(values[rows]) for name, values in source.items()}


def scorer_accuracy(scorer: AttributeScorer, count: int = 2000, seed: int = 4) -> dict[str, float]:
    """Accuracy on rendered pictures that the scorer was not trained on."""
    scenes = world.sample_scenes(count, np.random.default_rng((seed, 4)))
    guess = scorer.predict(torch.from_numpy(world.render(scenes)))
    return {name: (guess[name] == target).float().mean().item() for name, target in attributes(scenes).items()}


class HostSampler:
    """The host's own sampling with the tiny base: 20 Euler steps, guidance 4."""

    def __init__(self, model, clip, vae):
        self.model, self.clip, self.vae = model, clip, vae

    def sample(self, prompt: str, seed: int, model=None, count: int = 1) -> torch.Tensor:
        """[count, 128, 128, 3] in 0..1."""
        return self.vae.decode(self.latents(prompt, seed, model, count))

    def latents(self, prompt: str, seed: int, model=None, count: int = 1, steps: int = 20, **options) -> torch.Tensor:
        """[count, 16, 8, 8]. options: of comfy.sample.sample."""
        return self._sampled(torch.zeros(count, LATENT_CHANNELS, 8, 8), prompt, seed, model, steps, **options)

    def again(self, latent: torch.Tensor, prompt: str, seed: int, strength: float, steps: int = 10) -> torch.Tensor:
        """`latent` noised and denoised again; strength: 1 draws it anew."""
        return self._sampled(latent, prompt, seed, None, steps, denoise=strength)

    def _sampled(self, latent: torch.Tensor, prompt: str, seed: int, model, steps: int, **options) -> torch.Tensor:
        import comfy.sample

        positive, negative = (self.clip.encode_from_tokens_scheduled(self.clip.tokenize(t)) for t in (prompt, ""))
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(
            model or self.model,
            noise,
            steps,
            4.0,
            "euler",
            "normal",
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=seed,
            **options,
        )


class FullCaption:
    """Replaces a random generator: no attribute is dropped, no rare word is added, and the place is always named."""

    def random(self):
        return 0.5


def sharpness(pictures: torch.Tensor) -> torch.Tensor:
    """How steep the edges of pictures [B, H, W, 3] are, [B]: the mean difference of neighbouring pixels, where each
    difference weighs as much as it is large, so that neither plain areas nor the number of edges count."""
    across, down = (pictures.diff(dim=dim).abs().mean(-1).flatten(1) for dim in (1, 2))
    steps = torch.cat([across, down], 1)
    return steps.square().sum(1) / steps.sum(1).clamp(min=1e-9)


def sharpness_ratio(pictures: torch.Tensor, scenes: world.Scenes, side: int) -> float:
    """The median sharpness of pictures [B, H, W, 3], averaged down to `side` pixels, as a share of that of rendered
    pictures of the same scenes."""
    seen = adaptive_avg_pool2d(pictures.movedim(-1, 1), side).movedim(1, -1)
    return (sharpness(seen).median() / sharpness(torch.from_numpy(world.render(scenes, side))).median()).item()


def base_accuracy(
    host: HostSampler, scorer: AttributeScorer, count: int, seed: int = 5
) -> tuple[dict, torch.Tensor, dict[int, float]]:
    """How often each attribute follows the prompt, the pictures, and their sharpness by the side at which it is
    measured."""
    scenes, pictures = world.sample_scenes(count, np.random.default_rng((seed, 5))), []
    for i in range(count):
        pictures.append(host.sample(world.caption(scenes, i, FullCaption(), drop=0), seed=i))
    pictures = torch.cat(pictures)
    guess = scorer.predict(pictures)
    right = {k: (guess[k] == target).double().mean().item() for k, target in attributes(scenes).items()}
    return right, pictures, {side: sharpness_ratio(pictures, scenes, side) for side in (SIZE, pictures.shape[1])}


def lora_likeness(host: HostSampler, concept: world.Concept, steps: Sequence[int] = LIKENESS_STEPS) -> dict:
    """Distances from the concept under the training prompt, means of four pictures: "by_step" while a plain LoRA learns
    it from one picture, "lora" the smallest of these, "base" before training, and "ceiling" the training picture
    itself, passed through the autoencoder."""
    from tlora_core.hosts.comfy.sampling import apply_tlora
    from tlora_core.hosts.comfy.training.personalize import Personalization, TrainRequest
    from tlora_core.training.config import TrainConfig
    from tlora_core.training.dataset import training_images

    scenes = world.concept_scenes(concept, 1, np.random.default_rng(0), "beach", "centre")
    image = torch.from_numpy(world.render(scenes))
    request = TrainRequest(
        "sks",
        concept.shape,
        method="lora",
        rank=16,
        resolution=64,
        min_rank=16,
        config=TrainConfig(steps=max(steps), learning_rate=1.5e-3, batch_size=4),
    )
    trained = Personalization(host.model, host.clip, host.vae, training_images(image), request)
    matcher, by_step = ConceptMatcher(concept), {}

    def drawn(model=None):
        return matcher.distance(host.sample(request.prompt, seed=1, model=model, count=4)).mean().item()

    for step in steps:
        trained.train(step)
        by_step[step] = drawn(apply_tlora(host.model, trained.tlora()))
    return {
        "lora": min(by_step.values()),
        "by_step": by_step,
        "base": drawn(),
        "ceiling": matcher.distance(host.vae.decode(host.vae.encode(image))).item(),
    }


def reproduces(distances: dict[str, float]) -> bool:
    """Whether the result is nearer to the concept as the autoencoder shows it than to what the base drew before."""
    return distances["lora"] < (distances["ceiling"] + distances["base"]) / 2


def measure(pictures: int, concepts: int, folder: Path = WEIGHTS, flow: bool = False) -> tuple[dict, torch.Tensor]:
    """The report and the base's pictures. flow: of the flow-matching sibling. Needs the host importable."""
    from tlora_core.tiny import comfy as tiny_base

    with torch.inference_mode():
        scorer = load_scorer(folder)
        host = HostSampler(*(load_flow(folder) if flow else tiny_base.load(str(folder / "tiny_base.safetensors"))))
        base, drawn, sharp = base_accuracy(host, scorer, pictures)
        report = {
            "scorer": scorer_accuracy(scorer),
            "base": base,
            "sharpness": {str(side): ratio for side, ratio in sharp.items()},
            "pictures": pictures,
            "concepts": {c.name: lora_likeness(host, c) for c in world.CONCEPTS[:concepts]},
        }
    return report | {"passed": passed(report)}, drawn


def passed(report: dict) -> bool:
    """Whether all figures of a report pass the gate. A report without concepts is judged without them."""
    reproduced = [reproduces(distances) for distances in report["concepts"].values()]
    return (
        all(report["base"][name] >= least for name, least in GATE.items())
        and min(report["scorer"].values()) >= SCORER_GATE
        and abs(report["sharpness"][str(SIZE)] - 1) <= SHARPNESS_GATE
        and sum(reproduced) >= CONCEPTS_GATE * len(reproduced)
    )


def save_grid(pictures: torch.Tensor, path: Path, columns: int = 8, scale: int = 2) -> None:
    from PIL import Image

    columns = min(columns, len(pictures))
    rows = [
        torch.cat(list(pictures[i : i + columns]), dim=1) for i in range(0, len(pictures) // columns * columns, columns)
    ]
    sheet = Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy())
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.LANCZOS).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=600, help="how many prompts to draw (600)")
    parser.add_argument(
        "--concepts", type=int, default=len(world.CONCEPTS), help="how many held-out concepts to teach (all)"
    )
    parser.add_argument("--grid", type=Path, help="save the first 48 pictures as a sheet")
    parser.add_argument("--flow", action="store_true", help="measure the flow-matching sibling")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the model and its scorer")
    args = parser.parse_args()
    parse_host_arguments()
    report, drawn = measure(args.pictures, args.concepts, args.weights, args.flow)
    print(json.dumps(report, indent=2))
    if args.grid:
        save_grid(drawn[:48], args.grid)
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
